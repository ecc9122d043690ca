"""OpenAI's embeddings call: `POST /v1/embeddings`. Unknown fields are ignored; what cannot be honoured is refused."""

from __future__ import annotations

import base64
from typing import Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.api.deps import Predicting, ServicesDep
from service.api.interrupt import unless_gone
from service.api.predict import deadline_of, reference, timing_headers
from service.api.problems import Problem, problem_for
from service.inference.predictor import PredictOptions

router = APIRouter(tags=["compatibility"])


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)
    model: str = Field(min_length=1, max_length=140)
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


@router.post(
    "/v1/embeddings",
    summary="Embeddings, as OpenAI's clients ask for them",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": EmbeddingsRequest.model_json_schema()}},
        }
    },
)
async def embeddings(request: Request, services: ServicesDep, principal: Predicting) -> Response:
    try:
        body = _parse(await request.body())
        inputs = [body.input] if isinstance(body.input, str) else body.input
        ref = reference(body.model, services)
        request.state.metric_labels = services.pool.labels_of(principal.tenant, ref)
        result = await unless_gone(
            request.scope,
            request.receive,
            services.predictor.predict(
                principal.tenant, ref, inputs, PredictOptions(return_embedding=True),
                deadline=deadline_of(request, services, None), needs_labels=False,
            ),
        )  # fmt: skip
    except Exception as error:
        problem = problem_for(error)
        if problem is None:
            raise
        return _openai_error(problem)
    vectors = [prediction.embedding for prediction in result.predictions]
    if body.dimensions is not None and vectors[0] is not None and body.dimensions != len(vectors[0]):
        message = f"this model's embeddings have {len(vectors[0])} dimensions; leave dimensions out"
        return _openai_error(Problem(422, "invalid_request", message))
    document = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encode(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": result.input_tokens, "total_tokens": result.input_tokens},
    }
    content = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, media_type="application/json", headers=timing_headers(result))


def _parse(content: bytes) -> EmbeddingsRequest:
    try:
        values = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise Problem(400, "malformed_request", "the body is not JSON") from error
    try:
        return EmbeddingsRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = str(first["loc"][0]) if first["loc"] else "body"
        hint = "; token ids are not accepted, send text" if place == "input" else ""
        raise Problem(422, "invalid_request", f"{place}: {first['msg']}{hint}") from error


def _encode(vector: Any, encoding: str) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector


def _openai_error(problem: Problem) -> Response:
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    if problem.status == 429:
        kind = "rate_limit_error"
    document = {"error": {"message": problem.detail, "type": kind, "param": None, "code": problem.code}}
    headers = dict(problem.headers or {})
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, -int(-problem.retry_after_s // 1)))
    return Response(orjson.dumps(document), problem.status, headers, media_type="application/json")
