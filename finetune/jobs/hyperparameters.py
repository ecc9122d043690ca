"""What may be asked of a fine-tune: the contract's flat list, and why a value is refused. Pure, torch-free."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic import Field, ValidationError, model_validator

from finetune.data.options import FrozenModel, RareClasses, SplitOptions, modality_of
from finetune.data.targets import MetricName, metric_of, target_type
from finetune.jobs.search_space import (
    FIXED,
    MOST_CHOICES,
    Choices,
    Range,
    Space,
    SpaceField,
    nested,
    samples,
    with_values,
)

SingleMethod = Literal["baseline", "linear_probe", "setfit", "prompt_tuning", "bottleneck", "lora", "qlora", "full"]
Method = Literal["auto"] | SingleMethod
Optimizer = Literal["adamw", "adam", "sgd", "rmsprop", "adafactor"]
Scheduler = Literal["cosine", "linear", "constant", "plateau", "cyclic"]
Loss = Literal["cross_entropy", "bce", "mse", "huber", "focal", "contrastive", "triplet", "mnrl", "cosent"]
# They compare the vectors of a pass's rows with each other, so a pass is never divided.
EMBEDDING_LOSSES: frozenset[str] = frozenset({"contrastive", "triplet", "mnrl", "cosent"})
# In the contract but not built yet: refused by name, so that no caller believes that they took effect.
NOT_YET = {"augment"}
# Methods of earlier releases, and what to use instead.
REMOVED_METHODS = {"ia3": "lora or bottleneck"}
_NOT_SEARCHED = frozenset({"auto", "baseline", "linear_probe"})  # several methods, or ones without steps


# Of hyperparameters that are a number or a word.
BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "epochs": (0.01, 1000),
    "learning_rate": (1e-7, 1.0),
    "batch_size": (1, 4096),
    "gradient_accumulation": (1, 1024),
    "dropout": (0.0, 0.9),
    "max_length": (8, 8192),
    "label_smoothing": (0.0, 0.9),
    "unfreeze_layers": (1, 1000),
    "momentum": (0.0, 0.999),
    "devices": (1, 64),
}


class PlanError(Exception):
    """A hyperparameter that is unknown, out of bounds or not available. `errors` names each with its place."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__("; ".join(error["message"] for error in errors))
        self.errors = errors


class LoraOptions(FrozenModel):
    r: int = Field(16, ge=1, le=256)
    alpha: int = Field(32, ge=1, le=4096)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear", "attention"] = "all-linear"
    rslora: bool = False
    dora: bool = False


class BottleneckOptions(FrozenModel):
    size: int = Field(64, ge=1, le=4096)


class PromptOptions(FrozenModel):
    tokens: int = Field(16, ge=1, le=256)


class SetFitOptions(FrozenModel):
    max_pairs: int = Field(4_000, ge=1, le=10_000_000)


class EarlyStopping(FrozenModel):
    patience: int = Field(3, ge=1, le=1000)
    min_delta: float = Field(0.0, ge=0)


class GateOptions(FrozenModel):
    """What a version must show to take the champion's place (`promote: if_better`)."""

    min_metric: float | None = Field(None, allow_inf_nan=False)
    max_class_drop: float = Field(0.05, ge=0, le=1)
    p_value: float = Field(0.05, gt=0, le=1)


class AbstainOptions(FrozenModel):
    """The accuracy that answers above the abstention threshold should reach."""

    target_accuracy: float | None = Field(None, gt=0, le=1)


class TrainingOptions(FrozenModel):
    """What a plan takes over from the request: `resolve` replaces `split` and `space`, and leaves the others alone."""

    max_seconds: float | None = Field(None, gt=0, le=7 * 86_400)
    seed: int = Field(42, ge=0, lt=1 << 31)

    optimizer: Optimizer = "adamw"
    scheduler: Scheduler = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1)
    gradient_checkpointing: bool = False

    focal_gamma: float = Field(2.0, ge=0, le=10)
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    oversample: bool = False
    rare_classes: Literal["keep", "drop", "other"] = "keep"
    min_rows_per_class: int = Field(3, ge=1, le=1000)

    unfreeze_layers: Literal["all"] | int = "all"
    lora: LoraOptions = LoraOptions()
    bottleneck: BottleneckOptions = BottleneckOptions()
    prompt: PromptOptions = PromptOptions()
    setfit: SetFitOptions = SetFitOptions()
    eval_every: float = Field(0.5, gt=0, le=100)
    early_stopping: EarlyStopping = EarlyStopping()
    restore_best: bool = True
    split: SplitOptions = SplitOptions()
    calibration: Literal["temperature", "none"] = "temperature"
    export: list[Literal["onnx"]] = Field(["onnx"], max_length=1)
    abstain: AbstainOptions = AbstainOptions()
    gate: GateOptions = GateOptions()

    trials: int = Field(0, ge=0, le=1000)
    space: Space = SpaceField
    pruner: Literal["asha", "none"] = "asha"

    @property
    def rare(self) -> RareClasses:
        return RareClasses(policy=self.rare_classes, least=self.min_rows_per_class)


class Hyperparameters(TrainingOptions):
    """The contract's names and defaults; `auto` is resolved by `resolve`."""

    method: Method = "auto"
    epochs: Literal["auto"] | float = Field("auto")
    learning_rate: Literal["auto"] | float = Field("auto")
    batch_size: Literal["auto"] | int = Field("auto")
    momentum: Literal["auto"] | float = Field("auto")
    gradient_accumulation: Literal["auto"] | int = Field("auto")
    devices: Literal["auto"] | int = Field("auto")
    processes: int = Field(1, ge=1, le=64)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    loss: Literal["auto"] | Loss = "auto"
    label_smoothing: Literal["auto"] | float = Field("auto")
    dropout: Literal["auto"] | float = Field("auto")
    metric: Literal["auto"] | MetricName = "auto"
    refit: Literal["auto"] | bool = "auto"
    max_length: Literal["auto"] | int = Field("auto")

    def metric_for(self, task: str) -> MetricName:
        return target_type(task).metrics[0].name if self.metric == "auto" else self.metric

    @model_validator(mode="after")
    def _numbers_in_bounds(self) -> Hyperparameters:
        for name, (low, high) in BOUNDS.items():
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
        if self.oversample and self.class_weights != "none":
            raise ValueError("oversample and class_weights both make rare classes count for more; use one of them")
        if "focal_gamma" in self.model_fields_set and self.loss != "focal":
            raise ValueError(f"focal_gamma has no effect with loss {self.loss}; use loss focal")
        return self


NESTED: Final[Mapping[str, type[FrozenModel]]] = {
    name: type(field.default)
    for name, field in Hyperparameters.model_fields.items()
    if isinstance(field.default, FrozenModel)
}
NAMES: Final = (
    *Hyperparameters.model_fields,
    *(f"{name}.{inner}" for name, model in NESTED.items() for inner in model.model_fields),
)
# What other libraries call them.
OTHER_NAMES: Final[Mapping[str, str]] = {
    "lr": "learning_rate",
    "base_lr": "learning_rate",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_epochs": "epochs",
    "bs": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "optim": "optimizer",
    "lr_scheduler": "scheduler",
    "lr_scheduler_type": "scheduler",
    "warmup": "warmup_ratio",
    "warmup_steps": "warmup_ratio",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "clip_norm": "max_grad_norm",
    "random_state": "seed",
    "random_seed": "seed",
    "time_limit": "max_seconds",
    "max_time": "max_seconds",
    "timeout": "max_seconds",
    "max_runtime_secs": "max_seconds",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "early_stopping_patience": "early_stopping.patience",
    "eval_steps": "eval_every",
    "test_size": "split.test",
    "validation_split": "split.validation",
    "val_size": "split.validation",
    "class_weight": "class_weights",
    "n_trials": "trials",
    "model": "method",
    "algorithm": "method",
}
_NEAR = 0.6  # of difflib, from which a name is taken for a misspelt one
_SHOWN_CHARS = 60


def parse_hyperparameters(values: Mapping[str, Any]) -> Hyperparameters:
    """Read hyperparameters as a request has them; `lora.r` means `r` of `lora`.

    Raises `PlanError`, which says of each what it must be, and names the nearest known one for an unknown one.
    """
    errors = [error for name in values for error in _misnamed(name, values)]
    method = values.get("method")
    if isinstance(method, str) and method in REMOVED_METHODS:
        errors.append(_fault(["method"], f"method {method} was removed; use {REMOVED_METHODS[method]}"))
    if errors:
        raise PlanError(errors)
    values = nested(values)
    try:
        wanted = Hyperparameters.model_validate(values)
    except ValidationError as error:
        raise PlanError(list(_faults(error.errors(include_url=False), values))) from error
    errors = list(_search_errors(wanted, values))
    if errors:
        raise PlanError(errors)
    return wanted


def _fault(place: Sequence[str], message: str) -> dict[str, Any]:
    return {"loc": ["hyperparameters", *place], "message": message}


def _misnamed(name: str, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What is wrong with the name of a hyperparameter."""
    head, dot, inner = name.partition(".")
    if name in NOT_YET:
        yield _fault([name], f"{name} is not available yet; leave it out")
    elif name not in Hyperparameters.model_fields and not (dot and head in NESTED):
        yield _fault([name], f"unknown hyperparameter {name[:60]!r}; {advice(name)}")
    elif dot and head in values and not isinstance(values[head], Mapping):
        yield _fault([name], f"{name} and {head} are both given, and {head} is no object; give one of them")
    elif dot and values.get(head, {}).get(inner, values[name]) != values[name]:
        yield _fault([name], f"{name} is given twice, with two values; give one")


def _faults(errors: Iterable[Any], values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One sentence for each hyperparameter that does not fit, whatever alternatives it was tried as."""
    told = set()
    for item in errors:
        path = _path(item["loc"])
        if path in told:
            continue
        told.add(path)
        name = ".".join(path)
        if item["type"] == "extra_forbidden":
            yield _fault(path, f"unknown hyperparameter {name[:60]!r}; {advice(name)}")
        elif item["type"] == "value_error":
            yield _fault(path, (f"{name}: " if path else "") + item["msg"].removeprefix("Value error, "))
        else:
            yield _fault(path, f"{name} must be {expected(path)}, not {_shown(path, values)}")


def _path(place: Sequence[str | int]) -> tuple[str, ...]:
    """The hyperparameter that an error is about: the rest of its place are the types that were tried."""
    names = [str(part) for part in place]
    if len(names) > 1 and (names[0] in NESTED or names[0] == "space"):
        return names[0], names[1][:60]
    return tuple(names[:1])


def _shown(path: Sequence[str], values: Mapping[str, Any]) -> str:
    """What was given there, as JSON."""
    value: Any = values
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else value
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def expected(path: Sequence[str]) -> str:
    """What a hyperparameter must be, in words."""
    if path[0] == "space":
        return 'a range such as {"low": 1e-5, "high": 1e-3, "log": true}, or a list of choices'
    model, name = (NESTED[path[0]], path[1]) if len(path) > 1 else (Hyperparameters, path[0])
    field = model.model_fields[name]
    return _words(field.annotation, field.metadata, BOUNDS.get(name))


def _words(kind: Any, metadata: Sequence[Any], bounds: tuple[float, float] | None) -> str:
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return ("one of " if len(options) > 2 else "") + (", " if len(options) > 2 else " or ").join(map(str, options))
    if get_origin(kind) in {Union, UnionType}:
        return " or ".join(_words(option, metadata, bounds) for option in options)
    if get_origin(kind) is list:
        return f"a list of {_words(options[0], (), None)}"
    if kind in {int, float}:
        return _bounded(kind, metadata, bounds)
    if isinstance(kind, type) and issubclass(kind, FrozenModel):
        return f"an object with {', '.join(kind.model_fields)}"
    return {bool: "true or false", str: "a text", NoneType: "null"}.get(kind, "an object of names and numbers")


def _bounded(kind: type, metadata: Sequence[Any], bounds: tuple[float, float] | None) -> str:
    found = {name: getattr(one, name) for one in metadata for name in ("ge", "gt", "le", "lt") if hasattr(one, name)}
    if kind is int and "lt" in found:
        found["le"] = found.pop("lt") - 1
    low, high = bounds or (found.get("ge"), found.get("le"))
    least = f" above {found['gt']:.10g}" if "gt" in found else "" if low is None else f" from {low:.10g}"
    most = f" below {found['lt']:.10g}" if "lt" in found else "" if high is None else f" to {high:.10g}"
    return f"{'a whole number' if kind is int else 'a number'}{least}{' and' if least and 'lt' in found else ''}{most}"


def advice(name: str) -> str:
    """The known hyperparameter that was probably meant, or all of them."""
    plain = name.lower().replace("-", "_")
    head, dot, inner = plain.partition(".")
    known = [one for one in NAMES if one.startswith(f"{head}.")] if dot and head in NESTED else list(NAMES)
    meant = OTHER_NAMES.get(plain) or (OTHER_NAMES.get(inner) if dot else None)
    if meant is None and plain in {one.rpartition(".")[2] for one in known}:
        meant = next(one for one in known if one.rpartition(".")[2] == plain)
    if meant is None:
        near = difflib.get_close_matches(plain, known, n=1, cutoff=_NEAR)
        meant = near[0] if near else None
    return f"did you mean {meant}?" if meant else f"known are {', '.join(sorted(known))}"


def check_labels(wanted: Hyperparameters, labels: Collection[str]) -> None:
    """Raises `PlanError` for a weight on a label that the data does not have: a misspelling would do nothing."""
    unknown = sorted(set(wanted.class_weights) - set(labels)) if isinstance(wanted.class_weights, dict) else []
    if unknown:
        known = ", ".join(sorted(labels))[:300]
        message = f"class_weights names the label {unknown[0][:100]!r}, which the data does not have; it has {known}"
        raise PlanError([_fault(["class_weights"], message)])


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


def check_task(wanted: Hyperparameters, task: str) -> None:
    """Raises `PlanError` for what makes no sense with a task."""
    target = target_type(task)
    metrics = [metric.name for metric in target.metrics]
    for name, value, fitting in (
        ("loss", wanted.loss, target.losses),
        ("metric", wanted.metric, metrics),
        ("method", wanted.method, target.methods),
    ):
        if fitting is not None and value != "auto" and value not in fitting:
            options = ", ".join(fitting if name != "method" else sorted(fitting))
            raise refusal(name, f"{name} {value} does not fit {task}; use one of {options}")
    modality = modality_of(task)
    if wanted.method == "baseline" and not modality.has_baseline:
        raise refusal("method", f"there is no baseline for {modality.plural}; use auto or linear_probe")
    least, metric = wanted.gate.min_metric, metric_of(wanted.metric_for(task))
    if least is not None and metric.is_share and not 0 <= least <= 1:
        raise refusal("gate", f"gate.min_metric must be from 0 to 1 for {metric.name}")
    for name, why in target.refuses.items():
        if _is_asked_for(wanted, name):
            raise refusal(name, why)


def _is_asked_for(wanted: Hyperparameters, name: str) -> bool:
    value = getattr(wanted, name)
    return bool(value != type(wanted).model_fields[name].default and value not in (0, False))


def refusal(name: str, message: str) -> PlanError:
    return PlanError([{"loc": ["hyperparameters", name], "message": message}])
