"""The contract of `/predict` as msgspec structs, and the documents made of them: the only place that says either.

The OpenAPI document and the words of a refusal are derived from these structs (`openapi`, `body_errors`). An optional
field that is null counts as left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import orjson
from msgspec import Meta, Raw, Struct

from modeling.tasks import Answer
from service.inference.predictor import PredictResult

MAX_TIMEOUT_MS = 3_600_000

ModelName = Annotated[str, Meta(min_length=1, max_length=140)]
TopK = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Length = Annotated[int, Meta(ge=4, le=100_000)]
PromptName = Annotated[str, Meta(min_length=1, max_length=140)]
Milliseconds = Annotated[int, Meta(ge=1, le=MAX_TIMEOUT_MS)]
Aggregation = Literal["none", "simple", "first", "average", "max"]
OffsetUnit = Literal["codepoint", "utf16"]
Input = str | tuple[str, str]


class PredictParameters(Struct, frozen=True, forbid_unknown_fields=True):
    top_k: Annotated[TopK | None, Meta(description="at most this many scores, the best; not for regression")] = None
    threshold: Annotated[
        Share | None,
        Meta(
            description="one label: below it the label is null; several, or entities: from it on one is given",
        ),
    ] = None
    truncate: Annotated[bool | None, Meta(description="cut over-long inputs; otherwise they are refused with 422")] = (
        True
    )
    max_length: Annotated[Length | None, Meta(description="tokens to keep, special ones included")] = None
    return_embedding: Annotated[bool | None, Meta(description="add each input's vector")] = False
    timeout_ms: Annotated[Milliseconds | None, Meta(description="deadline of this request")] = None
    prompt_name: Annotated[
        PromptName | None,
        Meta(description="a prompt of the backbone, to come before each input instead of its default"),
    ] = None
    aggregation_strategy: Annotated[
        Aggregation | None,
        Meta(description="entities: how the pieces of a word become one, by Hugging Face's names; first if left out"),
    ] = None
    offset_unit: Annotated[
        OffsetUnit | None,
        Meta(description="entities: what start and end count; codepoint if left out, utf16 for JavaScript and Java"),
    ] = None


NO_PARAMETERS = PredictParameters()


class PredictRequest(Struct, frozen=True, forbid_unknown_fields=True):
    inputs: Annotated[str | list[Input], Meta(description="one string, or a list of strings and pairs of strings")]
    model: Annotated[ModelName | None, Meta(description="name, name@alias or name:version; default: default_model")] = (
        None
    )
    parameters: Annotated[PredictParameters | None, Meta(description="what to answer and how")] = NO_PARAMETERS


class Usage(Struct, gc=False):
    input_tokens: int


class PredictResponse(Struct):
    id: str
    object: Literal["predictions"]
    model: str
    version: int | None
    predictions: Sequence[Answer]
    usage: Usage


encode = msgspec.json.Encoder().encode


def predictions(result: PredictResult) -> bytes:
    """Return a `PredictResponse` as JSON; no member `embedding` if none was asked for."""
    for index, answer in enumerate(result.answers):
        answer.index = index
    embeddable: Sequence[Any] = result.answers
    for answer, vector in zip(embeddable, result.vectors, strict=False):  # no vectors if not asked for
        answer.embedding = decimals(vector)
    usage, id_ = Usage(result.input_tokens), f"pred_{os.urandom(16).hex()}"
    return encode(PredictResponse(id_, "predictions", result.model, result.version, result.answers, usage))


def decimals(vector: Any) -> Raw:
    """float32[width] as a JSON array, in the shortest decimals that read back the same."""
    return Raw(orjson.dumps(np.ascontiguousarray(vector, np.float32), option=orjson.OPT_SERIALIZE_NUMPY))


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
