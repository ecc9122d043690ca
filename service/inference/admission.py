"""Who is let in. Bounds the work that waits, not the connections: pure arithmetic, called on the event loop."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

from service.inference.errors import QueueFull

_MIN_RETRY_S = 0.1


class AdmissionController:
    """`max_inputs` admitted at once over all models; `max_queue_delay_s` bounds the predicted wait."""

    def __init__(self, *, max_inputs: int, max_queue_delay_s: float) -> None:
        self._max_inputs = max_inputs
        self._max_queue_delay_s = max_queue_delay_s
        self.inputs = 0

    @contextlib.contextmanager
    def reserve(self, inputs: int, *, predicted_wait_s: float) -> Iterator[None]:
        """Admits a client's batch as a whole or not at all. Raises `QueueFull` with a time to come back."""
        if self.inputs + inputs > self._max_inputs and self.inputs > 0:
            raise QueueFull(
                f"{self.inputs} inputs are being worked on, the limit is {self._max_inputs}; come back later",
                reason="queue_full",
                retry_after_s=_jittered(max(predicted_wait_s, _MIN_RETRY_S)),
            )
        if predicted_wait_s > self._max_queue_delay_s:
            raise QueueFull(
                f"the work waiting would take {predicted_wait_s:.1f} s before this request starts, "
                f"more than {self._max_queue_delay_s:.1f} s; come back later",
                reason="token_budget",
                retry_after_s=_jittered(predicted_wait_s - self._max_queue_delay_s + _MIN_RETRY_S),
            )
        self.inputs += inputs
        try:
            yield
        finally:
            self.inputs -= inputs


def _jittered(seconds: float) -> float:
    """Spread over 1 to 1.5 times, so that refused clients do not all return at once."""
    return seconds * random.uniform(1.0, 1.5)
