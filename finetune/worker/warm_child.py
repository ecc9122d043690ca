"""A training process that waits with its imports done, so that a job does not begin with seconds of them.

It is an ordinary `finetune.worker.child` whose standard input says nothing yet. The worker starts one while it
has no job, never beside a running one, so that a run has the machine's memory to itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

_log = logging.getLogger("finetune.worker.warm_child")
_RETRY_S = 60.0

Environment = dict[str, str]


def child_command(*, model_types: Sequence[str] = (), is_ahead: bool = False) -> list[str]:
    """Starts a training process; `is_ahead` imports what a job of one of these model types will import late."""
    return [
        sys.executable,
        "-m",
        "finetune.worker.child",
        *(["--ahead", *sorted(set(model_types))] if is_ahead else []),
    ]


def start_child(command: Sequence[str], environment: Environment, stderr: IO[str] | int) -> subprocess.Popen[str]:
    """In a session of its own; its job goes to its standard input as a line of JSON."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env=environment,
    )


def end_child(child: subprocess.Popen[str]) -> None:
    """Ends the whole process group and waits until it is really gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def close_pipes(child: subprocess.Popen[str]) -> None:
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


@dataclass
class _Waiting:
    child: subprocess.Popen[str]
    environment: Environment


class SpareChild:
    """At most one waiting process. All calls come from the worker's main thread: a child ends with the thread that
    started it."""

    def __init__(self, command: Sequence[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._command, self._clock = command, clock
        self._waiting: _Waiting | None = None
        self._not_before = float("-inf")

    @property
    def pid(self) -> int | None:
        return None if self._waiting is None else self._waiting.child.pid

    def prepare(self, environment: Environment) -> None:
        """Sees to it that one waits that was started with `environment`; returns at once."""
        if self._waiting is not None and self._waiting.child.poll() is None:
            if self._waiting.environment == environment:
                return
            self.close()
        elif self._waiting is not None:
            # One that dies while it imports would die again and again.
            _log.warning("a waiting training process ended", extra={"action": "spare_ended"})
            self._not_before = self._clock() + _RETRY_S
            self.close()
        if self._clock() < self._not_before:
            return
        try:
            child = start_child(self._command, environment, subprocess.DEVNULL)
        except OSError as error:
            _log.warning("no training process can wait", extra={"action": "spare_failed", "error": str(error)})
            self._not_before = self._clock() + _RETRY_S
            return
        self._waiting = _Waiting(child, environment)

    def take(self, environment: Environment) -> subprocess.Popen[str] | None:
        """The waiting process, which is the caller's from now on; None where none lives that fits."""
        waiting = self._waiting
        if waiting is None or waiting.child.poll() is not None or waiting.environment != environment:
            self.close()
            return None
        self._waiting = None
        return waiting.child

    def close(self) -> None:
        if self._waiting is not None:
            end_child(self._waiting.child)
            close_pipes(self._waiting.child)
            self._waiting = None
