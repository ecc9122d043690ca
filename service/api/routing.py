"""What every management route has in common: its refusals are documented from one declaration, what no database can
store is refused before the route sees it, and its documents go out as they are.

A route declares the codes of its own: `responses=refusals("job_not_found")`. Those that it shares with others follow
from the key that it asks for.
"""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Annotated, Any, Final
from urllib.parse import unquote

from fastapi import Depends, Path, Query, Request
from fastapi.routing import APIRoute
from pydantic import BeforeValidator
from starlette.responses import Response
from starlette.routing import BaseRoute, compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_registry.refs import MAX_VERSION, NAME_PATTERN
from service.api.body_errors import read_storable
from service.api.problems import MEDIA_TYPE, STATUS_BY_CODE, Problem, json_response
from service.metrics import ServingMetrics

ID_PATTERN: Final = r"^[A-Za-z0-9_-]{1,64}$"
MAX_SEQ: Final = 2**31 - 1
_DIGITS: Final = re.compile(r"-?(0|[1-9][0-9]*)")


def _in_digits(value: object) -> object:
    """Raises `ValueError` for what Python reads as a number and other readers do not: `+1`, `1_0`, `1.0`, ` 1`."""
    if isinstance(value, str) and not _DIGITS.fullmatch(value):
        raise ValueError("write a whole number in digits alone")
    return value


WholeNumber = Annotated[int, BeforeValidator(_in_digits)]
"""An integer of a path, a query or a header, of which there is one spelling."""
ModelName = Annotated[str, Path(pattern=NAME_PATTERN)]
AliasName = Annotated[str, Path(pattern=NAME_PATTERN)]
VersionNumber = Annotated[WholeNumber, Path(ge=1, le=MAX_VERSION)]
JobId = Annotated[str, Path(pattern=ID_PATTERN)]
DatasetId = Annotated[str, Path(pattern=ID_PATTERN)]
Cursor = Annotated[str | None, Query(pattern=ID_PATTERN, description="id of the last row of the page before")]

Responses = dict[int | str, dict[str, Any]]

# What any request may be answered, whatever it asks for: by the protocol, the guard or the last handler.
_ANY: Final = (
    "malformed_request",
    "request_timeout",
    "payload_too_large",
    "uri_too_long",
    "unsupported_media_type",
    "headers_too_large",
    "internal_error",
)
_OPEN: Final = (*_ANY, "forbidden")
# Causes that pass by themselves: the answer says when to come back.
_PASSING: Final = frozenset(
    {
        "queue_full",
        "too_many_streams",
        "draining",
        "database_unavailable",
        "storage_unavailable",
        "model_not_ready",
    }
)
_KEYED: Final = (*_OPEN, "unauthenticated", "invalid_request", "database_unavailable", "draining")
SECURITY: Final[list[dict[str, list[str]]]] = [{"bearer": []}, {"apiKey": []}]
SECURITY_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer <key>"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def refusals(*codes: str, media_types: tuple[str, ...] = (MEDIA_TYPE,)) -> Responses:
    """How OpenAPI says that a route may refuse with these codes. Raises `KeyError` for a code that does not exist."""
    by_status: dict[int | str, list[str]] = {}
    for code in codes:
        by_status.setdefault(STATUS_BY_CODE[code], []).append(code)
    return {status: _refusal(sorted(set(of_status)), media_types) for status, of_status in by_status.items()}


def _refusal(codes: list[str], media_types: tuple[str, ...]) -> dict[str, Any]:
    schemas = {MEDIA_TYPE: "Problem", "application/json": "OpenAIError"}
    response: dict[str, Any] = {
        "description": ", ".join(f"`{code}`" for code in codes),
        "content": {kind: {"schema": {"$ref": f"#/components/schemas/{schemas[kind]}"}} for kind in media_types},
        "x-codes": codes,
    }
    if _PASSING & set(codes):
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return response


def with_common_refusals(
    own: Mapping[int | str, dict[str, Any]], *, is_keyed: bool, media_types: tuple[str, ...] = (MEDIA_TYPE,)
) -> Responses:
    """The responses of a route with those that all routes of its kind may give."""
    return {**own, **refusals(*_codes(own), *(_KEYED if is_keyed else _OPEN), media_types=media_types)}


def _codes(responses: Mapping[int | str, dict[str, Any]]) -> list[str]:
    return [code for response in responses.values() for code in response.get("x-codes", ())]


class ManagementRoute(APIRoute):
    """A route of the framework; see the module. Its endpoint's annotation is the document's schema and, checked by
    mypy alone, filters nothing."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, _sending(endpoint), **options)
        scopes = [
            getattr(check.call, "required_scope", None)
            for check in self.dependant.dependencies
            if hasattr(check.call, "required_scope")
        ]
        shared = [code for check in self.dependant.dependencies for code in getattr(check.call, "refuses", ())]
        own = self.responses | refusals(*_codes(self.responses), *shared)
        self.responses = with_common_refusals(own, is_keyed=bool(scopes))
        if scopes:
            self.openapi_extra = {"security": SECURITY, "x-scope": scopes[0]} | (self.openapi_extra or {})

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            _refuse_unstorable_target(request)
            if self.body_field is not None and (content := await request.body()):
                json_body(request)
                await read_storable(content)
            return await handler(request)

        return checked


def allowed_methods(routes: Iterable[BaseRoute]) -> Callable[[str], str]:
    """What the header `Allow` says of a path: every documented method of the route that fits it most closely."""
    methods: dict[str, set[str]] = {}
    for route in routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            methods.setdefault(route.path, set()).update(route.methods or ())
    patterns = [
        (compile_path(path)[0], ", ".join(sorted(methods[path])))
        for path in sorted(methods, key=lambda path: path.count("{"))
    ]

    def allowed(path: str) -> str:
        return next((listed for pattern, listed in patterns if pattern.fullmatch(path)), "")

    return allowed


class CountedRoutes:
    """ASGI: counts and times what `app` answers, by the route's path as the document has it; empty if none fits."""

    def __init__(self, app: ASGIApp, metrics: ServingMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":  # the end of a stream of events would tell nothing
                route = getattr(scope.get("route"), "path", "")
                seconds = time.monotonic() - started
                self._metrics.count_management(scope["method"], route, status=message["status"], seconds=seconds)
            await send(message)

        await self._app(scope, receive, counted)


def json_body(request: Request) -> None:
    """A JSON route takes JSON and says so: curl's default type would otherwise end in a puzzling 422. Raises 415."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not media_type.endswith("json") and request.headers.get("content-length") != "0":
        raise not_json()


def not_json() -> Problem:
    return Problem(
        415, "unsupported_media_type", "send the body as JSON with 'Content-Type: application/json' (curl: -H)"
    )


JsonBody = Depends(json_body)


def _refuse_unstorable_target(request: Request) -> None:
    path, query = request.scope["path"], request.scope["query_string"].decode("latin-1")
    if "\0" in path or "\0" in unquote(query):
        raise Problem(422, "invalid_request", "the path or the query holds a NUL character; leave it out")


def _sending(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`endpoint`, whose documents become responses: the framework validates and copies what is none yet."""
    if inspect.iscoroutinefunction(endpoint):

        @functools.wraps(endpoint)
        async def called(**arguments: Any) -> Response:
            return _response(await endpoint(**arguments))

        return called

    @functools.wraps(endpoint)
    def called_in_thread(**arguments: Any) -> Response:
        return _response(endpoint(**arguments))

    return called_in_thread


def _response(answer: Any) -> Response:
    return answer if isinstance(answer, Response) else json_response(answer)
