"""The HTTP server around the application: what a socket may send, and how the process ends.

Knows uvicorn, header bytes, connections and signals; knows no route and no model. Two things
uvicorn leaves open are closed here: its httptools protocol bounds neither the size nor the time of
a request's headers, and on SIGTERM it closes the listener at once while load balancers still
route to it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import signal
import socket
import time
import uuid
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.api.guard import DrainState, RequestGuard
from service.api.interrupt import CONNECTION_LOST
from service.api.problems import Problem, problem_response

logger = logging.getLogger("service")

LINGER_S = 2.0
"""How long what a refused client still sends is read and dropped. Closing a socket with unread data
resets it, and the reset can overtake the refusal, so that the client sees only a broken connection."""
IDLE_CLOSE_S = 5.0
"""Time for connections without a request to close at the end."""
SECOND_SIGNAL_S = 2.0
STDERR = 2


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """Bounds for what a connection sends outside of request bodies."""

    max_header_bytes: int = 16 * 1024
    """Request line and headers together, of one request."""
    max_headers: int = 64
    max_target_bytes: int = 8 * 1024
    """The request target, that is path and query."""
    header_timeout_s: float = 10.0
    """From the first byte of a request, for the first one from the connection, to the end of its headers."""
    max_body_chunks: int = 16_384
    """Chunks of one chunked body; one more is allowed for each KiB received."""
    max_connections: int | None = None
    """More are answered 503 and closed. Probes count too: keep it far above what is served at once."""


@dataclass(frozen=True, slots=True)
class DrainTimes:
    """How the process ends, in seconds from the first signal."""

    drain_delay_s: float = 15.0
    """Served as ever while load balancers learn that the readiness probe fails."""
    grace_s: float = 30.0
    """Then new requests are refused while those in flight may finish for this long."""
    exit_within_s: float = 60.0
    """After this the process is gone in any case."""

    def __post_init__(self) -> None:
        if self.drain_delay_s + self.grace_s > self.exit_within_s:
            raise ValueError("drain_delay_s and grace_s together must not exceed exit_within_s")


class LimitedHttpToolsProtocol(HttpToolsProtocol):
    """uvicorn's protocol under `limits`. A refusal is a problem document, and the end of the connection."""

    limits = HeaderLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_headers = True  # between two requests as well: the next byte belongs to the next one
        self._header_bytes = 0
        self._parsed_header_bytes = 0
        self._body_bytes = 0
        self._chunks = 0
        self._bytes_without_body = 0
        self._is_lingering = False
        self.is_refused = False
        self._running: RequestResponseCycle | None = None
        self._header_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._lost: asyncio.Future[None] = self.loop.create_future()
        self._extensions: dict[str, dict[object, object]] = {CONNECTION_LOST: {"future": self._lost}}
        most = self.limits.max_connections
        if most is not None and len(self.connections) > most:
            self._refuse(Problem(503, "too_many_connections", "Too many connections are open.", retry_after_s=1.0))
            return
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)
        self._lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data and not (self.is_refused or self._is_lingering or self.transport.is_closing()):
            data = self._feed_headers(data) if self._in_headers else self._feed_body(data)

    def _feed_headers(self, data: bytes) -> bytes:
        """Feeds at most what is left of the header budget; returns the rest.

        httptools joins the pieces of a header until it is complete, however long it gets, so bytes are
        counted before it sees them.
        """
        if self._header_timer is None:
            self._start_header_timer()
        room = self.limits.max_header_bytes - self._header_bytes
        if room <= 0:
            self._refuse(_headers_too_large(f"The headers are larger than {self.limits.max_header_bytes} bytes."))
            return b""
        self._header_bytes += min(room, len(data))
        self._feed(data[:room])
        return data[room:]

    def _feed_body(self, data: bytes) -> bytes:
        """Feeds all of `data`; bounds what brings no body: trailers and chunk extensions."""
        body_bytes = self._body_bytes
        self._feed(data)
        if self._in_headers:
            return b""
        self._bytes_without_body = self._bytes_without_body + len(data) if body_bytes == self._body_bytes else 0
        if self._bytes_without_body > self.limits.max_header_bytes:
            self._refuse(_headers_too_large("The trailers of the body are too large."))
        return b""

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Answered as if it had not asked; what follows is in no protocol we know.
            self.is_refused = True
            if self._running is not None:
                self._running.keep_alive = False
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, Problem) else _malformed("The request is not valid HTTP."))

    # Parser callbacks. A `Problem` raised in one comes back to `_feed` as the context of a parser error.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
        self._in_headers = True
        self._parsed_header_bytes = 0
        self._body_bytes = self._chunks = self._bytes_without_body = 0

    def on_url(self, url: bytes) -> None:
        if len(self.url) + len(url) > self.limits.max_target_bytes:
            raise Problem(
                414, "uri_too_long", f"The request target is longer than {self.limits.max_target_bytes} bytes."
            )
        super().on_url(url)
        self._parsed_header_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._parsed_header_bytes += len(name) + len(value) + 4
        if self._parsed_header_bytes > self.limits.max_header_bytes:
            raise _headers_too_large(f"The headers are larger than {self.limits.max_header_bytes} bytes.")
        if not self._in_headers:
            return  # a trailer; uvicorn would add it to the headers of the request being served
        if len(self.headers) >= self.limits.max_headers:
            raise _headers_too_large(f"There are more than {self.limits.max_headers} headers.")
        super().on_header(name, value.rstrip(b" \t"))  # the parser leaves what is no part of the value

    def on_headers_complete(self) -> None:
        self._check_framing()
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle
        self.cycle.transport = cast(asyncio.Transport, _CycleTransport(self, self.cycle))
        self._in_headers = False
        self._stop_header_timer()

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > self.limits.max_body_chunks + self._body_bytes // 1024:
            raise _malformed("The body comes in too many small pieces.")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_headers = True
        self._header_bytes = 0
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()  # a large body may have paused it, and then a lost connection goes unseen

    def on_response_complete(self) -> None:
        if self._is_lingering:
            self.server_state.total_requests += 1
            return
        if self._running is not None:
            self._running.transport = self.transport  # the one it had knows it: freed at once, not by a collection
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()

    def _check_framing(self) -> None:
        """Refuses what two servers could take for different bodies (request smuggling) or for different hosts."""
        encodings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        lengths = [value for name, value in self.headers if name == b"content-length"]
        hosts = [name for name, _ in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise _malformed("A request names its host once, in the header Host.")
        if encodings and lengths:
            raise _malformed("Content-Length and Transfer-Encoding exclude each other.")
        if encodings not in ([], [b"chunked"]):
            raise _malformed("The only transfer encoding taken is chunked.")
        # httptools skips the body of a request with an upgrade and would read it as the next request.
        if self.parser.should_upgrade() and (encodings or lengths not in ([], [b"0"])):
            raise _malformed("A request with a body cannot ask for an upgrade.")

    # Time

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self._header_time_over)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _header_time_over(self) -> None:
        self._header_timer = None
        if self.flow.read_paused:  # it is us who do not read: an earlier request is being served
            self._start_header_timer()
        elif self._header_bytes == 0:
            self.transport.close()  # nothing was asked, and an unasked answer could be taken for a later one
        else:
            detail = f"The headers were not complete within {self.limits.header_timeout_s:g} seconds."
            self._refuse(Problem(408, "request_timeout", detail))

    # End

    def _refuse(self, problem: Problem) -> None:
        """Answers `problem` in place of the request being received and closes; earlier requests are answered first."""
        self.is_refused = True
        self._stop_header_timer()
        self.pipeline.clear()
        running = self._running
        if running is None or running.response_complete:
            self._answer_and_close(problem)
        elif running.more_body and running is self.cycle:
            is_started = running.response_started
            running.disconnected = True
            running.message_event.set()
            if is_started:
                self.transport.close()
            else:
                self._answer_and_close(problem)
        else:
            running.keep_alive = False

    def _answer_and_close(self, problem: Problem) -> None:
        if not self.transport.is_closing():
            self.transport.write(_raw_response(problem, self.server_state.default_headers))
            self.linger()

    def linger(self) -> None:
        """Ends our side now and the connection when the client ends its own, at the latest after `LINGER_S`."""
        if self._is_lingering:
            return
        self._is_lingering = True
        self._stop_header_timer()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)


class _CycleTransport:
    """What one request's response is written to: its close waits for what the client is still sending."""

    def __init__(self, protocol: LimitedHttpToolsProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        is_more_coming = self._cycle.more_body or self._protocol.is_refused
        if is_more_coming and self._cycle.response_complete:
            self._protocol.linger()
        else:
            self._protocol.transport.close()


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
        self.config.timeout_graceful_shutdown = cast(int, 0.0 if self._is_out_of_grace() else min(IDLE_CLOSE_S, left_s))
        try:
            async with asyncio.timeout(left_s):
                await super().shutdown(sockets)
        except TimeoutError:
            logger.error("the application did not shut down in time")

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

    def _is_out_of_grace(self) -> bool:
        return self.force_exit or (self.state.refusing and self.state.in_flight > 0)

    def _seconds_left(self) -> float:
        """Until a little before the hard end, so that an orderly end comes first."""
        if self._draining_since is None:
            return self.times.exit_within_s
        end = self._draining_since + self.times.exit_within_s - min(1.0, self.times.exit_within_s / 10)
        return max(0.0, end - time.monotonic())


def limited_protocol(header_limits: HeaderLimits) -> type[LimitedHttpToolsProtocol]:
    """The protocol class with these limits; uvicorn wants a class and makes one object for each connection."""
    return type("LimitedHttpToolsProtocol", (LimitedHttpToolsProtocol,), {"limits": header_limits})


def serve(
    app: RequestGuard,
    *,
    host: str,
    port: int,
    state: DrainState,
    times: DrainTimes | None = None,
    header_limits: HeaderLimits | None = None,
    keep_alive_s: int = 75,
    forwarded_allow_ips: str | None = None,
) -> None:
    """Serves `app`, which shares `state`, until a signal ends it.

    `keep_alive_s` should exceed the idle time of a proxy in front. `forwarded_allow_ips` names the
    proxies whose `X-Forwarded-For` is believed. Exits with status 3 where the start fails.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=limited_protocol(header_limits or HeaderLimits()),
        loop="uvloop",
        ws="none",
        lifespan="on",
        timeout_keep_alive=keep_alive_s,
        proxy_headers=forwarded_allow_ips is not None,
        forwarded_allow_ips=forwarded_allow_ips or "",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    DrainingServer(config, state, times).run()


def exit_hard_after(seconds: float) -> None:
    """A thread of C code ends the process with status 1, all stacks on stderr, even when Python hangs."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)


def _headers_too_large(detail: str) -> Problem:
    return Problem(431, "headers_too_large", detail)


def _malformed(detail: str) -> Problem:
    return Problem(400, "malformed_request", detail)


def _raw_response(problem: Problem, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    """The whole answer to a request that has no valid headers; its target is not repeated."""
    request_id = uuid.uuid4().hex
    response = problem_response(problem, path="", request_id=request_id)
    response.raw_headers += [(b"x-request-id", request_id.encode("ascii")), (b"connection", b"close")]
    lines = [name + b": " + value + b"\r\n" for name, value in (*default_headers, *response.raw_headers)]
    return b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", bytes(response.body)])
