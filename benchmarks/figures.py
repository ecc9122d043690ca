"""The arithmetic of figures: percentiles, medians with their spread, ratios of one round. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several rounds, with the smallest and the largest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed (nearest rank); None where there are none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Round by round: both were measured one after the other, so what slowed a round slowed both."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def shown(value: float | None, digits: int = 1) -> str:
    """For people: thousands apart, a dash where there is nothing."""
    return "–" if value is None else f"{value:,.{digits}f}"
