"""Who is let in. Bounds the work that waits, not the connections: pure arithmetic, called on the event loop."""

from __future__ import annotations

import random

from service.inference.cost import Forecast
from service.inference.errors import DeadlineExceeded, QueueFull

_MIN_RETRY_S = 0.1


class AdmissionController:
    """`max_inputs` admitted at once over all models; `max_queue_delay_s` bounds the forecast wait."""

    def __init__(self, *, max_inputs: int, max_queue_delay_s: float) -> None:
        self._max_inputs = max_inputs
        self._max_queue_delay_s = max_queue_delay_s
        self.inputs = 0

    def admit(self, inputs: int, *, forecast: Forecast, time_left_s: float) -> None:
        """Admits a client's batch as a whole or not at all; whatever was admitted must be released once.

        Raises `QueueFull` with a time to come back, and `DeadlineExceeded` where the answer would come too late: what
        nobody will wait for is not computed.
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


def _jittered(seconds: float) -> float:
    """Spread over 1 to 1.5 times, so that refused clients do not all return at once."""
    return seconds * random.uniform(1.0, 1.5)
