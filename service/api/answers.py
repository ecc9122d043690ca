"""What the inference routes do with a request that is well-formed: the same for the framework and for the short way
around it."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Scope

from model_registry.refs import ModelRef
from modeling.tasks import Options
from service.api import wire
from service.api.direct import Answer, Call, DirectRoute
from service.api.guard import headers_of
from service.api.interrupt import unless_gone
from service.api.measure import EMBEDDINGS, PREDICT, PREDICT_WITH
from service.api.problems import Problem, problem_for, refusal
from service.inference.predictor import PredictResult

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


class PredictBody(Protocol):
    """`schemas.PredictRequest` or `wire.PredictBody`."""

    @property
    def model(self) -> str | None: ...
    @property
    def inputs(self) -> str | Sequence[str | tuple[str, str]]: ...
    @property
    def parameters(self) -> Parameters: ...


class EmbeddingsBody(Protocol):
    """`openai.EmbeddingsRequest` or `wire.EmbeddingsBody`."""

    @property
    def model(self) -> str: ...
    @property
    def input(self) -> str | list[str]: ...
    @property
    def encoding_format(self) -> str: ...
    @property
    def dimensions(self) -> int | None: ...


async def predict(body: PredictBody, call: Call) -> Answer:
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


async def embeddings(body: EmbeddingsBody, call: Call) -> Answer:
    """Raises what `Predictor.predict` raises, and problems of the request that its schema does not show."""
    inputs = [body.input] if isinstance(body.input, str) else body.input
    options = _options(None, None, True, None, True)
    result = await predicted(call, body.model, inputs, options, needs_labels=False)
    vectors = result.vectors
    if body.dimensions is not None and body.dimensions != len(vectors[0]):
        message = f"this model's embeddings have {len(vectors[0])} dimensions; leave dimensions out"
        raise Problem(422, "invalid_request", message)
    encode = wire.in_base64 if body.encoding_format == "base64" else wire.decimals
    data = [wire.Embedding("embedding", index, encode(vector)) for index, vector in enumerate(vectors)]
    document = wire.Embeddings("list", data, body.model, wire.EmbeddingsUsage(result.input_tokens, result.input_tokens))
    return Answer(wire.encode(document), timing_headers(result))


def refuse_as_openai(error: Exception, scope: Scope) -> Response | None:
    """The answer to `error` in OpenAI's shape; None where it is a fault of ours."""
    problem = problem_for(error)
    return None if problem is None else _openai_error(problem)


_PREDICT: Final = DirectRoute(wire.decode_predict, predict, refusal)
ROUTES: Final[Mapping[str, DirectRoute[Any]]] = {
    PREDICT: _PREDICT,
    PREDICT_WITH: _PREDICT,
    EMBEDDINGS: DirectRoute(wire.decode_embeddings, embeddings, refuse_as_openai),
}


async def predicted(
    call: Call,
    model: str | None,
    inputs: Sequence[str | tuple[str, str]],
    options: Options,
    *,
    timeout_ms: int | None = None,
    needs_labels: bool = True,
) -> PredictResult:
    """The predictor's result within the request's deadline, as long as its client is there; names the model to the
    metrics."""
    services, tenant = call.services, call.principal.tenant
    ref = reference(model, services.settings.default_model)
    deadline = time.monotonic() + _allowed_s(call, timeout_ms)
    found = await services.pool.find(tenant, ref)
    call.scope["state"]["metric_labels"] = found.metric_labels
    work = services.predictor.predict(found, inputs, options, deadline=deadline, needs_labels=needs_labels)
    return await unless_gone(call.scope, call.receive, work)


def timing_headers(result: PredictResult) -> list[tuple[bytes, bytes]]:
    timings = result.timings
    stages = b"queue;dur=%.2f, tokenize;dur=%.2f, inference;dur=%.2f, total;dur=%.2f" % (
        timings.queue * 1000,
        timings.preprocess * 1000,
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
_options = functools.lru_cache(maxsize=1024)(Options)
_parsed = functools.lru_cache(maxsize=1024)(ModelRef.parse)


def reference(model: str | None, default: str | None) -> ModelRef:
    """Raises 422 where no model is named and none is the default, `InvalidReference` where the name is malformed."""
    name = model or default
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
    for index, answer in enumerate(result.answers):
        answer.index = index
    embeddable: Sequence[Any] = result.answers
    for answer, vector in zip(embeddable, result.vectors, strict=False):  # no vectors if not asked for
        answer.embedding = wire.decimals(vector)
    usage = wire.Usage(result.input_tokens)
    id_ = f"pred_{os.urandom(16).hex()}"
    return wire.encode(wire.Predictions(id_, "predictions", result.model, result.version, result.answers, usage))


def _openai_error(problem: Problem) -> Response:
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    if problem.status == 429:
        kind = "rate_limit_error"
    document = {"error": {"message": problem.detail, "type": kind, "param": None, "code": problem.code}}
    headers = dict(problem.headers or {})
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after_s)))
    return Response(orjson.dumps(document), problem.status, headers, media_type="application/json")
