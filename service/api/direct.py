"""Well-formed requests to the inference routes, answered without the framework.

Stands between authentication and FastAPI. Where the path, the method, the type, the caller's scope or the body is
anything but plainly right, the request goes on to the framework with its body untouched; there the same routes are
declared once more, for the OpenAPI document and for wording every refusal. Both call one function per route, so what a
route does is written once. It knows no route; `app` gives it the table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.api.auth import Principal
from service.api.deps import Services
from service.api.guard import headers_of, replay
from service.api.measure import inference_route

Body = TypeVar("Body")

_JSON = frozenset({b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8"})


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
    """ASGI middleware around the framework's `app`. `routes` are keyed as `inference_route` names them."""

    def __init__(self, app: FastAPI, routes: Mapping[str, DirectRoute[Any]]) -> None:
        self._app = app
        self._routes = dict(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = inference_route(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None or headers_of(scope).get(b"content-type", b"").lower() not in _JSON:
            await self._app(scope, receive, send)
            return
        principal: Principal = scope["state"]["principal"]
        route = self._routes[found[0]]
        message = await receive()
        body = _decoded(route, message) if principal.may("predict") else None
        if body is None:
            await self._app(scope, replay(message, receive), send)
            return
        call = Call(self._app.state.services, principal, scope, receive, found[1])
        try:
            answer = await route.answer(body, call)
        except Exception as error:
            response = route.refuse(error, scope)
            if response is None:
                raise
            await response(scope, receive, send)
            return
        headers = [
            (b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer.content)), *answer.headers,
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer.content})


def _decoded(route: DirectRoute[Body], message: Message) -> Body | None:
    """The body that came whole in `message`; None where it did not, or is not plainly well-formed."""
    if message["type"] != "http.request" or message.get("more_body", False):
        return None
    try:
        return route.decode(message.get("body", b""))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
