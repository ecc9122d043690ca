"""Passes a request on to the engine process as plain HTTP over its Unix socket, and the answer back, as streams.

Knows bytes and headers; knows no route. What the engine process is to decide by, it gets: the path, the query and all
headers that belong to the request and not to a connection. Authentication happens there once more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Final

import httpx
from starlette.types import Message, Receive, Scope, Send

from service.api.guard import headers_of
from service.api.interrupt import unless_gone
from service.api.problems import Problem, refusal, request_id_of
from service.front.link import unreachable

_OF_A_CONNECTION: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_TIMEOUT: Final = {"connect": 5.0, "read": None, "write": None, "pool": None}
Headers = list[tuple[bytes, bytes]]


class EngineProxy:
    """ASGI application. A request whose client leaves is given up there too."""

    def __init__(self, path: str) -> None:
        # Kept for less than the server keeps them, so that no request is sent into a connection that is closing.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=5.0)
        self._transport = httpx.AsyncHTTPTransport(uds=path, limits=limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["state"]["is_counted"] = True  # by the engine process
        is_started = False

        async def watched(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await unless_gone(scope, receive, self._pass_on(scope, receive, watched))
        except _ClientGone:
            pass
        except Problem as problem:
            if problem.status != 499:
                raise
        except httpx.TransportError as error:
            if is_started:
                raise  # the server cuts the answer off, which is what happened to it
            is_ours = isinstance(error, httpx.LocalProtocolError)
            scope["state"]["is_counted"] = False
            reason = Problem(400, "malformed_request", "The request is not valid HTTP.") if is_ours else unreachable()
            response = refusal(reason, scope)
            assert response is not None
            await response(scope, receive, send)

    async def close(self) -> None:
        await self._transport.aclose()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await receive()
        if first["type"] == "http.disconnect":
            return
        query = scope["query_string"]
        request = httpx.Request(
            scope["method"],
            "http://engine",
            headers=request_headers(scope, first),
            stream=_Body(first, receive),
            extensions={
                "target": scope["raw_path"] + (b"?" + query if query else b""),
                "timeout": _TIMEOUT,
            },
        )
        response = await self._transport.handle_async_request(request)
        try:
            headers = of_the_message(response.headers.raw, also=(b"date",))
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            assert isinstance(response.stream, httpx.AsyncByteStream)
            async for part in response.stream:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()


class _ClientGone(Exception):
    """The client left in the middle of its body, or the guard refused the rest of it."""


class _Body(httpx.AsyncByteStream):
    """A request's body as it comes."""

    def __init__(self, first: Message, receive: Receive) -> None:
        self._message, self._receive = first, receive

    async def __aiter__(self) -> AsyncIterator[bytes]:
        message = self._message
        while True:
            if message["type"] == "http.disconnect":
                raise _ClientGone
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return
            message = await self._receive()


def request_headers(scope: Scope, first: Message) -> Headers:
    """What goes on: with the request's id, and framed by what is known of the body when its first part is here."""
    headers = of_the_message(scope["headers"], also=(b"x-request-id", b"expect", b"content-length"))
    headers.append((b"x-request-id", request_id_of(scope).encode("ascii")))
    if b"host" not in headers_of(scope):
        headers.append((b"host", b"localhost"))  # HTTP/1.0 needs none, and none is taken as local anyway
    declared = headers_of(scope).get(b"content-length")
    if first.get("more_body", False):
        headers.append((b"transfer-encoding", b"chunked") if declared is None else (b"content-length", declared))
    elif declared is not None or first.get("body"):
        headers.append((b"content-length", b"%d" % len(first.get("body", b""))))
    return headers


def of_the_message(headers: Iterable[tuple[bytes, bytes]], *, also: tuple[bytes, ...] = ()) -> Headers:
    """Without those of the connection, those that `Connection` names, and `also`; names in lower case, values without
    the blanks around them, which parsers leave at the end and h11 does not send."""
    lowered = [(name.lower(), value.strip(b" \t")) for name, value in headers]
    named = {token.strip().lower() for name, value in lowered if name == b"connection" for token in value.split(b",")}
    dropped = _OF_A_CONNECTION.union(named, also)
    return [(name, value) for name, value in lowered if name not in dropped]
