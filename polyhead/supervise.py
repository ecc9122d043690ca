"""Keeps the processes of `polyhead up` running: start, wait until ready, restart with back-off, stop in order.

Knows processes, signals, log files and one address to ask; what is started, and what it means, is its
caller's. A signal to us is never passed on by the terminal: each child has a process group of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

REFUSED = 2  # the exit status of a process whose settings cannot be used
TAIL_LINES = 20
TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Program:
    """What to start, and the file its output is appended to."""

    name: str
    command: tuple[str, ...]
    log: Path


@dataclass(frozen=True, slots=True)
class Times:
    """All in seconds."""

    ready_s: float = 300.0
    """From the start until `/readyz` must have answered 200."""
    poll_s: float = 0.25
    stop_s: float = 60.0
    """From SIGTERM to SIGKILL."""
    first_delay_s: float = 1.0
    longest_delay_s: float = 30.0
    steady_s: float = 60.0
    """A child that ran for so long starts again at `first_delay_s`."""
    impatient_s: float = 1.0
    """A second Ctrl-C kills, but not one so soon: `make` and the terminal may both have sent the first."""


def restart_delay_s(deaths: int, times: Times) -> float:
    """Before the restart after this many deaths in a row: doubles from `first_delay_s`, up to `longest_delay_s`."""
    return float(min(times.longest_delay_s, times.first_delay_s * 2 ** min(deaths - 1, 32)))


def port_problem(host: str, port: int) -> str | None:
    """Why nothing can listen there, or None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


class Supervisor:
    """`run` returns the exit status: 0 after a clean stop, 1 where the start failed or a child had to be killed."""

    def __init__(
        self,
        programs: tuple[Program, ...],
        ready_url: str,
        *,
        environment: Mapping[str, str],
        say: Callable[[str], None],
        greeting: Callable[[], str],
        times: Times | None = None,
    ) -> None:
        self._children = [_Child(program, environment) for program in programs]
        self._ready_url = ready_url
        self._tell = say
        self._greeting = greeting
        self._times = times or Times()
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._stop_asked = 0.0

    def run(self) -> int:
        return asyncio.run(self._run())

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                loop.add_signal_handler(number, self._on_signal, number)
        try:
            status = await self._start()
            if status == 0 and not self._stop.is_set():
                self._say(self._greeting())
                await self._supervise()
        finally:
            is_clean = await self._stop_all()
        return status if is_clean else 1

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if not self._stop.is_set():
            self._stop_asked = now
            self._stop.set()
        elif number == signal.SIGINT and now - self._stop_asked > self._times.impatient_s:
            self._kill.set()

    def _say(self, message: str) -> None:
        with suppress(OSError):  # no reader is left (`polyhead up | head`): no reason to leave children behind
            self._tell(message)

    # Start

    async def _start(self) -> int:
        for child in self._children:
            await child.start()
        deaths = [asyncio.create_task(child.wait()) for child in self._children]
        ready = asyncio.create_task(self._ready())
        stop = asyncio.create_task(self._stop.wait())
        waited: list[asyncio.Task[Any]] = [*deaths, ready, stop]
        try:
            await asyncio.wait(waited, timeout=self._times.ready_s, return_when=asyncio.FIRST_COMPLETED)
            dead = [child for child, death in zip(self._children, deaths, strict=True) if death.done()]
            if self._stop.is_set():
                return 0
            if ready.done() and not dead:
                ready.result()
                return 0
            for child in dead or self._children:
                what = child.ending if dead else f"not ready after {self._times.ready_s:g} s"
                self._say(f"{child.name}: {what}. The end of {child.program.log}:\n{child.tail()}")
            return 1
        finally:
            for task in waited:
                task.cancel()
            await asyncio.gather(*waited, return_exceptions=True)

    async def _ready(self) -> None:
        """Returns once the address answers 200; says what it answers before that, once each."""
        said = ""
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as http:
            while True:
                reason = await _unready(http, self._ready_url)
                if reason is None:
                    return
                if reason != said:
                    self._say(f"waiting: {reason}")
                    said = reason
                await asyncio.sleep(self._times.poll_s)

    # Supervise

    async def _supervise(self) -> None:
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(self._keep(child)) for child in self._children]
        tasks.append(asyncio.create_task(self._stop.wait()))
        try:
            # A keeper never returns; one that raises ends the whole.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, child: _Child) -> None:
        deaths = 0
        while True:
            await child.wait()
            deaths = 1 if child.ran_for_s > self._times.steady_s else deaths + 1
            delay_s = restart_delay_s(deaths, self._times)
            why = f": {child.tail().splitlines()[-1]}" if child.refused_to_start else ""
            self._say(
                f"{child.name}: {child.ending}{why}; starting it again in {delay_s:g} s (see {child.program.log})"
            )
            await asyncio.sleep(delay_s)
            try:
                await child.start()
            except OSError as error:  # no memory, no disk, no folder for the log: the next attempt waits longer
                self._say(f"{child.name}: cannot be started: {error}")

    # Stop

    async def _stop_all(self) -> bool:
        """SIGTERM to each in order, then SIGKILL to what is left. Whether none had to be killed."""
        running = [child for child in self._children if child.is_running]
        if running:
            self._say(f"stopping {' and '.join(child.name for child in running)}")
        for child in running:
            child.terminate()
        ended = asyncio.gather(*(child.wait() for child in running))
        kill = asyncio.create_task(self._kill.wait())
        waited: list[asyncio.Future[Any]] = [ended, kill]
        await asyncio.wait(waited, timeout=self._times.stop_s, return_when=asyncio.FIRST_COMPLETED)
        kill.cancel()
        late = [child for child in running if child.is_running]
        for child in late:
            self._say(f"{child.name}: did not stop in time, killed")
            child.kill_group()
        await ended
        if running and not late:
            self._say("stopped")
        return not late


@dataclass(slots=True)
class _Child:
    """One program and, after `start`, the process that runs it."""

    program: Program
    environment: Mapping[str, str]
    _process: Process | None = field(default=None, init=False)
    _started: float = field(default=0.0, init=False)
    _log_start: int = field(default=0, init=False)
    _has_ended: bool = field(default=False, init=False)
    ran_for_s: float = field(default=0.0, init=False)

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        assert self._process is not None and self._process.returncode is not None
        status = self._process.returncode
        return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"

    @property
    def refused_to_start(self) -> bool:
        """Whether it ended with a last line that says what is wrong with its settings."""
        return self._process is not None and self._process.returncode == REFUSED

    async def start(self) -> None:
        with self.program.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *self.program.command, stdin=DEVNULL, stdout=log, stderr=log, env=self.environment, process_group=0
            )
        self._started, self._has_ended = time.monotonic(), False

    async def wait(self) -> None:
        """Until it has ended; what it left behind in its group ends with it."""
        assert self._process is not None
        await self._process.wait()
        if not self._has_ended:
            self._has_ended = True
            self.ran_for_s = time.monotonic() - self._started
            self.kill_group()  # at once, while the number cannot yet be another's

    def terminate(self) -> None:
        """To the process alone: how its own children end is its business."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill_group(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def tail(self) -> str:
        """The last lines that this process wrote."""
        with self.program.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:]) or "(nothing was written)"


async def _unready(http: httpx.AsyncClient, url: str) -> str | None:
    """What keeps the service from being ready; None where it is."""
    try:
        response = await http.get(url)
    except httpx.RequestError:
        return "the serving process is starting"
    if response.status_code == 200:
        return None
    try:
        return str(response.json()["reason"])
    except (ValueError, KeyError, TypeError):
        return f"{url} answers {response.status_code}"
