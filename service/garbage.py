"""Keeps full garbage collections short. They hold up every thread, and look at each object that there is.

Imported libraries alone are a million objects, which stay for ever and cost a third of a second each time. What has
survived a long collection is therefore not looked at again, until something large is let go of (`reconsider`): that
looks at all once more, frees what is garbage and leaves the rest alone again. Objects in no cycle are freed as ever.
"""

from __future__ import annotations

import gc
import time
from typing import Any, Literal

LONG_S = 0.02


class _Watch:
    def __init__(self, long_s: float) -> None:
        self._long_s = long_s
        self._started = 0.0

    def __call__(self, phase: Literal["start", "stop"], info: dict[str, Any]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
        elif info["generation"] == 2 and time.perf_counter() - self._started > self._long_s:
            gc.freeze()


def keep_collections_short(long_s: float = LONG_S) -> None:
    """From now on, in this process."""
    gc.callbacks.append(_Watch(long_s))


def reconsider() -> None:
    """Something large was let go of that may hold on to itself: weights that nobody runs any more. Stops all once, for
    as long as a full collection takes."""
    gc.unfreeze()
    gc.collect()
