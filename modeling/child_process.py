"""How a process behaves that another one started and speaks to over its pipes; and how to ask one that has limits."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any, Literal

_PR_SET_PDEATHSIG = 1
_ROOT = Path(__file__).resolve().parents[1]
# What native code says before it ends the process because memory is short: Rust's and C++'s allocators, and the loader.
_OUT_OF_MEMORY = (b"memory allocation of", b"bad_alloc", b"memoryerror", b"cannot allocate memory", b"out of memory")
_STDERR_BYTES, _TOLD_CHARACTERS = 1 << 18, 4000  # what is looked at, backtraces included, and what is told

_LOOK_S = 0.2  # how soon a stop is noticed

Cause = Literal["memory", "time", "crash", "stopped"]


def private_stdout() -> IO[str]:
    """Return a stream to the parent that no library's print can disturb: stdout itself now leads to stderr."""
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return sink


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; without this it would train on for hours."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def step_back() -> None:
    """Run at low priority from here on, or lower if it is lower already."""
    os.setpriority(os.PRIO_PROCESS, 0, max(10, os.getpriority(os.PRIO_PROCESS, 0)))


def describe_exit(code: int) -> str:
    """Say what an exit status tells about the end of a process."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
    return f"exit status {code}"


class ChildFailed(Exception):
    """A process gave no answer. `cause` says whether one of its limits ended it, `said` how its stderr ends."""

    def __init__(self, cause: Cause, message: str, *, said: str = "") -> None:
        super().__init__(message)
        self.cause, self.said = cause, said


def ask(
    module: str, request: dict[str, Any], *, timeout_s: float, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Return what `module` answers to `request` in a process of its own, which ends with this one, and when `stop` is
    set. Blocking.

    The module reads one line of JSON from stdin, bounds itself with `limit_self`, and writes its answer as another to
    stdout. Raises `ChildFailed`.
    """
    command = [sys.executable, "-m", module]
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as errors:
        asked.write(json.dumps(request).encode() + b"\n")
        asked.seek(0)
        child = subprocess.Popen(command, cwd=_ROOT, stdin=asked, stdout=subprocess.PIPE, stderr=errors)
        try:
            output = _output(child, timeout_s=timeout_s, stop=stop)
        finally:
            child.kill()
            child.communicate()
        if child.returncode == 0 and (lines := output.splitlines()):
            found: dict[str, Any] = json.loads(lines[-1])
            return found
        raise _failure(child.returncode, errors)


def _output(child: subprocess.Popen[bytes], *, timeout_s: float, stop: threading.Event | None) -> bytes:
    """What it writes until it ends."""
    ends = time.monotonic() + timeout_s
    while True:
        try:
            return child.communicate(timeout=_LOOK_S)[0]
        except subprocess.TimeoutExpired:
            pass
        if stop is not None and stop.is_set():
            raise ChildFailed("stopped", "the process that asked is ending")
        if time.monotonic() > ends:
            raise ChildFailed("time", f"no answer within {timeout_s:g} s")


def _failure(code: int, errors: IO[bytes]) -> ChildFailed:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _STDERR_BYTES))
    said = errors.read()
    # The kernel kills for memory alone, and some code dies of the allocation that it does not get.
    is_memory = code == -signal.SIGKILL or any(words in said.lower() for words in _OUT_OF_MEMORY)
    cause: Cause = "time" if code == -signal.SIGXCPU else "memory" if is_memory else "crash"
    return ChildFailed(cause, describe_exit(code), said=said.decode(errors="replace")[-_TOLD_CHARACTERS:])


def limit_self(*, memory_bytes: int, cpu_s: float, file_bytes: int) -> None:
    """Bound this process for good. `memory_bytes` is what it may have for itself: memory it has in common with others,
    such as code, does not count, nor does address space that it only sets aside."""
    _limit(resource.RLIMIT_DATA, memory_bytes)
    _limit(resource.RLIMIT_CPU, int(cpu_s) + 1)
    _limit(resource.RLIMIT_FSIZE, file_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # if the machine runs out first, the kernel takes this process before its parent
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":  # `python -m modeling.child_process MODULE` runs it at low priority from its imports on
    die_with_parent()
    step_back()
    print("{}", flush=True)  # whatever the parent does to it from here on, it ends with the parent
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
