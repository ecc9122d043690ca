"""`POST /predict` and its alias under a model's name."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from itertools import starmap
from typing import Protocol

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from model_registry.refs import ModelRef
from modeling.preprocess import TextInput
from service.api import wire
from service.api.deps import JsonBody, Predicting, Services, ServicesDep
from service.api.direct import Answer, Call, DirectRoute
from service.api.guard import headers_of
from service.api.interrupt import unless_gone
from service.api.measure import PREDICT, PREDICT_WITH
from service.api.problems import Problem, refusal
from service.api.schemas import PredictRequest, PredictResponse
from service.inference.predictor import PredictOptions, PredictResult

router = APIRouter(tags=["inference"])
_MAX_TIMEOUT_MS = 3_600_000


class Parameters(Protocol):
    """`schemas.PredictParameters` or `wire.Parameters`."""

    @property
    def top_k(self) -> int | None: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def truncate(self) -> bool: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def return_embedding(self) -> bool: ...
    @property
    def timeout_ms(self) -> int | None: ...


class Body(Protocol):
    """`schemas.PredictRequest` or `wire.PredictBody`."""

    @property
    def model(self) -> str | None: ...
    @property
    def inputs(self) -> str | Sequence[TextInput]: ...
    @property
    def parameters(self) -> Parameters: ...


@router.post(PREDICT, response_model=PredictResponse, dependencies=[JsonBody], summary="Predict labels for texts")
async def predict(body: PredictRequest, request: Request, services: ServicesDep, principal: Predicting) -> Response:
    return (await answer(body, Call(services, principal, request.scope, request.receive))).response()


@router.post(
    PREDICT_WITH, response_model=PredictResponse, dependencies=[JsonBody], summary="Predict with the model in the path"
)
async def predict_with(
    model: str, body: PredictRequest, request: Request, services: ServicesDep, principal: Predicting
) -> Response:
    return (await answer(body, Call(services, principal, request.scope, request.receive, model))).response()


async def answer(body: Body, call: Call) -> Answer:
    """Raises what `Predictor.predict` raises, and problems of the request that its schema does not show."""
    if call.model is not None and body.model not in (None, call.model):
        raise Problem(422, "invalid_request", f"the path names {call.model!r}, the body {body.model!r}; name it once")
    parameters = body.parameters
    options = _options(
        parameters.top_k, parameters.threshold, parameters.truncate, parameters.max_length, parameters.return_embedding
    )
    inputs = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    result = await predicted(call, call.model or body.model, inputs, options, timeout_ms=parameters.timeout_ms)
    return Answer(_encoded(result), timing_headers(result))


DIRECT = DirectRoute(wire.decode_predict, answer, refusal)


async def predicted(
    call: Call, model: str | None, inputs: Sequence[TextInput], options: PredictOptions, *,
    timeout_ms: int | None = None, needs_labels: bool = True,
) -> PredictResult:  # fmt: skip
    """The predictor's result within the request's deadline, as long as its client is there; names the model to the
    metrics."""
    services, tenant = call.services, call.principal.tenant
    ref = _reference(model, services)
    call.scope["state"]["metric_labels"] = services.pool.labels_of(tenant, ref)
    deadline = time.monotonic() + _allowed_s(call, timeout_ms)
    work = services.predictor.predict(tenant, ref, inputs, options, deadline=deadline, needs_labels=needs_labels)
    return await unless_gone(call.scope, call.receive, work)


def timing_headers(result: PredictResult) -> list[tuple[bytes, bytes]]:
    timings = result.timings
    stages = b"queue;dur=%.2f, tokenize;dur=%.2f, inference;dur=%.2f, total;dur=%.2f" % (
        timings.queue * 1000,
        timings.tokenize * 1000,
        timings.inference * 1000,
        timings.total * 1000,
    )
    return [
        (b"x-model-version", b"" if result.version is None else b"%d" % result.version),
        (b"x-engine", result.engine.encode()),
        (b"x-batch-size", b"%d" % result.batch_rows),
        (b"server-timing", stages),
    ]


# Clients send the same few models and options over and over.
_options = functools.lru_cache(maxsize=1024)(PredictOptions)
_parsed = functools.lru_cache(maxsize=1024)(ModelRef.parse)


def _reference(model: str | None, services: Services) -> ModelRef:
    """Raises 422 where no model is named and none is the default, `InvalidReference` where the name is malformed."""
    name = model or services.settings.default_model
    if name is None:
        raise Problem(422, "invalid_request", "name a model; this service has no default_model")
    return _parsed(name)


def _allowed_s(call: Call, timeout_ms: int | None) -> float:
    """The shortest of body, header and default, in seconds."""
    allowed_s = call.services.settings.request_timeout_s
    header = headers_of(call.scope).get(b"x-request-timeout-ms")
    if header is not None:
        if not (header.isdigit() and len(header) <= 12 and 0 < int(header) <= _MAX_TIMEOUT_MS):
            raise Problem(422, "invalid_request", "X-Request-Timeout-Ms must be a whole number from 1 to 3600000")
        allowed_s = min(allowed_s, int(header) / 1000)
    return allowed_s if timeout_ms is None else min(allowed_s, timeout_ms / 1000)


def _encoded(result: PredictResult) -> bytes:
    """`schemas.PredictResponse` as JSON; no member `embedding` where none was asked for."""
    rows = [
        wire.Row(
            index, prediction.label, prediction.score, list(starmap(wire.Score, prediction.scores)),
            UNSET if prediction.embedding is None else wire.decimals(prediction.embedding),
        )
        for index, prediction in enumerate(result.predictions)
    ]  # fmt: skip
    usage = wire.Usage(result.input_tokens)
    return wire.encode(
        wire.Predictions(f"pred_{os.urandom(16).hex()}", "predictions", result.model, result.version, rows, usage)
    )
