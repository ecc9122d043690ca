"""OpenAI's embeddings call: `POST /v1/embeddings`. Unknown fields are ignored; what cannot be honoured is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import numpy as np
import orjson
from msgspec import Meta, Raw, Struct
from starlette.responses import Response
from starlette.types import Scope

from service.api import wire
from service.api.inference import Call, Reply, Route, options_of, predicted
from service.api.problems import Problem, problem_for

MAX_INPUTS = 2048
"""As many as OpenAI takes, so that its clients need not know our limits; they are computed in parts."""

Encoding = Literal["float", "base64"]
Numbers = Annotated[Raw, Meta(extra_json_schema={"type": "array", "items": {"type": "number"}})]


class EmbeddingsRequest(Struct, frozen=True):
    model: Annotated[wire.ModelName, Meta(description="name, name@alias or name:version")]
    input: Annotated[str | list[str], Meta(description="one string, or several; token ids are not accepted")]
    encoding_format: Annotated[Encoding | None, Meta(description="how each embedding is written")] = "float"
    dimensions: Annotated[int | None, Meta(description="taken if it is what the model has")] = None
    user: Annotated[str | None, Meta(description="not used")] = None
    prompt_name: Annotated[
        wire.PromptName | None,
        Meta(description="beyond OpenAI's call: a prompt of the backbone, before each input instead of its default"),
    ] = None


class Embedding(Struct, gc=False):
    """`embedding` is numbers, or float32 in base64: what msgspec makes of a memoryview."""

    object: Literal["embedding"]
    index: int
    embedding: Numbers | memoryview


class EmbeddingsUsage(Struct, gc=False):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Struct):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


async def embeddings(body: EmbeddingsRequest, call: Call) -> Reply:
    """Raises what `Predictor.predict` raises, and problems of the request that its schema does not show."""
    inputs = [body.input] if isinstance(body.input, str) else body.input
    at_most = max(MAX_INPUTS, call.services.settings.max_client_batch_size)
    options = options_of(return_embedding=True, prompt_name=body.prompt_name)
    result = await predicted(call, body.model, inputs, options, needs_labels=False, max_inputs=at_most)
    vectors = result.vectors
    if body.dimensions is not None and body.dimensions != len(vectors[0]):
        message = f"this model's embeddings have {len(vectors[0])} dimensions; leave dimensions out"
        raise Problem(422, "invalid_request", message)
    encode = in_base64 if body.encoding_format == "base64" else wire.decimals
    data = [Embedding("embedding", index, encode(vector)) for index, vector in enumerate(vectors)]
    usage = EmbeddingsUsage(result.input_tokens, result.input_tokens)
    return wire.encode(EmbeddingsResponse("list", data, body.model, usage)), wire.timing_headers(result)


def in_base64(vector: Any) -> memoryview:
    return np.ascontiguousarray(vector, "<f4").data.cast("B")


def refuse(error: Exception, scope: Scope) -> Response | None:
    """The answer to `error` in OpenAI's shape; None if it is a fault of ours."""
    problem = problem_for(error)
    if problem is None:
        return None
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    if problem.status == 429:
        kind = "rate_limit_error"
    is_of_input = problem.status == 422 and any(place.get("loc", ())[1:2] == ["input"] for place in problem.errors)
    message = f"{problem.detail} Token ids are not accepted; send strings." if is_of_input else problem.detail
    document = {"error": {"message": message, "type": kind, "param": None, "code": problem.code}}
    headers = dict(problem.headers)
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after_s)))
    return Response(orjson.dumps(document), problem.status, headers, media_type="application/json")


ROUTES: Final[Mapping[str, Route[Any]]] = {
    "/v1/embeddings": Route(
        "embeddings",
        "Embeddings, as OpenAI's clients ask for them",
        EmbeddingsRequest,
        EmbeddingsResponse,
        embeddings,
        refuse,
        "application/json",
        tag="compatibility",
        needs_json=False,
    )
}
