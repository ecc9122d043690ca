"""How a process behaves that another one started and speaks to over its pipes."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
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


def describe_exit(code: int) -> str:
    """Say what an exit status tells about the end of a process."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
    return f"exit status {code}"


if __name__ == "__main__":  # `python -m modeling.child_process MODULE` runs it at low priority from its imports on
    die_with_parent()
    os.nice(10)
    print("{}", flush=True)  # whatever the parent does to it from here on, it ends with the parent
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
