"""What a connection may send outside of request bodies: uvicorn's httptools protocol under limits.

uvicorn bounds neither the size nor the time of a request's headers, and takes what a server in front of it may read
differently. Knows header bytes and connections; knows no route. It subclasses what uvicorn does not document, so
`pyproject.toml` names the range of versions that the tests ran with.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.api.cancellation import CONNECTION_LOST
from service.api.problems import Problem, problem_response

LAST_REQUEST_S = 1.0
"""When the server ends, a connection without a request stays open for this long: one may be on its way, and closed it
would be lost where it can be told to come again."""


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """Bounds for one request."""

    max_header_bytes: int = 16 * 1024
    """Request line and headers together; also trailers and chunk extensions, between two pieces of a body."""
    max_headers: int = 64
    max_target_bytes: int = 8 * 1024
    """The request target: path and query."""
    header_timeout_s: float = 10.0
    """From the first byte of a request, for the first one from the connection, to the end of its headers."""


class LimitedHttpToolsProtocol(HttpToolsProtocol):
    """uvicorn's protocol under `limits`. A refusal is a problem document, and the end of the connection."""

    limits = HeaderLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_headers = True  # between two requests as well: the next byte belongs to the next one
        self._header_bytes = 0
        self._bytes_without_body = 0
        self._is_refused = False
        self._is_last = False  # the next request is answered, and then the connection ends
        self._header_timer: asyncio.TimerHandle | None = None

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._lost: asyncio.Future[None] = self.loop.create_future()
        self._extensions: dict[str, dict[object, object]] = {CONNECTION_LOST: {"future": self._lost}}
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)
        self._lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data and not (self._is_refused or self.transport.is_closing()):
            data = self._feed_headers(data) if self._in_headers else self._feed_body(data)

    def _feed_headers(self, data: bytes) -> bytes:
        """Feed at most what is left of the header budget; return the rest.

        httptools joins the pieces of a header until it is complete, however long it gets, so bytes are counted first.
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
        """Feed all of `data`; bound what brings no body: trailers and chunk extensions."""
        self._bytes_without_body += len(data)
        self._feed(data)
        if self._bytes_without_body > self.limits.max_header_bytes and not self._in_headers:
            self._refuse(_headers_too_large("The trailers of the body are too large."))
        return b""

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Answered as if it had not asked; what follows is in no protocol we know.
            self._is_refused = True
            self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, Problem) else _malformed("The request is not valid HTTP."))

    # Parser callbacks. A `Problem` raised in one comes back to `_feed` as the context of a parser error.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.max_target_bytes:
            detail = f"The request target is longer than {self.limits.max_target_bytes} bytes."
            raise Problem(414, "uri_too_long", detail)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_headers:
            return  # a trailer; uvicorn would add it to the headers of the request being served
        if len(self.headers) >= self.limits.max_headers:
            raise _headers_too_large(f"There are more than {self.limits.max_headers} headers.")
        super().on_header(name, value.rstrip(b" \t"))  # the parser leaves what is no part of the value

    def on_headers_complete(self) -> None:
        self._check_framing()
        super().on_headers_complete()
        if self._is_last:
            self.cycle.keep_alive = False
        self._in_headers = False
        self._stop_header_timer()

    def on_body(self, body: bytes) -> None:
        self._bytes_without_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_headers = True
        self._header_bytes = self._bytes_without_body = 0
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()  # a large body may have paused it, and then a lost connection goes unseen

    def _check_framing(self) -> None:
        """Refuse what two servers could take for different bodies (request smuggling) or for different hosts."""
        encodings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
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
        if self._header_bytes == 0:
            self.transport.close()  # nothing was asked, and an unasked answer could be taken for a later one
        else:
            detail = f"The headers were not complete within {self.limits.header_timeout_s:g} seconds."
            self._refuse(Problem(408, "request_timeout", detail))

    # End

    def shutdown(self) -> None:
        """The server ends: the request in progress is answered, or the one that comes within a moment."""
        self._is_last = True
        if self._is_idle():
            self.loop.call_later(LAST_REQUEST_S, self._close_if_idle)
        else:
            super().shutdown()

    def _close_if_idle(self) -> None:
        if self._is_idle() and self._header_bytes == 0:
            self.transport.close()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, problem: Problem) -> None:
        """Answer `problem` in place of the request being received and close; earlier requests are answered first.

        A client that is still sending may see a reset before it reads the answer.
        """
        self._is_refused = True
        self._stop_header_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline):
            self.transport.write(_raw_response(problem, self.server_state.default_headers))
        self.transport.close()


def limited_protocol(header_limits: HeaderLimits) -> type[LimitedHttpToolsProtocol]:
    """The protocol class with these limits; uvicorn wants a class and makes one object for each connection."""
    return type("LimitedHttpToolsProtocol", (LimitedHttpToolsProtocol,), {"limits": header_limits})


def _headers_too_large(detail: str) -> Problem:
    return Problem(431, "headers_too_large", detail)


def _malformed(detail: str) -> Problem:
    return Problem(400, "malformed_request", detail)


def _raw_response(problem: Problem, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    """The whole answer to a request that has no valid headers; its target is not repeated."""
    request_id = uuid.uuid4().hex
    response = problem_response(problem, path="", request_id=request_id)
    headers = [
        *default_headers,
        *response.raw_headers,
        (b"x-request-id", request_id.encode("ascii")),
        (b"connection", b"close"),
    ]
    lines = [name + b": " + value + b"\r\n" for name, value in headers]
    return b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", bytes(response.body)])
