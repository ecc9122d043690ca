"""Long computations beside requests: in processor time that no other thread wants."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_this_thread = threading.local()


def beside_requests(function: Callable[[], Any], *, are_waiting: bool) -> Any:
    """Return `function()`. If requests are waiting, what it passes to `spare` is computed in spare time."""
    _this_thread.spares = are_waiting
    try:
        return function()
    finally:
        _this_thread.spares = False


def spare(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `function(…)`, within `beside_requests` from a thread that takes only spare time.

    For native code that lets go of the interpreter's lock: a thread that waits for the processor with the lock in its
    hands would hold up all others.
    """
    if not getattr(_this_thread, "spares", False):
        return function(*args, **kwargs)
    with ThreadPoolExecutor(1, "spare-time", initializer=take_spare_time_only) as thread:
        return thread.submit(function, *args, **kwargs).result()


def take_spare_time_only(process: int = 0) -> None:
    """From now on `process`, by default the calling thread, runs when no other thread wants the processor; if the
    system does not allow it, as before. Only privileges lead back."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(process, os.SCHED_IDLE, os.sched_param(0))
