"""What a batch costs: `seconds = fixed_s + per_token_s · padded tokens`. Arithmetic only; knows no engine and no queue.

Two numbers explain an encoder's runs well enough to say how long a queue is, whether a deadline can be met and how much
padding a second run would be worth. They are fitted once from a few measured runs and follow every batch slowly.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Point = tuple[int, float]
"""Padded tokens of a run and the seconds it took."""

_MIN_FIXED_S, _MIN_PER_TOKEN_S = 1e-6, 1e-9  # above 0, so that both can grow again
_ROUNDS = 25
_HUBER = 1.345  # residuals beyond so many deviations count less (Huber 1964)
_NOISE = 0.01  # relative deviation below which points agree
_GAIN = 0.05
_CLIP = 0.5
_SLIP_QUANTILE, _SLIP_STEP, _MAX_SLIP = 0.99, 0.02, 2.0


@dataclass(slots=True)
class CostModel:
    """Starts as a guess, becomes a measurement by `fit`, and follows the batches by `observe`."""

    fixed_s: float = 1e-3
    per_token_s: float = 1e-5
    observations: int = 0

    @classmethod
    def fit(cls, points: Sequence[Point]) -> CostModel:
        """Least squares on relative errors, both terms at least 0, points that disagree with the rest weighted down."""
        weights = [1 / seconds**2 for _, seconds in points]
        for _ in range(_ROUNDS):
            fixed, slope = _line(points, weights)
            errors = [abs(seconds / (fixed + slope * tokens) - 1) for tokens, seconds in points]
            allowed = _HUBER * max(_NOISE, 1.4826 * statistics.median(errors))
            weights = [
                min(1.0, allowed / error if error else 1.0) / seconds**2
                for (_, seconds), error in zip(points, errors, strict=True)
            ]
        return cls(fixed, slope, observations=round(1 / _GAIN))

    def seconds(self, tokens: float) -> float:
        """Of one batch of `tokens` padded tokens."""
        return self.fixed_s + self.per_token_s * tokens

    @property
    def fixed_tokens(self) -> float:
        """The tokens that could be computed in the time that a run costs before its first token."""
        return self.fixed_s / self.per_token_s

    def observe(self, tokens: int, seconds: float) -> None:
        """Follows a measured batch. An error is shared out by what either term contributed to the prediction.

        So small batches correct the fixed part and large ones the slope, neither ever turns negative, and batches of
        one size only, which would leave least squares undetermined, do no harm. A disturbed batch moves a fitted model
        by at most `_GAIN · _CLIP` = 2.5 %; a guess moves further until it has seen as many batches as a fit is worth.
        """
        predicted = self.seconds(tokens)
        self.observations += 1
        gain = max(_GAIN, 1 / self.observations)
        error = seconds / predicted - 1
        if gain == _GAIN:
            error = min(_CLIP, max(-_CLIP, error))
        share = self.fixed_s / predicted
        self.fixed_s = max(_MIN_FIXED_S, self.fixed_s * (1 + gain * error * share))
        self.per_token_s = max(_MIN_PER_TOKEN_S, self.per_token_s * (1 + gain * error * (1 - share)))


class Forecast(NamedTuple):
    """For work that would arrive now, in seconds: when it would start in order of arrival, when at the latest, being
    overtaken by what fits a batch better, and when it would then be done."""

    wait_s: float
    latest_s: float
    done_s: float


class Slippage:
    """How many times as long as forecast the slowest have lately waited: a high quantile, followed step by step.

    Forecasts know nothing of what else uses the processor. A wait that was longer than allowed for raises the factor
    at once, all others let it sink slowly.
    """

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, waited_s: float, forecast_s: float) -> None:
        step = _SLIP_QUANTILE if waited_s > self.factor * forecast_s else _SLIP_QUANTILE - 1
        self.factor = min(_MAX_SLIP, max(1.0, self.factor + _SLIP_STEP * step))


class DrainRate:
    """How fast a queue shrinks: the tokens charged for each useful one, when more waits than one batch holds.

    Padding and a share of each run's fixed cost come on top of the useful tokens, by how batches turn out; that depends
    on the mix of lengths, so it is learned. At first: full batches without padding.
    """

    def __init__(self, cost: CostModel, max_tokens: int) -> None:
        self._useful = float(max_tokens)
        self._charged = max_tokens + cost.fixed_tokens

    def observe(self, *, useful: int, padded: int, fixed_tokens: float) -> None:
        """Follows a batch that had more than itself to choose from."""
        self._useful += _GAIN * (useful - self._useful)
        self._charged += _GAIN * (padded + fixed_tokens - self._charged)

    def seconds(self, useful: float, cost: CostModel) -> float:
        return useful * cost.per_token_s * self._charged / self._useful


def _line(points: Sequence[Point], weights: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the weighted least squares line, neither below its floor."""
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    product = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = product / spread if spread else 0.0
    fixed = mean_y - slope * mean_x
    if fixed < _MIN_FIXED_S:  # the best line through the origin
        squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
        fixed, slope = _MIN_FIXED_S, sum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / squares
    if slope < _MIN_PER_TOKEN_S:
        fixed, slope = max(mean_y, _MIN_FIXED_S), _MIN_PER_TOKEN_S
    return fixed, slope
