"""Processes under measurement. Each leads a group of its own, so that it is paused and ended with all its children."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Process:
    """A running group of processes that writes to `log`."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, folder: Path = ROOT
    ) -> None:
        self.command, self.log = list(command), log
        # Set for this process alone (see __main__): what is measured gets the environment its user would have.
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                self.command,
                env=inherited | dict(environment or {}),
                cwd=folder,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def pause(self) -> None:
        """Takes no processor time until resumed; connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Resumed for the length of the block."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def stop(self, *, grace_s: float = 30.0) -> None:
        self.resume()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self._signal(signal.SIGKILL)  # children that outlived the first
        self._process.wait()

    def cpu_seconds(self) -> float:
        """Processor time of the group's living processes."""
        return sum(ticks for group, ticks in _groups_and_ticks() if group == self._process.pid) / _TICKS_PER_S

    def wait_until_idle(self, *, quiet_s: float = 3.0, share: float = 0.25, timeout_s: float = 600.0) -> None:
        """Returns once the group has used less than `share` of one processor for `quiet_s`.

        Servers compile, measure and warm up in the background after their first answer. Some poll for ever: LitServe
        takes an eighth of a processor without any request.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            before = self.cpu_seconds()
            time.sleep(quiet_s)
            if 0 <= self.cpu_seconds() - before < share * quiet_s:  # less than before: a child has ended
                return
        raise SystemExit(f"{self.command[0]} was still busy after {timeout_s:.0f} s without any request")

    def tail(self, characters: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _groups_and_ticks() -> Iterator[tuple[int, int]]:
    """Process group and processor time of every process, by proc(5)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            yield int(fields[2]), int(fields[11]) + int(fields[12])
