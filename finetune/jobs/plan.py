"""From what was asked to exactly what will run: pure, torch-free, also the answer of a dry run.

`resolve` turns every `auto` of the hyperparameters into a value, given the dataset's and the worker's profile. The
resolved plan is recorded with the job and the version.
"""

from __future__ import annotations

from typing import Literal, cast

from pydantic import Field

from finetune.data.options import FrozenModel, modality_of
from finetune.data.targets import Metric, MetricName, metric_of, target_type
from finetune.jobs.hyperparameters import (
    EMBEDDING_LOSSES,
    Hyperparameters,
    Loss,
    PlanError,
    SingleMethod,
    TrainingOptions,
    check_task,
    refusal,
)
from finetune.jobs.search_space import Space, default_space
from modeling.tasks import DEFAULT_TASK

COST_ORDER: tuple[SingleMethod, ...] = ("baseline", "linear_probe", "lora", "full")
FEW_ROWS_PER_CLASS = 32  # up to this many, on average, `auto` also tries `setfit`, after the probe
_STEPPED = frozenset({"prompt_tuning", "bottleneck", "lora", "qlora", "full"})
_ROWS_PER_DEVICE = 8  # of a step, at least, for a further GPU to be taken by itself
_PAIRS_PER_STEP = 32 * 31 // 2
SMALL_PARAMETERS = 50_000_000
# Steps of SGD are as long as the gradient, which is far below 1 here; the others divide by its size.
_RATE_FACTOR = {"sgd": 100.0}


class DatasetProfile(FrozenModel):
    """What planning needs to know of the data. `max_length_p99` is in tokens, `largest_class` in training rows."""

    train_rows: int
    validation_rows: int
    test_rows: int
    labels: int
    max_length_p99: int
    largest_class: int = 0

    def epoch_rows(self, *, oversample: bool) -> int:
        """Training rows of an epoch, with those that are repeated."""
        return max(self.train_rows, self.labels * self.largest_class) if oversample else self.train_rows


class WorkerProfile(FrozenModel):
    """What planning needs to know of a worker; workers write it to the database."""

    device: str = "cpu"
    devices: int = 1  # GPUs that it may train on at once
    cpu_threads: int = 1
    has_bf16: bool = False
    has_bitsandbytes: bool = False
    # Rows of 256 tokens a second through a backbone of 22 M weights, half of them embeddings; measured at start.
    forward_rows_per_s: float = Field(50.0, gt=0)


class MethodPlan(FrozenModel):
    """One method's resolved numbers; the baseline and the probe have none of the training ones."""

    method: SingleMethod
    epochs: float = 0
    learning_rate: float = 0
    head_learning_rate: float = 0
    batch_size: int = 32
    gradient_accumulation: int = 1
    finds_batch_size: bool = False  # try how many rows of a step fit in one pass, and divide the step if not all do
    total_steps: int = 0
    estimated_seconds: float | None = None


class TrainingPlan(TrainingOptions):
    """Everything a run depends on, with no `auto` left."""

    methods: tuple[MethodPlan, ...]
    task: str = DEFAULT_TASK
    metric: MetricName
    max_length: int
    precision: Literal["fp32", "bf16", "fp16"]
    dropout: float
    loss: Loss
    momentum: float
    label_smoothing: float
    refit: bool = False
    device: str
    cpu_threads: int
    processes: int = 1  # that compute each step's gradient together, one a GPU

    @property
    def deciding(self) -> Metric:
        """The metric that decides between methods, checkpoints, trials and versions."""
        return metric_of(self.metric)

    @property
    def estimated_seconds(self) -> float:
        """Of the whole job, with trials and a refit of the method that takes longest."""
        seconds = {method.method: method.estimated_seconds or 0.0 for method in self.methods}
        again = max((seconds[name] for name in seconds if name in _STEPPED), default=0.0) if self.refit else 0.0
        total = sum(seconds.values()) * max(1, self.trials) + again
        return total if self.max_seconds is None else min(total, self.max_seconds)


def resolve(
    wanted: Hyperparameters,
    *,
    data: DatasetProfile,
    worker: WorkerProfile,
    parameters: int,
    model_max_length: int,
    task: str = DEFAULT_TASK,
) -> TrainingPlan:
    """Every `auto` becomes a number. `parameters` counts the backbone's weights. Pure. Raises `PlanError`."""
    check_task(wanted, task)
    refuse_unavailable(wanted, worker)
    taken = wanted.prompt.tokens if wanted.method == "prompt_tuning" else 0
    max_length = min(_max_length(wanted, data), max(8, model_max_length - taken))
    names = _auto_order(data, task) if wanted.method == "auto" else (wanted.method,)
    given = {name: getattr(wanted, name) for name in TrainingOptions.model_fields}
    return TrainingPlan(
        **given | {"split": wanted.split.resolved(), "space": _space(wanted, parameters, task)},
        methods=tuple(
            _plan_method(name, wanted, data=data, worker=worker, parameters=parameters, max_length=max_length)
            for name in names
        ),
        task=task,
        metric=wanted.metric_for(task),
        max_length=max_length,
        precision=_precision(wanted, worker),
        dropout=0.0 if wanted.dropout == "auto" else wanted.dropout,
        loss=cast(Loss, target_type(task).losses[0]) if wanted.loss == "auto" else wanted.loss,
        momentum=_momentum(wanted),
        label_smoothing=target_type(task).label_smoothing
        if wanted.label_smoothing == "auto"
        else wanted.label_smoothing,
        refit=wanted.method == "auto" if wanted.refit == "auto" else wanted.refit,
        device=worker.device,
        cpu_threads=worker.cpu_threads,
        processes=_processes(wanted, worker),
    )


def refuse_unavailable(wanted: Hyperparameters, worker: WorkerProfile | None) -> None:
    """Raises `PlanError` for what the worker (None: no worker is known) cannot run."""
    if worker is not None:
        _refuse_processes(wanted, worker)
        if wanted.precision == "fp16" and not worker.device.startswith("cuda"):
            raise refusal("precision", "precision fp16 needs a GPU; use bf16, fp32 or auto")
    if wanted.method != "qlora":
        return
    if worker is None:
        lacks = "no worker has been heard from that could run it"
    elif not worker.device.startswith("cuda"):
        lacks = f"the worker trains on {worker.device}"
    elif not worker.has_bitsandbytes:
        lacks = "the worker has no bitsandbytes"
    else:
        return
    message = f"method qlora needs a GPU with CUDA and the package bitsandbytes: {lacks}; use lora"
    raise PlanError([{"loc": ["hyperparameters", "method"], "message": message}])


def _refuse_processes(wanted: Hyperparameters, worker: WorkerProfile) -> None:
    on_gpu, devices = worker.device.startswith("cuda"), 1 if wanted.devices == "auto" else wanted.devices
    name = "devices" if devices > 1 else "processes"
    if max(devices, wanted.processes) == 1:
        return
    if wanted.method != "auto" and wanted.method not in _STEPPED:
        raise refusal(name, f"{name} has no effect with method {wanted.method}; leave it out")
    if wanted.loss in EMBEDDING_LOSSES:
        message = f"loss {wanted.loss} compares the rows of a step with each other, so they cannot be shared out"
        raise refusal(name, f"{message}; leave {name} out, or use another loss")
    if devices > 1 and not on_gpu:
        raise refusal("devices", f"devices {devices}: the worker trains on {worker.device}; leave devices out")
    if devices > worker.devices:
        raise refusal(
            "devices", f"devices {devices}: the worker has {worker.devices}; ask for no more, or leave it out"
        )
    if wanted.processes > 1 and on_gpu:
        raise refusal("processes", "processes is for workers without a GPU; use devices")
    if wanted.processes > worker.cpu_threads:
        message = f"processes {wanted.processes}: the worker has {worker.cpu_threads} threads, and each needs one"
        raise refusal("processes", f"{message}; ask for no more")


def _processes(wanted: Hyperparameters, worker: WorkerProfile) -> int:
    """As asked for. By itself a run takes all GPUs that get enough rows of a step to be worth the exchange."""
    if not worker.device.startswith("cuda"):
        return wanted.processes
    if wanted.devices != "auto":
        return wanted.devices
    if wanted.loss in EMBEDDING_LOSSES:
        return 1
    return max(1, min(worker.devices, _batch_size(wanted) * _accumulation(wanted) // _ROWS_PER_DEVICE))


def _batch_size(wanted: Hyperparameters) -> int:
    return 32 if wanted.batch_size == "auto" else wanted.batch_size


def _accumulation(wanted: Hyperparameters) -> int:
    return 1 if wanted.gradient_accumulation == "auto" else wanted.gradient_accumulation


def _auto_order(data: DatasetProfile, task: str) -> tuple[SingleMethod, ...]:
    """Cheapest first."""
    order = COST_ORDER if modality_of(task).has_baseline else COST_ORDER[1:]
    if target_type(task).methods is not None or data.train_rows > FEW_ROWS_PER_CLASS * max(1, data.labels):
        return order
    return tuple(name for known in order for name in ((known, "setfit") if known == "linear_probe" else (known,)))


def _space(wanted: Hyperparameters, parameters: int, task: str) -> Space:
    """What the search varies: as asked, else around the method's own values."""
    if not wanted.trials or wanted.space or wanted.method == "auto":
        return wanted.space
    rate = _learning_rate(wanted.method, wanted, parameters)
    without = set(target_type(task).refuses)
    return default_space(wanted.method, rate, given=frozenset(wanted.model_fields_set | without))


def _max_length(wanted: Hyperparameters, data: DatasetProfile) -> int:
    return max(8, -(-data.max_length_p99 // 8) * 8) if wanted.max_length == "auto" else wanted.max_length


def _precision(wanted: Hyperparameters, worker: WorkerProfile) -> Literal["fp32", "bf16", "fp16"]:
    if wanted.precision != "auto":
        return wanted.precision
    if worker.has_bf16:
        return "bf16"
    return "fp16" if worker.device.startswith("cuda") else "fp32"


def _momentum(wanted: Hyperparameters) -> float:
    if wanted.momentum != "auto":
        return wanted.momentum
    return 0.9 if wanted.optimizer == "sgd" else 0.0


def _plan_method(
    method: SingleMethod,
    wanted: Hyperparameters,
    *,
    data: DatasetProfile,
    worker: WorkerProfile,
    parameters: int,
    max_length: int,
) -> MethodPlan:
    batch_size, accumulation = _batch_size(wanted), _accumulation(wanted)
    epochs, rows = 0.0, data.epoch_rows(oversample=wanted.oversample)
    if method in _STEPPED:
        epochs = float(_default_epochs(method, rows) if wanted.epochs == "auto" else wanted.epochs)
    steps_per_epoch = max(1, -(-rows // (batch_size * accumulation)))
    steps = max(1, round(steps_per_epoch * epochs)) if epochs else 0
    if method == "setfit":
        steps = -(-wanted.setfit.max_pairs // _PAIRS_PER_STEP)
    return MethodPlan(
        method=method,
        epochs=epochs,
        learning_rate=_learning_rate(method, wanted, parameters),
        head_learning_rate=_head_learning_rate(method, wanted),
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        finds_batch_size=wanted.batch_size == "auto" and worker.device.startswith("cuda"),
        total_steps=steps,
        estimated_seconds=_estimate(
            method,
            data,
            worker,
            parameters,
            max_length,
            epochs * rows / max(1, data.train_rows) / _processes(wanted, worker),
            steps,
        ),
    )


def _default_epochs(method: SingleMethod, rows: int) -> int:
    """Few rows need more passes: some 280 steps of 32 for full (2 to 10 epochs), 400 for the others (3 to 12)."""
    if method != "full":
        return min(12, max(3, -(-400 * 32 // max(1, rows))))
    return min(10, max(2, -(-280 * 32 // max(1, rows))))


# Below and above `SMALL_PARAMETERS`.
_LEARNING_RATES: dict[str, tuple[float, float]] = {
    "setfit": (3e-5, 2e-5),
    "prompt_tuning": (1e-2, 5e-3),
    "bottleneck": (1e-3, 5e-4),
    "lora": (5e-4, 2e-4),
    "qlora": (5e-4, 2e-4),
    "full": (1e-4, 3e-5),
}


def _learning_rate(method: SingleMethod, wanted: Hyperparameters, parameters: int) -> float:
    if method in {"baseline", "linear_probe"}:
        return 0.0  # both are solved, not stepped through
    if wanted.learning_rate != "auto":
        return wanted.learning_rate
    is_small = parameters < SMALL_PARAMETERS
    small, large = _LEARNING_RATES[method]
    return (small if is_small else large) * _RATE_FACTOR.get(wanted.optimizer, 1.0)


def _head_learning_rate(method: SingleMethod, wanted: Hyperparameters) -> float:
    """The head is small and may move faster, unless the caller set the rate for all."""
    if method in {"baseline", "linear_probe"}:
        return 0.0
    if wanted.learning_rate != "auto":
        return wanted.learning_rate
    return 1e-3 * _RATE_FACTOR.get(wanted.optimizer, 1.0)


def _estimate(
    method: SingleMethod,
    data: DatasetProfile,
    worker: WorkerProfile,
    parameters: int,
    max_length: int,
    epochs: float,
    steps: int,
) -> float:
    rows = data.train_rows + data.validation_rows + data.test_rows
    if method == "baseline":
        return 2.0 + rows / 3000
    # Work grows with parameters and tokens; a training step costs about three forward passes.
    forward = rows / worker.forward_rows_per_s * (max_length / 256) * max(1.0, parameters / 22_000_000)
    if method == "linear_probe":
        return 5.0 + forward
    if method == "setfit":  # tuned twice, on 32 rows a step, then the test rows
        return 10.0 + forward + forward / rows * 2 * 3 * 32 * steps
    return 10.0 + forward * 3 * epochs + forward * 0.3 * epochs
