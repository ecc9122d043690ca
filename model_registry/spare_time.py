"""Long computations beside requests: in processor time that no other thread wants."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_PATIENCE_S = 3.0
_this_thread = threading.local()


def beside_requests(function: Callable[[], Any], *, are_waiting: bool) -> Any:
    """Return `function()`. If requests are waiting, what it passes to `spare` is computed in spare time."""
    _this_thread.spares = are_waiting
    try:
        return function()
    finally:
        _this_thread.spares = False


def spare(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `function(…)`, within `beside_requests` from a thread that takes only spare time. If there is too little,
    the caller's thread computes it anew.

    For native code that lets go of the interpreter's lock, since a thread that waits for the processor while it holds
    the lock would hold up all others; and that starts no threads to stay, since they would inherit the class.
    """
    if not getattr(_this_thread, "spares", False):
        return function(*args, **kwargs)
    thread = ThreadPoolExecutor(1, "spare-time", initializer=take_spare_time_only)
    try:
        return thread.submit(function, *args, **kwargs).result(_PATIENCE_S)
    except TimeoutError:
        return function(*args, **kwargs)
    finally:
        thread.shutdown(wait=False)


def take_spare_time_only(process: int = 0) -> None:
    """From now on `process`, by default the calling thread, runs when no other thread wants the processor; if the
    system does not allow it, as before. Only privileges lead back."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(process, os.SCHED_IDLE, os.sched_param(0))
