"""From what was asked to exactly what will run: pure, torch-free, also the answer of a dry run.

`Hyperparameters` is the contract's flat list; `resolve` turns every `auto` into a value, given the
dataset's and the worker's profile. The resolved plan is recorded with the job and the version.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetune.quality import METRICS, Metric, MetricName, metric_of
from finetune.space import (
    FIXED,
    MOST_CHOICES,
    Choices,
    Range,
    Space,
    SpaceField,
    default_space,
    samples,
    with_values,
)
from model_registry.manifest import Task as Task

SingleMethod = Literal[
    "baseline", "linear_probe", "setfit", "ia3", "prompt_tuning", "bottleneck", "lora", "qlora", "full"
]
Method = Literal["auto"] | SingleMethod
COST_ORDER: tuple[SingleMethod, ...] = ("baseline", "linear_probe", "lora", "full")
FEW_ROWS_PER_CLASS = 32  # up to so many, on average, `auto` also tries `setfit`, after the probe
_STEPPED = frozenset({"ia3", "prompt_tuning", "bottleneck", "lora", "qlora", "full"})
_ROWS_PER_DEVICE = 8  # of a step, at least, for a further GPU to be taken by itself
_PAIRS_PER_STEP = 32 * 31 // 2
Optimizer = Literal["adamw", "adam", "sgd", "rmsprop", "adafactor"]
Scheduler = Literal["cosine", "linear", "constant", "plateau", "cyclic"]
Loss = Literal["cross_entropy", "bce", "mse", "huber", "focal", "contrastive", "triplet", "mnrl", "cosent"]
# They compare the vectors of a pass's rows with each other, so a pass is never divided.
EMBEDDING_LOSSES: frozenset[str] = frozenset({"contrastive", "triplet", "mnrl", "cosent"})
LOSSES: dict[Task, tuple[Loss, ...]] = {  # the first is what auto becomes
    "text-classification": ("cross_entropy", "bce", "focal", "contrastive", "triplet", "mnrl", "cosent"),
    "text-regression": ("mse", "huber"),
    "text-multi-label": ("bce", "focal"),
}
# The methods of the other tasks; text-classification has all.
METHODS_OF_OTHER_TASKS: frozenset[str] = frozenset({"auto", "baseline", "linear_probe", "lora", "full"})

# In the contract but not built yet: refused by name, so that nobody believes they took effect.
NOT_YET = {
    "augment", "oversample", "search",
}  # fmt: skip
_NOT_SEARCHED = frozenset({"auto", "baseline", "linear_probe"})  # several methods, or ones without steps
SMALL_PARAMETERS = 50_000_000
_LABEL_SMOOTHING = 0.05  # keeps the head from growing without end on rows already right; see docs/log.md


# Steps of SGD are as long as the gradient, which is far below 1 here; the others divide by its size.
_RATE_FACTOR = {"sgd": 100.0}


class PlanError(Exception):
    """A hyperparameter that is unknown, out of bounds or not available. `errors` names each with its place."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__("; ".join(error["message"] for error in errors))
        self.errors = errors


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraOptions(_Model):
    r: int = Field(16, ge=1, le=256)
    alpha: int = Field(32, ge=1, le=4096)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear", "attention"] = "all-linear"
    rslora: bool = False
    dora: bool = False


class BottleneckOptions(_Model):
    size: int = Field(64, ge=1, le=4096)


class PromptOptions(_Model):
    tokens: int = Field(16, ge=1, le=256)


class SetFitOptions(_Model):
    max_pairs: int = Field(4_000, ge=1, le=10_000_000)


class EarlyStopping(_Model):
    patience: int = Field(3, ge=1, le=1000)
    min_delta: float = Field(0.0, ge=0)


class GateOptions(_Model):
    """What a version must show to take the champion's place (`promote: if_better`)."""

    min_metric: float | None = Field(None, allow_inf_nan=False)
    max_class_drop: float = Field(0.05, ge=0, le=1)
    p_value: float = Field(0.05, gt=0, le=1)


class AbstainOptions(_Model):
    """The accuracy that answers above the abstention threshold should reach."""

    target_accuracy: float | None = Field(None, gt=0, le=1)


class SplitOptions(_Model):
    strategy: Literal["hash", "stratified", "random", "group", "time", "predefined"] = "hash"
    validation: float = Field(0.15, gt=0, lt=0.9)
    test: float = Field(0.15, ge=0, lt=0.9)
    column: str | None = Field(None, min_length=1, max_length=200)
    group_column: str | None = Field(None, min_length=1, max_length=200)
    time_column: str | None = Field(None, min_length=1, max_length=200)
    leaks: Literal["auto", "keep", "drop"] = "auto"

    @property
    def column_read(self) -> str | None:
        """The column that the strategy goes by, if any."""
        return {"predefined": self.column, "group": self.group_column, "time": self.time_column}.get(self.strategy)

    def resolved(self) -> SplitOptions:
        """Without `auto`: leaks are dropped where we cut by a column, and kept where the sides were given."""
        if self.leaks != "auto":
            return self
        return self.model_copy(update={"leaks": "drop" if self.strategy in {"group", "time"} else "keep"})

    @model_validator(mode="after")
    def _names_the_column_of_its_strategy(self) -> SplitOptions:
        for strategy, name in (("predefined", "column"), ("group", "group_column"), ("time", "time_column")):
            is_given = getattr(self, name) is not None
            if self.strategy == strategy and not is_given:
                raise ValueError(f"strategy {strategy} needs {name}")
            if self.strategy != strategy and is_given:
                raise ValueError(f"{name} is for strategy {strategy} and would have no effect with {self.strategy}")
        return self

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> SplitOptions:
        if self.validation + self.test > 0.9:
            raise ValueError("validation and test together leave less than a tenth of the rows for training")
        return self


class Hyperparameters(_Model):
    """The contract's names and defaults; `auto` is resolved by `resolve`."""

    method: Method = "auto"
    epochs: Literal["auto"] | float = Field("auto")
    learning_rate: Literal["auto"] | float = Field("auto")
    batch_size: Literal["auto"] | int = Field("auto")
    max_seconds: float | None = Field(None, gt=0, le=7 * 86_400)
    seed: int = Field(42, ge=0, lt=1 << 31)

    optimizer: Optimizer = "adamw"
    momentum: Literal["auto"] | float = Field("auto")
    scheduler: Scheduler = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1)
    gradient_accumulation: Literal["auto"] | int = Field("auto")
    gradient_checkpointing: bool = False
    devices: Literal["auto"] | int = Field("auto")
    processes: int = Field(1, ge=1, le=64)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    loss: Literal["auto"] | Loss = "auto"
    focal_gamma: float = Field(2.0, ge=0, le=10)
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    label_smoothing: Literal["auto"] | float = Field("auto")
    dropout: Literal["auto"] | float = Field("auto")

    unfreeze_layers: Literal["all"] | int = "all"
    lora: LoraOptions = LoraOptions()
    bottleneck: BottleneckOptions = BottleneckOptions()
    prompt: PromptOptions = PromptOptions()
    setfit: SetFitOptions = SetFitOptions()
    metric: Literal["auto"] | MetricName = "auto"
    eval_every: float = Field(0.5, gt=0, le=100)
    early_stopping: EarlyStopping = EarlyStopping()
    restore_best: bool = True
    refit: Literal["auto"] | bool = "auto"
    split: SplitOptions = SplitOptions()
    max_length: Literal["auto"] | int = Field("auto")
    calibration: Literal["temperature", "none"] = "temperature"
    export: list[Literal["onnx"]] = Field(["onnx"], max_length=1)
    abstain: AbstainOptions = AbstainOptions()
    gate: GateOptions = GateOptions()

    trials: int = Field(0, ge=0, le=1000)
    space: Space = SpaceField
    pruner: Literal["asha", "none"] = "asha"

    @model_validator(mode="after")
    def _numbers_in_bounds(self) -> Hyperparameters:
        bounds: dict[str, tuple[float, float]] = {
            "epochs": (0.01, 1000), "learning_rate": (1e-7, 1.0), "batch_size": (1, 4096),
            "gradient_accumulation": (1, 1024), "dropout": (0.0, 0.9), "max_length": (8, 8192),
            "label_smoothing": (0.0, 0.9), "unfreeze_layers": (1, 1000), "momentum": (0.0, 0.999), "devices": (1, 64),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not isinstance(value, str) and not low <= value <= high:
                word = type(self).model_fields[name].default
                raise ValueError(f"{name} must be {word} or from {low:g} to {high:g}")
        if isinstance(self.class_weights, dict) and not all(
            0 < weight <= 1e6 for weight in self.class_weights.values()
        ):
            raise ValueError("class_weights must be above 0 and at most 1e6")
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Hyperparameters:
        if "momentum" in self.model_fields_set and self.optimizer not in {"sgd", "rmsprop"}:
            raise ValueError(f"momentum has no effect with optimizer {self.optimizer}; use sgd or rmsprop")
        if "focal_gamma" in self.model_fields_set and self.loss != "focal":
            raise ValueError(f"focal_gamma has no effect with loss {self.loss}; use loss focal")
        return self


class DatasetProfile(_Model):
    """What planning needs to know of the data. `max_length_p99` is in tokens."""

    train_rows: int
    validation_rows: int
    test_rows: int
    labels: int
    max_length_p99: int


class WorkerProfile(_Model):
    """What planning needs to know of a worker; workers write it to the database."""

    device: str = "cpu"
    devices: int = 1  # GPUs that it may train on at once
    cpu_threads: int = 1
    has_bf16: bool = False
    has_bitsandbytes: bool = False
    # Rows of 256 tokens a second through a backbone of 22 M weights, half of them embeddings; measured at start.
    forward_rows_per_s: float = Field(50.0, gt=0)


class MethodPlan(_Model):
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


class TrainingPlan(_Model):
    """Everything a run depends on, with no `auto` left."""

    methods: tuple[MethodPlan, ...]
    is_auto: bool
    task: Task = "text-classification"
    seed: int
    metric: MetricName
    max_seconds: float | None
    max_length: int
    precision: Literal["fp32", "bf16", "fp16"]
    dropout: float
    loss: Loss
    focal_gamma: float
    optimizer: Optimizer
    momentum: float
    scheduler: Scheduler
    warmup_ratio: float
    layer_decay: float
    gradient_checkpointing: bool
    weight_decay: float
    max_grad_norm: float
    class_weights: Literal["none", "balanced"] | dict[str, float]
    label_smoothing: float
    unfreeze_layers: Literal["all"] | int = "all"
    lora: LoraOptions
    bottleneck: BottleneckOptions = BottleneckOptions()
    prompt: PromptOptions = PromptOptions()
    setfit: SetFitOptions = SetFitOptions()
    eval_every: float
    early_stopping: EarlyStopping
    restore_best: bool
    refit: bool = False
    split: SplitOptions
    calibration: Literal["temperature", "none"]
    export: list[Literal["onnx"]]
    abstain: AbstainOptions = AbstainOptions()
    gate: GateOptions = GateOptions()
    trials: int = 0
    space: Space = SpaceField
    pruner: Literal["asha", "none"] = "asha"
    device: str
    cpu_threads: int
    processes: int = 1  # that compute each step's gradient together, one a GPU

    @property
    def deciding(self) -> Metric:
        """The metric that decides between methods, checkpoints, trials and versions."""
        return metric_of(self.metric)


def parse_hyperparameters(values: dict[str, Any]) -> Hyperparameters:
    """Raises `PlanError`, which names the nearest known hyperparameter for an unknown one."""
    known = Hyperparameters.model_fields
    errors = []
    for name in values:
        if name in NOT_YET:
            errors.append({"loc": ["hyperparameters", name], "message": f"{name} is not available yet; leave it out"})
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            errors.append(
                {"loc": ["hyperparameters", name], "message": f"unknown hyperparameter {name[:60]!r}; {advice}"}
            )
    if errors:
        raise PlanError(errors)
    try:
        wanted = Hyperparameters.model_validate(values)
    except ValidationError as error:
        raise PlanError(
            [
                {
                    "loc": ["hyperparameters", *(str(part) for part in item["loc"])],
                    "message": f"{_place(item)}{item['msg']}",
                }
                for item in error.errors(include_url=False, include_input=False)
            ]
        ) from error
    errors = list(_search_errors(wanted, values))
    if errors:
        raise PlanError(errors)
    return wanted


def _search_errors(wanted: Hyperparameters, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is wrong with the search that a request asks for: each value of its space must be one that can be asked for
    by itself."""
    if wanted.trials and wanted.method in _NOT_SEARCHED:
        message = f"trials needs one method that is trained step by step; method is {wanted.method}"
        yield {"loc": ["hyperparameters", "trials"], "message": message}
    if wanted.space and not wanted.trials:
        yield {"loc": ["hyperparameters", "space"], "message": "space does nothing without trials"}
    plain = {name: value for name, value in values.items() if name not in {"trials", "space"}}
    for name, spec in wanted.space.items():
        place = ["hyperparameters", "space", name[:60]]
        if name.partition(".")[0] in FIXED:
            yield {"loc": place, "message": f"{name} cannot be searched"}
        elif isinstance(spec, list) and not 1 <= len(spec) <= MOST_CHOICES:
            yield {"loc": place, "message": f"{name}: from 1 to {MOST_CHOICES} choices"}
        else:
            yield from _invalid_samples(name, spec, plain, place)


def _invalid_samples(
    name: str, spec: Range | Choices, plain: dict[str, Any], place: list[str]
) -> Iterator[dict[str, Any]]:
    for value in samples(spec):
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        try:
            parse_hyperparameters(with_values(plain, {name: number}))
        except PlanError as error:
            yield {"loc": place, "message": f"{name} {value!r}: {error}"[:300]}
            return


def _place(item: Any) -> str:
    return f"{'.'.join(str(part) for part in item['loc'])}: " if item["loc"] else ""


def check_task(wanted: Hyperparameters, task: Task) -> None:
    """Raises `PlanError` for what makes no sense with a task."""
    if wanted.loss != "auto" and wanted.loss not in LOSSES[task]:
        fitting = ", ".join(LOSSES[task])
        raise _refusal("loss", f"loss {wanted.loss} does not fit {task}; use one of {fitting}")
    names = [metric.name for metric in METRICS[task]]
    if wanted.metric != "auto" and wanted.metric not in names:
        raise _refusal("metric", f"metric {wanted.metric} does not fit {task}; use one of {', '.join(names)}")
    _check_minimum(wanted, task)
    if task == "text-classification":
        return
    if wanted.method not in METHODS_OF_OTHER_TASKS:
        fitting = ", ".join(sorted(METHODS_OF_OTHER_TASKS))
        raise _refusal("method", f"method {wanted.method} is not available for {task} yet; use one of {fitting}")
    if wanted.class_weights != "none" and task == "text-regression":
        raise _refusal("class_weights", "class_weights need classes; leave them out for text-regression")
    if wanted.label_smoothing not in {"auto", 0}:
        raise _refusal("label_smoothing", "label_smoothing is for text-classification; leave it out")
    if wanted.abstain.target_accuracy is not None:
        raise _refusal("abstain", "abstain.target_accuracy is for text-classification; leave it out")


def _check_minimum(wanted: Hyperparameters, task: Task) -> None:
    least, metric = wanted.gate.min_metric, metric_of(_metric(wanted, task))
    if least is not None and metric.is_share and not 0 <= least <= 1:
        raise _refusal("gate", f"gate.min_metric must be from 0 to 1 for {metric.name}")


def _metric(wanted: Hyperparameters, task: Task) -> MetricName:
    return METRICS[task][0].name if wanted.metric == "auto" else wanted.metric


def _refusal(name: str, message: str) -> PlanError:
    return PlanError([{"loc": ["hyperparameters", name], "message": message}])


def resolve(
    wanted: Hyperparameters, *, data: DatasetProfile, worker: WorkerProfile, parameters: int, model_max_length: int,
    task: Task = "text-classification",
) -> TrainingPlan:  # fmt: skip
    """Every `auto` becomes a number. `parameters` counts the backbone's weights. Pure. Raises `PlanError`."""
    check_task(wanted, task)
    refuse_unavailable(wanted, worker)
    taken = wanted.prompt.tokens if wanted.method == "prompt_tuning" else 0
    max_length = min(_max_length(wanted, data), max(8, model_max_length - taken))
    names = _auto_order(data, task) if wanted.method == "auto" else (wanted.method,)
    return TrainingPlan(
        methods=tuple(
            _plan_method(name, wanted, data=data, worker=worker, parameters=parameters, max_length=max_length)
            for name in names
        ),
        is_auto=wanted.method == "auto",
        task=task,
        seed=wanted.seed,
        metric=_metric(wanted, task),
        max_seconds=wanted.max_seconds,
        max_length=max_length,
        precision=_precision(wanted, worker),
        dropout=0.0 if wanted.dropout == "auto" else wanted.dropout,
        loss=LOSSES[task][0] if wanted.loss == "auto" else wanted.loss,
        focal_gamma=wanted.focal_gamma,
        optimizer=wanted.optimizer,
        momentum=_momentum(wanted),
        scheduler=wanted.scheduler,
        warmup_ratio=wanted.warmup_ratio,
        layer_decay=wanted.layer_decay,
        gradient_checkpointing=wanted.gradient_checkpointing,
        weight_decay=wanted.weight_decay,
        max_grad_norm=wanted.max_grad_norm,
        class_weights=wanted.class_weights,
        label_smoothing=_label_smoothing(wanted, task),
        unfreeze_layers=wanted.unfreeze_layers,
        lora=wanted.lora,
        bottleneck=wanted.bottleneck,
        prompt=wanted.prompt,
        setfit=wanted.setfit,
        eval_every=wanted.eval_every,
        early_stopping=wanted.early_stopping,
        restore_best=wanted.restore_best,
        refit=wanted.method == "auto" if wanted.refit == "auto" else wanted.refit,
        split=wanted.split.resolved(),
        calibration=wanted.calibration,
        export=wanted.export,
        abstain=wanted.abstain,
        gate=wanted.gate,
        trials=wanted.trials,
        space=_space(wanted, parameters, task),
        pruner=wanted.pruner,
        device=worker.device,
        cpu_threads=worker.cpu_threads,
        processes=_processes(wanted, worker),
    )


def refuse_unavailable(wanted: Hyperparameters, worker: WorkerProfile | None) -> None:
    """Raises `PlanError` for what the worker (None: no worker is known) cannot run."""
    if worker is not None:
        _refuse_processes(wanted, worker)
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


def _label_smoothing(wanted: Hyperparameters, task: Task) -> float:
    if wanted.label_smoothing != "auto":
        return wanted.label_smoothing
    return _LABEL_SMOOTHING if task == "text-classification" else 0.0


def _refuse_processes(wanted: Hyperparameters, worker: WorkerProfile) -> None:
    on_gpu, devices = worker.device.startswith("cuda"), 1 if wanted.devices == "auto" else wanted.devices
    name = "devices" if devices > 1 else "processes"
    if max(devices, wanted.processes) == 1:
        return
    if wanted.method != "auto" and wanted.method not in _STEPPED:
        raise _refusal(name, f"{name} has no effect with method {wanted.method}; leave it out")
    if wanted.loss in EMBEDDING_LOSSES:
        message = f"loss {wanted.loss} compares the rows of a step with each other, so they cannot be shared out"
        raise _refusal(name, f"{message}; leave {name} out, or use another loss")
    if devices > 1 and not on_gpu:
        raise _refusal("devices", f"devices {devices}: the worker trains on {worker.device}; leave devices out")
    if devices > worker.devices:
        raise _refusal(
            "devices", f"devices {devices}: the worker has {worker.devices}; ask for no more, or leave it out"
        )
    if wanted.processes > 1 and on_gpu:
        raise _refusal("processes", "processes is for workers without a GPU; use devices")
    if wanted.processes > worker.cpu_threads:
        message = f"processes {wanted.processes}: the worker has {worker.cpu_threads} threads, and each needs one"
        raise _refusal("processes", f"{message}; ask for no more")


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


def _auto_order(data: DatasetProfile, task: Task) -> tuple[SingleMethod, ...]:
    """Cheapest first."""
    if task != "text-classification" or data.train_rows > FEW_ROWS_PER_CLASS * max(1, data.labels):
        return COST_ORDER
    return tuple(name for known in COST_ORDER for name in ((known, "setfit") if known == "linear_probe" else (known,)))


def _space(wanted: Hyperparameters, parameters: int, task: Task) -> Space:
    """What the search varies: as asked, else around the method's own values."""
    if not wanted.trials or wanted.space or wanted.method == "auto":
        return wanted.space
    rate = _learning_rate(wanted.method, wanted, parameters)
    without = set() if task == "text-classification" else {"label_smoothing"}
    return default_space(wanted.method, rate, given=frozenset(wanted.model_fields_set | without))


def _max_length(wanted: Hyperparameters, data: DatasetProfile) -> int:
    if wanted.max_length != "auto":
        return wanted.max_length
    return max(8, -(-data.max_length_p99 // 8) * 8)


def _precision(wanted: Hyperparameters, worker: WorkerProfile) -> Literal["fp32", "bf16", "fp16"]:
    if wanted.precision == "fp16" and not worker.device.startswith("cuda"):
        raise _refusal("precision", "precision fp16 needs a GPU; use bf16, fp32 or auto")
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
    method: SingleMethod, wanted: Hyperparameters, *, data: DatasetProfile, worker: WorkerProfile, parameters: int,
    max_length: int,
) -> MethodPlan:  # fmt: skip
    batch_size, accumulation = _batch_size(wanted), _accumulation(wanted)
    epochs = 0.0
    if method in _STEPPED:
        epochs = float(_default_epochs(method, data.train_rows) if wanted.epochs == "auto" else wanted.epochs)
    steps_per_epoch = max(1, -(-data.train_rows // (batch_size * accumulation)))
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
            method, data, worker, parameters, max_length, epochs / _processes(wanted, worker), steps
        ),
    )


def _default_epochs(method: SingleMethod, rows: int) -> int:
    """Few rows need more passes: some 280 steps of 32 for full (2 to 10 epochs), 400 for the others (3 to 12)."""
    if method != "full":
        return min(12, max(3, -(-400 * 32 // max(1, rows))))
    return min(10, max(2, -(-280 * 32 // max(1, rows))))


# Below and above `SMALL_PARAMETERS`.
_LEARNING_RATES: dict[str, tuple[float, float]] = {
    "setfit": (3e-5, 2e-5), "ia3": (1e-2, 5e-3), "prompt_tuning": (1e-2, 5e-3), "bottleneck": (1e-3, 5e-4),
    "lora": (5e-4, 2e-4), "qlora": (5e-4, 2e-4), "full": (1e-4, 3e-5),
}  # fmt: skip


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
    method: SingleMethod, data: DatasetProfile, worker: WorkerProfile, parameters: int, max_length: int,
    epochs: float, steps: int,
) -> float:  # fmt: skip
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
