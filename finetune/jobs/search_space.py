"""What a search may vary: ranges and choices by the name of the hyperparameter. Torch-free, no Optuna.

Nested names are written with a dot, `lora.r`. What cannot be compared between trials (the metric, the
split, the seed) or has nothing to do with training is not open to search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Scalar = str | int | float | bool | None
MOST_CHOICES = 100
FIXED = frozenset(
    "method task seed max_seconds metric eval_every restore_best refit split rare_classes min_rows_per_class "
    "max_length calibration abstain gate trials space pruner devices processes".split()
)


class Range(BaseModel):
    """Numbers from `low` to `high`, both included; with `log` spread evenly over their logarithms."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not self.low < self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("log needs a low above 0")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high


Choices = list[Scalar]
Space = dict[str, Range | Choices]
SpaceField: Any = Field({}, max_length=20)


def default_space(method: str, learning_rate: float, *, given: frozenset[str]) -> Space:
    """A fourfold range around the method's own rate, and what else usually matters; nothing that was `given`."""
    space: Space = {
        "learning_rate": Range(low=learning_rate / 4, high=learning_rate * 4, log=True),
        "batch_size": [16, 32, 64],
        "label_smoothing": [0.0, 0.05, 0.1],
    }
    if method == "lora":
        space["lora.r"] = [8, 16, 32]
    return {name: spec for name, spec in space.items() if name.partition(".")[0] not in given}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters with dotted names put into their object: `lora.r` is `r` of `lora`."""
    return with_values({name: value for name, value in values.items() if "." not in name}, _dotted(values))


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if "." in name}


def with_values(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as a request has them, with the chosen ones put in; dotted names go into their object."""
    merged = nested(values) if _dotted(values) else dict(values)
    for name, value in chosen.items():
        head, _, inner = name.partition(".")
        merged[head] = {**dict(merged.get(head) or {}), inner: value} if inner else value
    return merged


def samples(spec: Range | Choices) -> Sequence[Scalar]:
    """Values whose validity shows that of all: the choices, or the ends of a range."""
    return list(spec.ends) if isinstance(spec, Range) else spec
