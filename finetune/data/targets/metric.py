"""A figure that decides: its name, and which way it points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MetricName = Literal[
    "macro_f1", "accuracy", "weighted_f1", "micro_f1", "subset_accuracy", "rmse", "mae", "r2", "entity_f1"
]


@dataclass(frozen=True, slots=True)
class Metric:
    """`is_error`: lower is better. `is_share`: it is between 0 and 1. `title` is its name in a model card."""

    name: MetricName
    title: str = ""
    is_error: bool = False
    is_share: bool = True

    def gain(self, value: float) -> float:
        """Return a number that is larger the better the value is."""
        return -value if self.is_error else value

    def best(self, values: Sequence[float]) -> int:
        """Return the position of the best value, the first of equals."""
        gains = [self.gain(value) for value in values]
        return max(range(len(gains)), key=lambda place: (gains[place], -place))

    def reaches(self, value: float, bar: float) -> bool:
        return self.gain(value) >= self.gain(bar)

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "minimize" if self.is_error else "maximize"
