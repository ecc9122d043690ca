"""Answers held to the OpenAPI document: status, content type and shape."""

from __future__ import annotations

import asyncio
import functools
import re
from dataclasses import dataclass
from typing import Any

import httpx
from jsonschema import Draft202012Validator

from service.api.guard import DrainState
from service.app import create_app
from service.metrics import ServingMetrics
from service.settings import ServingSettings

Document = dict[str, Any]


@functools.cache
def document() -> Document:
    """As the service answers it, asked without starting any part behind the routes."""

    def never() -> Any:
        raise AssertionError("the document needs no services")

    async def ask() -> Any:
        application = create_app(ServingSettings(), build=never, drain=DrainState(), metrics=ServingMetrics())
        transport = httpx.ASGITransport(app=application)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/openapi.json")).raise_for_status().json()

    found: Document = asyncio.run(ask())
    return found


@dataclass(frozen=True)
class Operation:
    path: re.Pattern[str]
    method: str
    responses: Document


@functools.cache
def operations() -> list[Operation]:
    """The more parts of a path are fixed, the earlier it comes, as the service's routers do it."""
    paths = sorted(document()["paths"].items(), key=lambda item: (item[0].count("{"), -len(item[0])))
    return [
        Operation(_pattern(path), method.upper(), operation["responses"])
        for path, methods in paths
        for method, operation in methods.items()
    ]


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", lambda named: ".+" if named[1] == "path" else "[^/]+", path))


def fault_in(method: str, path: str, status: int, content_type: str, body: Any) -> str | None:
    """What of an answer the document does not say; None too if it has no such operation. `body` is JSON, or None."""
    found = next((one for one in operations() if one.method == method and one.path.fullmatch(path)), None)
    if found is None:
        return None
    response = found.responses.get(str(status))
    if response is None:
        return f"{method} {path} answered {status}, which is not documented"
    media_type = content_type.partition(";")[0]
    content = response.get("content", {})
    if not content:
        return None if not media_type else f"{method} {path} answered {media_type} with {status}, which has no content"
    schema = content.get(media_type, content.get("*/*"))
    if schema is None:
        return f"{method} {path} answered {status} as {media_type}; documented are {', '.join(content)}"
    if body is None:
        return None
    error = _first_error(schema, body)
    return None if error is None else f"{method} {path} answered {status}: {error}"


def _first_error(media: Document, body: Any) -> str | None:
    whole = media["schema"] | {"components": document()["components"]}
    error = next(iter(Draft202012Validator(whole).iter_errors(body)), None)
    return None if error is None else f"{list(error.absolute_path)}: {error.message[:300]}"


def check(response: httpx.Response) -> None:
    """An event hook of httpx: raises what the document does not say of this answer."""
    kind = response.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        return
    response.read()
    body = response.json() if "json" in kind and "jsonl" not in kind and response.content else None
    request = response.request
    fault = fault_in(request.method, request.url.path, response.status_code, kind, body)
    assert fault is None, fault
