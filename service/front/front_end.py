"""A front end: takes connections, holds them to every limit, knows the caller, and answers well-formed inference
requests by asking the engine process in frames. Everything else goes there as HTTP.
"""

from __future__ import annotations

import asyncio
import io
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from service.api.answers import ROUTES
from service.api.auth import KeyAuthentication
from service.api.direct import DirectRoutes
from service.api.guard import DrainState, GuardLimits, RequestGuard, body_limits
from service.api.measure import RequestMetrics
from service.front.configuration import Configuration, decode
from service.front.link import EngineLink, make_options
from service.front.proxy import EngineProxy
from service.front.supervisor import DRAIN, LISTENING, REFUSE
from service.garbage import keep_collections_short
from service.logs import set_up
from service.server import DrainingServer, DrainTimes, HeaderLimits, exit_hard_after, server_config

ORPHANED_S = 2.0
"""To answer what is in flight once the engine process has gone."""
EXIT_S = 5.0
"""From the end of the grace until the process is gone in any case."""


@dataclass(frozen=True, slots=True)
class FrontServices:
    """What inference routes use, answered by the engine process."""

    settings: Configuration
    pool: EngineLink
    predictor: EngineLink
    make_options: Callable[..., Any] = make_options


def create_front(configuration: Configuration, link: EngineLink, proxy: ASGIApp, drain: DrainState) -> ASGIApp:
    """The layers of `service.app`, in the same order, with the engine process in the framework's place."""
    services = FrontServices(configuration, link, link)
    direct = DirectRoutes(proxy, ROUTES, lambda: services)
    authenticated = KeyAuthentication(direct, configuration.keys)
    measured = RequestMetrics(authenticated, link)
    limits = body_limits(configuration.max_body_bytes, configuration.max_upload_bytes)
    return RequestGuard(measured, GuardLimits(), drain, limits)


class FrontServer(DrainingServer):
    """Drains and ends on words from the engine process, not on signals."""

    def __init__(self, config: uvicorn.Config, state: DrainState, times: DrainTimes, link: EngineLink) -> None:
        super().__init__(config, state, times)
        self._link = link
        self._tasks: list[asyncio.Task[None]] = []

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._tasks = [asyncio.create_task(self._link.run()), asyncio.create_task(self._listen_to_engine())]
        opened = asyncio.create_task(self._link.opened())
        await asyncio.wait([opened, self._tasks[1]], return_when=asyncio.FIRST_COMPLETED)
        if not opened.done():  # the engine process has gone before it was ready
            self.should_exit = True
            return
        await super().startup(sockets)
        say(LISTENING)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._link.flush()
        await asyncio.sleep(0.01)  # what is written leaves at the end of the loop's turn
        for task in self._tasks:
            task.cancel()

    async def _listen_to_engine(self) -> None:
        """Follows the words on standard input; its end is the end of the engine process."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async for line in reader:
            word = line.decode(errors="replace").strip()
            if word == DRAIN:
                self.state.draining = True
            elif word == REFUSE and not self.state.refusing:
                self.state.refusing = True
                self.begin_drain()
        if not self.state.refusing:
            self.state.refusing = True
            self.begin_drain()
        exit_hard_after(ORPHANED_S)


def say(word: str) -> None:
    """To the engine process, which may have gone."""
    try:
        print(word, flush=True)
    except OSError:
        pass


def run() -> int:
    line = io.FileIO(0, closefd=False).readline()  # unbuffered: what comes after it is the server's to read
    if not line.endswith(b"\n"):
        return 1  # the engine process went before it had said anything
    configuration = decode(line)
    set_up(configuration.log_level)
    keep_collections_short()
    drain = DrainState()
    link, proxy = EngineLink(configuration.frames_path), EngineProxy(configuration.http_path)
    app = create_front(configuration, link, proxy, drain)
    config = server_config(app, HeaderLimits(), lifespan="off", timeout_keep_alive=75)
    times = DrainTimes(0.0, configuration.grace_s, configuration.grace_s + EXIT_S)
    FrontServer(config, drain, times, link).run([address.bind() for address in configuration.addresses])
    return 0
