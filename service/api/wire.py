"""Bodies of the predict routes as msgspec structs: one pass between bytes and objects.

`PredictBody` takes no more than `schemas.PredictRequest`, which documents the route and words every refusal, and is
tried before it (`direct`); so does `EmbeddingsBody` for `openai.EmbeddingsRequest`. The structs of the answer mirror
`schemas.PredictResponse`. `test_direct.py` holds the two sides together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import orjson
from msgspec import Meta, Raw, Struct

from modeling.tasks import Answer


class Parameters(Struct, frozen=True, forbid_unknown_fields=True):
    top_k: Annotated[int, Meta(ge=1)] | None = None
    threshold: Annotated[float, Meta(ge=0, le=1)] | None = None
    truncate: bool = True
    max_length: Annotated[int, Meta(ge=4, le=100_000)] | None = None
    return_embedding: bool = False
    timeout_ms: Annotated[int, Meta(ge=1, le=3_600_000)] | None = None


class PredictBody(Struct, frozen=True, forbid_unknown_fields=True):
    inputs: str | list[str | tuple[str, str]]
    model: Annotated[str, Meta(min_length=1, max_length=140)] | None = None
    parameters: Parameters = Parameters()

    def __post_init__(self) -> None:
        if type(self.inputs) is list and len(set(map(type, self.inputs))) > 1:
            raise ValueError("texts and pairs in one list")  # msgspec has no union of two lists


class EmbeddingsBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What the OpenAI client sends, read in one pass. Bodies with more in them go to `openai.EmbeddingsRequest`."""

    model: Annotated[str, Meta(min_length=1, max_length=140)]
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=1 << 32)] | None = None  # orjson reads huge integers as floats
    user: str | None = None


class Usage(Struct, gc=False):
    input_tokens: int


class Predictions(Struct):
    id: str
    object: str
    model: str
    version: int | None
    predictions: Sequence[Answer]
    usage: Usage


class Embedding(Struct, gc=False):
    object: str
    index: int
    embedding: Raw | memoryview  # msgspec writes a memoryview in base64


class EmbeddingsUsage(Struct, gc=False):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct):
    object: str
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


decode_predict = msgspec.json.Decoder(PredictBody).decode
decode_embeddings = msgspec.json.Decoder(EmbeddingsBody).decode
encode = msgspec.json.Encoder().encode


def decimals(vector: Any) -> Raw:
    """float32[width] as a JSON array, in the shortest decimals that read back the same."""
    return Raw(orjson.dumps(np.ascontiguousarray(vector, np.float32), option=orjson.OPT_SERIALIZE_NUMPY))


def in_base64(vector: Any) -> memoryview:
    return np.ascontiguousarray(vector, "<f4").data.cast("B")
