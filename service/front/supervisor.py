"""Keeps the front ends running: start, restart with back-off, drain, end. Knows processes and pipes, no HTTP.

A front end reads its configuration and then words from its standard input, and ends when that closes, so none outlives
the engine process. What it says stands on its standard output, a word a line.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

_log = logging.getLogger("service.front")
COMMAND: Final = (sys.executable, "-m", "service.front")

DRAIN: Final = "drain"
"""To a front end: serve as ever, but close connections after their answers."""
REFUSE: Final = "refuse"
"""To a front end: refuse new requests, and end when those in flight are answered."""
LISTENING: Final = "listening"
"""From a front end: it takes connections."""


class Gauge(Protocol):
    def set(self, value: float, /) -> None: ...


class Counter(Protocol):
    def inc(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RestartTimes:
    """All in seconds."""

    first_delay_s: float = 0.1
    longest_delay_s: float = 30.0
    steady_s: float = 60.0
    """A front end that ran for so long starts again at `first_delay_s`."""
    stop_s: float = 3.0
    """From the end of its input until it is killed."""


def restart_delay_s(deaths: int, times: RestartTimes) -> float:
    """Before the restart after so many deaths in a row: doubles from `first_delay_s`, up to `longest_delay_s`."""
    return float(min(times.longest_delay_s, times.first_delay_s * 2 ** min(deaths - 1, 32)))


@dataclass(slots=True)
class _FrontEnd:
    number: int
    process: Process | None = None
    is_listening: bool = False
    has_listened: bool = False


class FrontEnds:
    """`count` front ends under one configuration, a JSON document in one line."""

    def __init__(
        self,
        count: int,
        configuration: bytes,
        *,
        environment: Mapping[str, str],
        listening: Gauge,
        restarts: Counter,
        times: RestartTimes | None = None,
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        self._configuration, self._environment, self._command = configuration, dict(environment), command
        self._listening, self._restarts = listening, restarts
        self._times = times or RestartTimes()
        self._front_ends = [_FrontEnd(number) for number in range(1, count + 1)]
        self._words: list[str] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Starts them; at the end of the block all have ended."""
        keepers = [asyncio.create_task(self._keep(front_end)) for front_end in self._front_ends]
        try:
            yield
        finally:
            self._tell(REFUSE)  # so that none is started again
            for front_end, keeper in zip(self._front_ends, keepers, strict=True):
                if front_end.process is None:
                    keeper.cancel()  # it waits before a restart
                elif front_end.process.stdin is not None:
                    front_end.process.stdin.close()
            _, late = await asyncio.wait(keepers, timeout=self._times.stop_s)
            for keeper in late:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    def have_listened(self) -> bool:
        """Whether every one has taken connections once. What happens to one later does not stop the others."""
        return all(front_end.has_listened for front_end in self._front_ends)

    def drain(self) -> None:
        self._tell(DRAIN)

    def refuse(self) -> None:
        self._tell(REFUSE)

    def have_ended(self) -> bool:
        return all(front_end.process is None for front_end in self._front_ends)

    def _tell(self, word: str) -> None:
        if word in self._words:
            return
        self._words.append(word)
        for front_end in self._front_ends:
            if front_end.process is not None:
                _write(front_end.process, word)

    async def _keep(self, front_end: _FrontEnd) -> None:
        deaths = 0
        while REFUSE not in self._words:
            started = time.monotonic()
            try:
                status: int | str = await self._run(front_end)
            except (OSError, ValueError) as error:  # no memory, no process numbers, or a line without an end
                status = str(error)
            if REFUSE in self._words:
                return
            deaths = 1 if time.monotonic() - started > self._times.steady_s else deaths + 1
            delay_s = restart_delay_s(deaths, self._times)
            _log.error(
                f"front end {front_end.number} ended with {status}; starting it again in {delay_s:g} s",
                extra={"action": "front_end_restart"},
            )
            await asyncio.sleep(delay_s)
            self._restarts.inc()

    async def _run(self, front_end: _FrontEnd) -> int:
        """One life of a front end; its exit code."""
        process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, env=self._environment)
        front_end.process = process
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(self._configuration + b"\n")
            for word in self._words:
                _write(process, word)
            async for line in process.stdout:
                if line.strip() == LISTENING.encode():
                    front_end.is_listening = front_end.has_listened = True
                    self._report()
            return await process.wait()
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            front_end.process, front_end.is_listening = None, False
            self._report()

    def _report(self) -> None:
        self._listening.set(sum(front_end.is_listening for front_end in self._front_ends))


def _write(process: Process, word: str) -> None:
    if process.stdin is not None and not process.stdin.is_closing():
        process.stdin.write(word.encode() + b"\n")
