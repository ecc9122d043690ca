"""OpenAI's embeddings call: `POST /v1/embeddings`. Unknown fields are ignored; what cannot be honoured is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from msgspec import Meta, Raw, Struct
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Scope

from service.api import wire
from service.api.deps import Predicting, ServicesDep
from service.api.direct import Answer, Call, DirectRoute
from service.api.measure import EMBEDDINGS
from service.api.predict import predicted, timing_headers
from service.api.problems import Problem, problem_for
from service.inference.predictor import PredictOptions

router = APIRouter(tags=["compatibility"])
_OPTIONS = PredictOptions(return_embedding=True)


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)
    model: str = Field(min_length=1, max_length=140)
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class EmbeddingsBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What the OpenAI client sends, read in one pass. Bodies with more in them are left to `EmbeddingsRequest`."""

    model: Annotated[str, Meta(min_length=1, max_length=140)]
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=1 << 32)] | None = None  # orjson reads huge integers as floats
    user: str | None = None


class Body(Protocol):
    """`EmbeddingsRequest` or `EmbeddingsBody`."""

    @property
    def model(self) -> str: ...
    @property
    def input(self) -> str | list[str]: ...
    @property
    def encoding_format(self) -> str: ...
    @property
    def dimensions(self) -> int | None: ...


class Embedding(Struct, gc=False):
    object: str
    index: int
    embedding: Raw | memoryview  # msgspec writes a memoryview in base64


class Usage(Struct, gc=False):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct):
    object: str
    data: list[Embedding]
    model: str
    usage: Usage


@router.post(
    EMBEDDINGS,
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
        return (await answer(body, Call(services, principal, request.scope, request.receive))).response()
    except Exception as error:
        response = refuse(error, request.scope)
        if response is None:
            raise
        return response


async def answer(body: Body, call: Call) -> Answer:
    """Raises what `Predictor.predict` raises, and problems of the request that its schema does not show."""
    inputs: Sequence[str] = [body.input] if isinstance(body.input, str) else body.input
    result = await predicted(call, body.model, inputs, _OPTIONS, needs_labels=False)
    vectors = [prediction.embedding for prediction in result.predictions]
    if body.dimensions is not None and vectors[0] is not None and body.dimensions != len(vectors[0]):
        message = f"this model's embeddings have {len(vectors[0])} dimensions; leave dimensions out"
        raise Problem(422, "invalid_request", message)
    encode = _in_base64 if body.encoding_format == "base64" else wire.decimals
    data = [Embedding("embedding", index, encode(vector)) for index, vector in enumerate(vectors)]
    document = Embeddings("list", data, body.model, Usage(result.input_tokens, result.input_tokens))
    return Answer(wire.encode(document), timing_headers(result))


def refuse(error: Exception, scope: Scope) -> Response | None:
    """The answer to `error` in OpenAI's shape; None where it is a fault of ours."""
    problem = problem_for(error)
    return None if problem is None else _openai_error(problem)


DIRECT = DirectRoute(msgspec.json.Decoder(EmbeddingsBody).decode, answer, refuse)


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


def _in_base64(vector: Any) -> memoryview:
    return np.ascontiguousarray(vector, "<f4").data.cast("B")


def _openai_error(problem: Problem) -> Response:
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    if problem.status == 429:
        kind = "rate_limit_error"
    document = {"error": {"message": problem.detail, "type": kind, "param": None, "code": problem.code}}
    headers = dict(problem.headers or {})
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after_s)))
    return Response(orjson.dumps(document), problem.status, headers, media_type="application/json")
