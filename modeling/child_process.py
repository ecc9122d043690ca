"""How a process behaves that another one started and speaks to over its pipes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from typing import IO

_PR_SET_PDEATHSIG = 1


def private_stdout() -> IO[str]:
    """Return a stream to the parent that no library's print can disturb: stdout itself now leads to stderr."""
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return sink


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; without this it would train on for hours."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_in_background(niceness: int, *, is_idle: bool = False) -> None:
    """Lower this process's priority and exit when stdin closes. `is_idle` leaves it what no other process wants.

    Call it once stdin has been read: the parent holds it open for as long as it wants the result.
    """
    threading.Thread(target=_exit_with_stdin, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(niceness)
    if is_idle and sys.platform == "linux":
        with contextlib.suppress(OSError):  # a container may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def describe_exit(code: int) -> str:
    """Say what an exit status tells about the end of a process."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
    return f"exit status {code}"


def _exit_with_stdin() -> None:
    while os.read(0, 1024):  # not sys.stdin: its lock would be held forever
        pass
    os._exit(1)
