"""Well-formed requests to the inference routes, answered without the framework.

Stands between authentication and FastAPI. Where the path, the method, the type, the caller's scope or the body is
anything but plainly right, the request goes on to what
stands behind with its body untouched; there the same routes are declared once more, for the OpenAPI document and for
wording every refusal. Both call one function per route (`answers`), so what a route does is written once. It knows no
route; whoever makes it gives it the table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.auth import Principal
from service.api.deps import Services
from service.api.guard import headers_of, replay
from service.api.measure import inference_route

Body = TypeVar("Body")

JSON = frozenset({b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8"})


@dataclass(slots=True)
class Call:
    """What an inference route knows of a request besides its body. `model` is the one in the path."""

    services: Services
    principal: Principal
    scope: Scope
    receive: Receive
    model: str | None = None


@dataclass(slots=True)
class Answer:
    """A JSON document with status 200, ready to be sent."""

    content: bytes
    headers: list[tuple[bytes, bytes]]

    def response(self) -> Response:
        """The same for the framework."""
        response = Response(self.content, media_type="application/json")
        response.raw_headers += self.headers
        return response


@dataclass(frozen=True, slots=True)
class DirectRoute(Generic[Body]):
    """`decode` raises `msgspec.DecodeError` for whatever the framework shall look at. `refuse` gives the answer to an
    error of `answer`, None where it is a fault of ours."""

    decode: Callable[[bytes], Body]
    answer: Callable[[Body, Call], Awaitable[Answer]]
    refuse: Callable[[Exception, Scope], Response | None]


class DirectRoutes:
    """ASGI middleware around `app`, which takes all that is not plainly right. `routes` are keyed as `inference_route`
    names them. `services` is asked at each request: they are there only once the application has started."""

    def __init__(self, app: ASGIApp, routes: Mapping[str, DirectRoute[Any]], services: Callable[[], Services]) -> None:
        self._app = app
        self._routes = dict(routes)
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = inference_route(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None or headers_of(scope).get(b"content-type", b"").lower() not in JSON:
            await self._app(scope, receive, send)
            return
        principal: Principal = scope["state"]["principal"]
        route = self._routes[found[0]]
        message = await receive()
        is_whole = message["type"] == "http.request" and not message.get("more_body", False)
        body = decoded(route, message.get("body", b"")) if is_whole and principal.may("predict") else None
        if body is None:
            await self._app(scope, replay(message, receive), send)
            return
        call = Call(self._services(), principal, scope, receive, found[1])
        try:
            answer = await route.answer(body, call)
        except Exception as error:
            response = route.refuse(error, scope)
            if response is None:
                raise
            await response(scope, receive, send)
            return
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(answer.content)),
            *answer.headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer.content})


def decoded(route: DirectRoute[Body], content: bytes) -> Body | None:
    """None where it is not plainly well-formed."""
    try:
        return route.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
