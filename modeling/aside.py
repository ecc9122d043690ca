"""What a process does that works beside a server: it takes what the server leaves, and ends when its stdin does."""

from __future__ import annotations

import contextlib
import os
import threading


def step_aside(niceness: int) -> None:
    """Call it once what stands on stdin has been read: the server holds it open for as long as it wants the result."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(niceness)


def _end_with_stdin() -> None:
    while os.read(0, 1024):  # not sys.stdin: its lock would be held for ever
        pass
    os._exit(1)
