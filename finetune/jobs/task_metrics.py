"""The figures that decide: by name, which way they point, and which belong to a task. Pure, torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model_registry.manifest import Task

MetricName = Literal["macro_f1", "accuracy", "weighted_f1", "micro_f1", "subset_accuracy", "rmse", "mae", "r2"]


@dataclass(frozen=True, slots=True)
class Metric:
    """`is_error`: lower is better. `is_share`: it lies between 0 and 1."""

    name: MetricName
    is_error: bool = False
    is_share: bool = True

    def gain(self, value: float) -> float:
        """A number that is larger the better the value is."""
        return -value if self.is_error else value

    def best(self, values: Sequence[float]) -> int:
        """The position of the best value, the first of equals."""
        gains = [self.gain(value) for value in values]
        return max(range(len(gains)), key=lambda place: (gains[place], -place))

    def reaches(self, value: float, bar: float) -> bool:
        return self.gain(value) >= self.gain(bar)

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "minimize" if self.is_error else "maximize"


# The first is what auto becomes.
METRICS: dict[Task, tuple[Metric, ...]] = {
    "text-classification": (Metric("macro_f1"), Metric("accuracy"), Metric("weighted_f1")),
    "text-multi-label": (Metric("micro_f1"), Metric("macro_f1"), Metric("subset_accuracy")),
    "text-regression": (
        Metric("rmse", is_error=True, is_share=False),
        Metric("mae", is_error=True, is_share=False),
        Metric("r2", is_share=False),
    ),
}
_BY_NAME: dict[str, Metric] = {metric.name: metric for metrics in METRICS.values() for metric in metrics}


def metric_of(name: str) -> Metric:
    """Raises `KeyError`."""
    return _BY_NAME[name]
