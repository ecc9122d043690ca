"""OpenAI's embeddings call: `POST /v1/embeddings`. Unknown fields are ignored; what cannot be honoured is refused."""

from __future__ import annotations

from typing import Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.api import answers
from service.api.deps import Predicting, ServicesDep
from service.api.direct import Call
from service.api.measure import EMBEDDINGS
from service.api.problems import Problem

router = APIRouter(tags=["compatibility"])


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)
    model: str = Field(min_length=1, max_length=140)
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


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
        return (await answers.embeddings(body, Call(services, principal, request.scope, request.receive))).response()
    except Exception as error:
        response = answers.refuse_as_openai(error, request.scope)
        if response is None:
            raise
        return response


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
