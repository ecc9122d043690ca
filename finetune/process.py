"""How a process behaves that another one started and speaks to over its pipes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import IO

_PR_SET_PDEATHSIG = 1


def private_stdout() -> IO[str]:
    """A stream to the parent that no library's print can disturb: stdout itself now leads to stderr."""
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return sink


def die_with_parent() -> None:
    """A child whose parent is gone has nobody to report to; without this it would train on for hours."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
