"""What an engine can do in time, and whether there is room for one more request. Arithmetic; knows no engine, no queue.

A batch costs `seconds = fixed_s + per_token_s · padded tokens`. These two numbers explain an encoder's runs well enough
to say how long a queue is, whether a deadline can be met and how much padding a second run would be worth. They are
fitted once from a few measured runs and follow every batch slowly.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modeling.inputs import Example
from service.inference.errors import DeadlineExceeded, QueueFull

Point = tuple[int, float]
"""Padded tokens of a run and the seconds it took."""

_MIN_FIXED_S, _MIN_PER_TOKEN_S = 1e-6, 1e-9  # above 0, so that both can grow again
_ROUNDS = 25
_HUBER = 1.345  # residuals beyond this many deviations count less (Huber 1964)
_NOISE = 0.01  # relative deviation below which points agree
_GAIN = 0.05
_CLIP = 0.5
_SLIP_QUANTILE, _SLIP_STEP, _MAX_SLIP = 0.99, 0.02, 2.0
_STALE_S = 10.0  # an idle engine refuses no request by a forecast that no batch has confirmed for this long
_LONG_WAIT_BATCHES = 4  # shorter waits depend on chance too much to measure forecasts by
_MIN_RETRY_S = 0.1

# Batches are packed from the tokens of this many batches. More to choose from means less padding, and older entries
# are overtaken more often (docs/log.md).
WINDOW_BATCHES = 8


class Forecast(NamedTuple):
    """For work that would arrive now, in seconds: when it would start in order of arrival, when at the latest, being
    overtaken by what fits a batch better, and when it would then be done."""

    wait_s: float
    latest_s: float
    done_s: float


class AdmissionController:
    """`max_inputs` admitted at once over all models; `max_queue_delay_s` bounds the forecast wait."""

    def __init__(self, *, max_inputs: int, max_queue_delay_s: float) -> None:
        self._max_inputs = max_inputs
        self._max_queue_delay_s = max_queue_delay_s
        self.inputs = 0

    def admit(self, inputs: int, *, forecast: Forecast, time_left_s: float) -> None:
        """Admits a client's batch as a whole or not at all; whatever was admitted must be released once.

        Raises `QueueFull` with a time to come back, and `DeadlineExceeded` where the answer would come too late: what
        no client will wait for is not computed.
        """
        self._refuse_if_full(inputs, forecast)
        if time_left_s <= 0 or forecast.done_s > time_left_s:
            raise DeadlineExceeded(
                f"the answer would take {forecast.done_s * 1000:.0f} ms, more than the {time_left_s * 1000:.0f} ms left"
            )
        self.inputs += inputs

    def _refuse_if_full(self, inputs: int, forecast: Forecast) -> None:
        if self.inputs + inputs > self._max_inputs and self.inputs > 0:
            raise QueueFull(
                f"the server is at capacity: {self.inputs} of {self._max_inputs} inputs are in flight; retry later",
                reason="queue_full",
                retry_after_s=_jittered(max(forecast.wait_s, _MIN_RETRY_S)),
            )
        if forecast.latest_s > self._max_queue_delay_s:
            raise QueueFull(
                f"this request could wait {forecast.latest_s:.1f} s for the engine, "
                f"the limit is {self._max_queue_delay_s:.1f} s; retry later",
                reason="token_budget",
                retry_after_s=_jittered(forecast.latest_s - self._max_queue_delay_s + _MIN_RETRY_S),
            )

    def release(self, inputs: int) -> None:
        self.inputs -= inputs


class LoadModel:
    """Predicts when work will start and end on one engine, from what its batches have cost so far.

    `max_tokens` is what one batch holds, padding included.
    """

    def __init__(self, cost: CostModel, max_tokens: int) -> None:
        self._slippage = Slippage()
        self.calibrate(cost, max_tokens, now=-math.inf)

    def calibrate(self, cost: CostModel, max_tokens: int, *, now: float) -> None:
        """Replaces the cost and the size of a batch, by a measurement."""
        self.cost, self.max_tokens = cost, max_tokens
        self._drain = DrainRate(cost, max_tokens)
        self._confirmed_at = now

    @property
    def window_s(self) -> float:
        """How much later than in order of arrival an entry may start, so that batches fit better."""
        return WINDOW_BATCHES * self.cost.seconds(self.max_tokens)

    @property
    def long_wait_s(self) -> float:
        """Waits forecast longer than this tell how reliable forecasts are."""
        return _LONG_WAIT_BATCHES * self.cost.seconds(self.max_tokens)

    def start(self, ahead: int, *, running_s: float) -> Forecast:
        """When work behind `ahead` tokens would start, with `running_s` left of the run in progress. By cost alone."""
        ahead_s = self._drain.seconds(ahead, self.cost)
        latest_s = running_s + ahead_s + min(ahead_s, self.window_s)
        return Forecast(wait_s=running_s + ahead_s, latest_s=latest_s, done_s=latest_s)

    def forecast(self, tokens: int, ahead: int, *, running_s: float, now: float) -> Forecast:
        """When `tokens` would start behind `ahead` and when they would be done, corrected by how wrong such forecasts
        have lately been."""
        start = self.start(ahead, running_s=running_s)
        if not start.latest_s and now - self._confirmed_at > _STALE_S:
            return start
        latest_s = start.latest_s * self._slippage.factor
        own_s = self._drain.seconds(tokens, self.cost) + self.cost.fixed_s
        return Forecast(start.wait_s, latest_s, done_s=latest_s + own_s)

    def observe(
        self,
        *,
        useful: int,
        padded: int,
        seconds: float,
        is_saturated: bool,
        waits: Iterable[tuple[float, float]],
        now: float,
    ) -> None:
        """Follows a batch without failures. `waits` are those of its requests above `long_wait_s`: seconds waited,
        seconds forecast. `is_saturated`: more was waiting than the batch could hold."""
        self.cost.observe(padded, seconds)
        self._confirmed_at = now
        slowest = max(waits, key=lambda wait: wait[0] / wait[1], default=None)
        if slowest is not None:
            self._slippage.observe(*slowest)
        if is_saturated:
            self._drain.observe(useful=useful, padded=padded, fixed_tokens=self.cost.fixed_tokens)


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


class CostEstimate:
    """Costs from sizes, before preprocessing: follows what the lane's preprocessor makes of the examples that come."""

    def __init__(self, size: Callable[[Example], int], size_per_unit: float = 4.0) -> None:
        self.size, self._size_per_unit = size, size_per_unit

    def cost(self, examples: Sequence[Example], limit: int) -> int:
        """Of all examples, each at most `limit`."""
        rate = self._size_per_unit
        return sum([min(limit, 2 + int(self.size(item) / rate)) for item in examples])

    def observe(self, item: Example, cost: int, limit: int) -> None:
        """Follow one preprocessed example; one that was cut says nothing."""
        if cost < limit:
            self._size_per_unit += 0.02 * (max(0.5, self.size(item) / cost) - self._size_per_unit)


def _jittered(seconds: float) -> float:
    """Spread over 1 to 1.5 times, so that refused clients do not all return at once."""
    return seconds * random.uniform(1.0, 1.5)


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
