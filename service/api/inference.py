"""The inference routes, from ASGI to the predictor and back, beside the framework.

`InferenceRoutes` counts a request, asks who calls, reads the body into the route's struct and sends what the route
answers, or the problem that it raises. What a route takes and gives is in `wire` and in `compat`.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec
from msgspec import Struct
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from model_registry.refs import ModelRef
from modeling.tasks import Options
from service.api import wire
from service.api.auth import KeyAuthentication, Principal
from service.api.body_errors import read_or_explain
from service.api.cancellation import unless_gone
from service.api.deps import Services
from service.api.guard import headers_of
from service.api.problems import MEDIA_TYPE, Problem, refusal
from service.api.routing import not_json
from service.inference.predictor import PredictResult
from service.metrics import ServingMetrics

Body = TypeVar("Body")

Reply = tuple[bytes, list[tuple[bytes, bytes]]]
"""A JSON document, to be sent with status 200, and headers."""
Refuse = Callable[[Exception, Scope], Response | None]
NO_MODEL: Final = ("", "", "", "")


@dataclass(slots=True)
class Call:
    """What a route knows of a request besides its body. `model` is the one in the path."""

    services: Services
    principal: Principal
    scope: Scope
    model: str | None = None


@dataclass(frozen=True)
class Route(Generic[Body]):
    """`refuse` gives the response to an error of `answer` or of the body, None if it is a fault of ours. Its media
    type is `errors`, and `refuses` are the codes. Clients may name any content type unless the route `needs_json`."""

    name: str
    summary: str
    request: type[Body]
    response: type[Struct]
    answer: Callable[[Body, Call], Awaitable[Reply]]
    refuse: Refuse = refusal
    errors: str = MEDIA_TYPE
    tag: str = "inference"
    needs_json: bool = True
    refuses: tuple[str, ...] = (
        "deadline_exceeded",
        "empty_input",
        "inference_failed",
        "input_too_long",
        "model_not_found",
        "model_not_ready",
        "queue_full",
    )

    @functools.cached_property
    def decode(self) -> Callable[[bytes], Body]:
        return msgspec.json.Decoder(self.request).decode


class InferenceRoutes:
    """ASGI: answers `routes` by their path, and leaves all others to `app`. A path may hold `{model}` once.

    `services` is set once the application has started.
    """

    services: Services

    def __init__(
        self, app: ASGIApp, routes: Mapping[str, Route[Any]], keys: KeyAuthentication, metrics: ServingMetrics
    ) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics
        self._routes = [
            (re.compile(path.replace("{model}", "(?P<model>[^/]+)")).fullmatch, route) for path, route in routes.items()
        ]

    def find(self, path: str) -> tuple[Route[Any], str | None] | None:
        """The route that takes `path`, and the model that the path names; None if it is no inference."""
        for match, route in self._routes:
            if (found := match(path)) is not None:
                return route, found.groupdict().get("model")
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self.find(scope["path"]) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        try:
            status = await self._answer(*found, scope, receive, send)
        finally:
            labels = scope["state"].get("metric_labels", NO_MODEL)
            self._metrics.count_request(labels, status=status, seconds=time.monotonic() - started)

    async def _answer(self, route: Route[Any], model: str | None, scope: Scope, receive: Receive, send: Send) -> int:
        """Send an answer; return its status. Raises what is a fault of ours."""
        refuse: Refuse = refusal
        try:
            principal = self._keys.admit(scope["headers"])
            _refuse_if_unfit(route, principal, scope)
            refuse = route.refuse
            body = await _read(route, receive)
            content, headers = await route.answer(body, Call(self.services, principal, scope, model))
        except Exception as error:
            response = refuse(error, scope)
            if response is None:
                raise
            await response(scope, receive, send)
            return response.status_code
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})
        return 200


async def predict(body: wire.PredictRequest, call: Call) -> Reply:
    """Raises what `Predictor.predict` raises, and problems of the request that its schema does not show."""
    if call.model is not None and body.model not in (None, call.model):
        raise Problem(422, "invalid_request", f"the path names {call.model!r}, the body {body.model!r}; name it once")
    given = body.parameters or wire.NO_PARAMETERS
    options = options_of(
        given.top_k,
        given.threshold,
        given.truncate is not False,
        given.max_length,
        given.return_embedding is True,
        given.prompt_name,
        given.aggregation_strategy,
        given.offset_unit,
    )
    inputs = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    result = await predicted(call, call.model or body.model, inputs, options, timeout_ms=given.timeout_ms)
    return wire.predictions(result), wire.timing_headers(result)


async def predicted(
    call: Call,
    model: str | None,
    inputs: Sequence[wire.Input],
    options: Options,
    *,
    timeout_ms: int | None = None,
    needs_labels: bool = True,
    max_inputs: int | None = None,
) -> PredictResult:
    """The predictor's result within the request's deadline, as long as its client is there; names the model to the
    metrics."""
    services, tenant = call.services, call.principal.tenant
    ref = reference(model, services.settings.default_model)
    deadline = time.monotonic() + _allowed_s(call, timeout_ms)
    found = await services.pool.find(tenant, ref)
    call.scope["state"]["metric_labels"] = found.metric_labels
    work = services.predictor.predict(
        found, inputs, options, deadline=deadline, needs_labels=needs_labels, max_inputs=max_inputs
    )
    return await unless_gone(call.scope, work)


# Clients send the same few models and options over and over.
options_of = functools.lru_cache(maxsize=1024)(Options)
_parsed = functools.lru_cache(maxsize=1024)(ModelRef.parse)

ROUTES: Final[Mapping[str, Route[Any]]] = {
    "/predict": Route("predict", "Predict labels or values", wire.PredictRequest, wire.PredictResponse, predict),
    "/v1/models/{model}/predict": Route(
        "predict_with", "Predict with the model in the path", wire.PredictRequest, wire.PredictResponse, predict
    ),
}


def reference(model: str | None, default: str | None) -> ModelRef:
    """Raises 422 if no model is named and none is the default, `InvalidReference` if the name is malformed."""
    name = model or default
    if name is None:
        raise Problem(422, "invalid_request", "name a model; this service has no default_model")
    return _parsed(name)


def _allowed_s(call: Call, timeout_ms: int | None) -> float:
    """The shortest of body, header and default, in seconds."""
    allowed_s = call.services.settings.request_timeout_s
    header = headers_of(call.scope).get(b"x-request-timeout-ms")
    if header is not None:
        if not (header.isdigit() and len(header) <= 12 and 0 < int(header) <= wire.MAX_TIMEOUT_MS):
            raise Problem(422, "invalid_request", "X-Request-Timeout-Ms must be a whole number from 1 to 3600000")
        allowed_s = min(allowed_s, int(header) / 1000)
    return allowed_s if timeout_ms is None else min(allowed_s, timeout_ms / 1000)


def _refuse_if_unfit(route: Route[Any], principal: Principal, scope: Scope) -> None:
    """What a request's head alone condemns."""
    if scope["method"] != "POST":
        raise Problem(405, "method_not_allowed", "This route does not take this method.", headers={"Allow": "POST"})
    principal.demand("predict")
    media_type = headers_of(scope).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if route.needs_json and not media_type.endswith(b"json"):
        raise not_json()


async def _read(route: Route[Body], receive: Receive) -> Body:
    """The body as the route's struct. Raises 400 or 422."""
    parts = []
    is_whole = False
    while not is_whole:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(400, "malformed_request", "The client went away before the body ended.")
        parts.append(message.get("body", b""))
        is_whole = not message.get("more_body", False)
    content = b"".join(parts)
    try:
        return route.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return await read_or_explain(content, route.request)
