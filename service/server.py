"""The HTTP server and its end in steps.

Knows uvicorn and signals; knows no route and no model. On SIGTERM uvicorn alone would close its listener at once, while
load balancers still route to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import socket
import struct
import time
from dataclasses import dataclass
from types import FrameType
from typing import cast

import uvicorn

from service.api.guard import DrainState, RequestGuard
from service.http_limits import HeaderLimits, limited_protocol

logger = logging.getLogger("service")

KEEP_ALIVE_S = 75
"""An idle connection stays open for this long, more than proxies in front keep theirs (60 s is common)."""
IDLE_CLOSE_S = 5.0
"""Time for connections to close at the end, more than `http_limits.LAST_REQUEST_S`."""
HANDSHAKES_S = 0.2
"""Time for connections that are being opened to be open before the listener goes."""
SECOND_SIGNAL_S = 2.0
STDERR = 2


@dataclass(frozen=True, slots=True)
class DrainTimes:
    """How the process ends, in seconds from the first signal."""

    drain_delay_s: float = 15.0
    """Requests are served while load balancers learn that the readiness probe fails."""
    grace_s: float = 30.0
    """Then new requests are refused while those in flight may finish for this long."""
    exit_within_s: float = 60.0
    """After this the process is gone in any case."""

    def __post_init__(self) -> None:
        if self.drain_delay_s + self.grace_s > self.exit_within_s:
            raise ValueError("drain_delay_s and grace_s together must not exceed exit_within_s")


def serve(app: RequestGuard, *, host: str, port: int, times: DrainTimes | None = None) -> None:
    """Serve `app` until a signal ends it. Exits with status 3 if the start fails."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=limited_protocol(HeaderLimits()),
        loop="uvloop",
        ws="none",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    DrainingServer(config, app.state, times).run()


class DrainingServer(uvicorn.Server):
    """uvicorn's server with an end in steps, decided at each of its ticks (0.1 s).

    The first SIGTERM or SIGINT sets `state.draining`: readiness fails, all is served, the listener
    stays open. After `drain_delay_s`, `state.refusing`: requests in flight finish, new ones are
    refused. When none is left, or after `grace_s`, the server closes. The exit code is 0. A second
    signal ends the process now.
    """

    def __init__(self, config: uvicorn.Config, state: DrainState, times: DrainTimes | None = None) -> None:
        super().__init__(config)
        self.state = state
        self.times = times or DrainTimes()
        self._draining_since: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would note the signal here and raise it again at the end, and the process would die by it.
        if self._draining_since is not None:
            self._exit_now()
            return
        logger.info("%s received, draining", signal.Signals(sig).name)
        self._draining_since = time.monotonic()
        self.state.draining = True
        exit_hard_after(self.times.exit_within_s)
        if not self.started:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._draining_since is not None:
            self._advance_drain(time.monotonic() - self._draining_since)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        left_s = self._seconds_left()
        # Requests that outlived their grace are cancelled; the guard answers them 503.
        is_out_of_grace = self.force_exit or (self.state.refusing and self.state.in_flight > 0)
        self.config.timeout_graceful_shutdown = cast(int, 0.0 if is_out_of_grace else min(IDLE_CLOSE_S, left_s))
        if not is_out_of_grace:
            await self._accept_the_last()
        try:
            async with asyncio.timeout(left_s):
                await super().shutdown(sockets)
        except TimeoutError:
            logger.error("the application did not shut down in time")

    async def _accept_the_last(self) -> None:
        """Connections that the kernel has opened and we have not accepted are reset when the listener closes."""
        for server in self.servers:
            for listener in server.sockets:
                begin_no_connections(listener.fileno())
        await asyncio.sleep(HANDSHAKES_S)

    def _advance_drain(self, since_s: float) -> None:
        if since_s < self.times.drain_delay_s:
            return
        self.state.refusing = True
        is_grace_over = since_s >= self.times.drain_delay_s + self.times.grace_s
        if self.state.in_flight == 0 or is_grace_over:
            self.should_exit = True

    def _exit_now(self) -> None:
        self.state.refusing = True
        self.should_exit = True
        self.force_exit = True
        exit_hard_after(SECOND_SIGNAL_S)

    def _seconds_left(self) -> float:
        """Until a little before the hard end, so that an orderly end comes first."""
        if self._draining_since is None:
            return self.times.exit_within_s
        end = self._draining_since + self.times.exit_within_s - min(2.0, self.times.exit_within_s / 4)
        return max(0.0, end - time.monotonic())


def begin_no_connections(listener: int) -> None:
    """Have Linux drop what would open a connection to `listener`. Its client tries again after a second, and by then
    is told at once that nothing listens. Elsewhere nothing changes."""
    attach_filter = 26  # SO_ATTACH_FILTER, for which `socket` has no name
    # Of a TCP segment: load the byte of flags; if SYN is not among them, skip one; drop all of it; keep all of it.
    steps = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(listener)) as ours:
        ours.setsockopt(socket.SOL_SOCKET, attach_filter, struct.pack("HP", len(steps), ctypes.addressof(program)))


def exit_hard_after(seconds: float) -> None:
    """A thread of C code ends the process with status 1, all stacks on stderr, even when Python hangs."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
