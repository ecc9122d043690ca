"""`POST /predict` and its alias under a model's name."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

import orjson
from fastapi import APIRouter, Request, Response

from model_registry.refs import ModelRef
from modeling.preprocess import TextInput
from service.api.auth import Principal
from service.api.deps import JsonBody, Predicting, Services, ServicesDep
from service.api.interrupt import unless_gone
from service.api.problems import Problem
from service.api.schemas import PredictRequest, PredictResponse
from service.inference.predictor import PredictOptions, PredictResult

router = APIRouter(tags=["inference"])


@router.post("/predict", response_model=PredictResponse, dependencies=[JsonBody], summary="Predict labels for texts")
async def predict(body: PredictRequest, request: Request, services: ServicesDep, principal: Predicting) -> Response:
    return await _predict(body, request, services, principal, body.model)


@router.post(
    "/v1/models/{model}/predict", response_model=PredictResponse, dependencies=[JsonBody],
    summary="Predict with the model in the path",
)  # fmt: skip
async def predict_with(
    model: str, body: PredictRequest, request: Request, services: ServicesDep, principal: Predicting
) -> Response:
    if body.model is not None and body.model != model:
        raise Problem(422, "invalid_request", f"the path names {model!r}, the body {body.model!r}; name it once")
    return await _predict(body, request, services, principal, model)


async def _predict(
    body: PredictRequest, request: Request, services: Services, principal: Principal, model: str | None
) -> Response:
    options = PredictOptions(
        top_k=body.parameters.top_k,
        threshold=body.parameters.threshold,
        truncate=body.parameters.truncate,
        max_length=body.parameters.max_length,
        return_embedding=body.parameters.return_embedding,
    )
    inputs: Sequence[TextInput] = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    ref = reference(model, services)
    request.state.metric_labels = services.pool.labels_of(principal.tenant, ref)
    result = await unless_gone(
        request.scope,
        request.receive,
        services.predictor.predict(
            principal.tenant, ref, inputs, options,
            deadline=deadline_of(request, services, body.parameters.timeout_ms),
        ),
    )  # fmt: skip
    return Response(orjson.dumps(_document(result)), media_type="application/json", headers=timing_headers(result))


def reference(model: str | None, services: Services) -> ModelRef:
    """Raises 422 where no model is named and none is the default, `InvalidReference` where the name is malformed."""
    name = model or services.settings.default_model
    if name is None:
        raise Problem(422, "invalid_request", "name a model; this service has no default_model")
    return ModelRef.parse(name)


def deadline_of(request: Request, services: Services, timeout_ms: int | None) -> float:
    """The earliest of body, header and default, in `time.monotonic` seconds."""
    limits_s = [services.settings.request_timeout_s]
    header = request.headers.get("x-request-timeout-ms")
    if header is not None:
        if not (header.isascii() and header.isdigit() and 0 < int(header[:12]) <= 3_600_000):
            raise Problem(422, "invalid_request", "X-Request-Timeout-Ms must be a whole number from 1 to 3600000")
        limits_s.append(int(header) / 1000)
    if timeout_ms is not None:
        limits_s.append(timeout_ms / 1000)
    return time.monotonic() + min(limits_s)


def timing_headers(result: PredictResult) -> dict[str, str]:
    stages = {
        "queue": result.timings.queue,
        "tokenize": result.timings.tokenize,
        "inference": result.timings.inference,
        "total": result.timings.total,
    }
    return {
        "x-model-version": "" if result.version is None else str(result.version),
        "x-engine": result.engine,
        "x-batch-size": str(result.batch_rows),
        "server-timing": ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items()),
    }


def _document(result: PredictResult) -> dict[str, Any]:
    rows = []
    for index, prediction in enumerate(result.predictions):
        row: dict[str, Any] = {
            "index": index,
            "label": prediction.label,
            "score": prediction.score,
            "scores": [{"label": label, "score": score} for label, score in prediction.scores],
        }
        if prediction.embedding is not None:
            row["embedding"] = cast(Any, prediction.embedding).tolist()
        rows.append(row)
    return {
        "id": f"pred_{uuid.uuid4().hex}",
        "object": "predictions",
        "model": result.model,
        "version": result.version,
        "predictions": rows,
        "usage": {"input_tokens": result.input_tokens},
    }
