"""The OpenAPI document: of the management routes by the framework, of the inference routes by their structs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from pydantic import TypeAdapter

from model_registry.refs import NAME_PATTERN
from modeling.tasks import TASKS
from service.api.compat.openai import EmbeddingsRequest
from service.api.inference import Route
from service.api.problems import MEDIA_TYPE
from service.api.routing import SECURITY, SECURITY_SCHEMES, with_common_refusals
from service.api.routing import refusals as refused_with
from service.api.schemas import FinetuneRequest, OpenAIError, ProblemDocument
from service.api.wire import MAX_TIMEOUT_MS, PredictRequest, PredictResponse

Document = dict[str, Any]

_REFERENCE: Final = "#/components/schemas/{name}"
_NAME: Final = NAME_PATTERN[1:-1]
_MODEL_PATTERN: Final = f"^{_NAME}(@{_NAME}|:[1-9][0-9]{{0,8}})?$"
_TEXT: Final = {"type": "string", "pattern": r"\S"}  # blank ones are refused as empty
_UNUSED: Final = ("HTTPValidationError", "ValidationError")  # the framework's own errors, which are never answered


def _example(model: str, **prediction: Any) -> Document:
    return {
        "id": "pred_…",
        "object": "predictions",
        "model": model,
        "version": 1,
        "predictions": [{"index": 0, **prediction}],
        "usage": {"input_tokens": 7},
    }


_EXAMPLES: Final[Mapping[type[msgspec.Struct], list[Document]]] = {
    PredictRequest: [{"model": "reviews", "inputs": ["a film that holds to the end"]}],
    PredictResponse: [
        _example("reviews", label="good", score=0.61, scores=[{"label": "good", "score": 0.61}]),
        _example("topics", labels=["sport"], scores=[{"label": "sport", "score": 0.93}]),
        _example("stars", value=3.42),
        _example("people", entities=[{"start": 0, "end": 3, "label": "PER", "score": 0.98, "text": "Ada"}]),
    ],
    EmbeddingsRequest: [{"model": "minilm", "input": ["one text", "another"], "encoding_format": "float"}],
}
_DEADLINE: Final = (
    f"The header `X-Request-Timeout-Ms` (1 to {MAX_TIMEOUT_MS}) shortens the deadline; if it cannot be met, the answer "
    "is 504 `deadline_exceeded`."
)
_ANSWER_HEADERS: Final = {
    "x-model-version": {"schema": {"type": "string"}, "description": "the version that answered"},
    "x-engine": {"schema": {"type": "string"}, "description": "runtime and precision"},
    "x-batch-size": {"schema": {"type": "string"}, "description": "rows in the largest batch that it was part of"},
    "server-timing": {"schema": {"type": "string"}, "description": "queue, tokenize, inference and total in ms"},
}


def with_inference(document: Document, routes: Mapping[str, Route[Any]]) -> Document:
    """The framework's document with `routes` before its own, errors and keys."""
    paths = {path: {"post": _operation(path, route)} for path, route in routes.items()}
    own = document.get("components", {}).get("schemas", {})
    schemas = _schemas_of(routes) | {name: schema for name, schema in own.items() if name not in _UNUSED}
    return document | {
        "paths": paths | document["paths"],
        "components": {"schemas": schemas, "securitySchemes": SECURITY_SCHEMES},
    }


def _schemas_of(routes: Mapping[str, Route[Any]]) -> Document:
    answers = list(dict.fromkeys(task.answer_type for task in TASKS.values()))
    structs = [struct for route in routes.values() for struct in (route.request, route.response)]
    _, schemas = msgspec.json.schema_components([*structs, *answers], ref_template=_REFERENCE)
    for struct, examples in _EXAMPLES.items():
        schemas[struct.__name__]["examples"] = examples
    # msgspec refuses unions of structs without tags, and answers carry none: they differ by their fields.
    lists = [{"type": "array", "items": _reference(answer)} for answer in answers]
    schemas[PredictResponse.__name__]["properties"]["predictions"] = {"anyOf": lists}
    del schemas["Answer"]
    _say_what_is_refused_later(schemas[PredictRequest.__name__], "inputs", pairs=True)
    _say_what_is_refused_later(schemas[EmbeddingsRequest.__name__], "input", pairs=False)
    for name, type_ in (
        (FinetuneRequest.__name__, FinetuneRequest),  # by hand, for it may be multipart too
        ("Problem", ProblemDocument),
        ("OpenAIError", OpenAIError),
    ):
        schema = TypeAdapter(type_).json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {}) | {name: schema}
    return schemas


def _say_what_is_refused_later(schema: Document, inputs: str, *, pairs: bool) -> None:
    """What is no matter of types: inputs that are empty, and names that can be no model."""
    properties = schema["properties"]
    pair = {"type": "array", "items": False, "minItems": 2, "maxItems": 2, "prefixItems": [_TEXT, {"type": "string"}]}
    one = {"anyOf": [_TEXT, pair]} if pairs else _TEXT
    several = {"type": "array", "items": one, "minItems": 1}
    properties[inputs] = {"description": properties[inputs]["description"], "anyOf": [_TEXT, several]}
    for option in properties["model"].get("anyOf", [properties["model"]]):
        if option.get("type") == "string":
            option["pattern"] = _MODEL_PATTERN


def _operation(path: str, route: Route[Any]) -> Document:
    """Named as the framework names its own."""
    media_types = tuple(dict.fromkeys((MEDIA_TYPE, route.errors)))
    operation: Document = {
        "tags": [route.tag],
        "summary": route.summary,
        "operationId": re.sub(r"\W", "_", f"{route.name}{path}") + "_post",
        "security": SECURITY,
        "x-scope": "predict",
        "description": _DEADLINE,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(route.request)}}},
        "responses": {
            "200": {
                "description": "Successful Response",
                "headers": _ANSWER_HEADERS,
                "content": {"application/json": {"schema": _reference(route.response)}},
            },
        },
    }
    refusals = with_common_refusals(refused_with(*route.refuses), is_keyed=True, media_types=media_types)
    operation["responses"] |= {str(status): response for status, response in sorted(refusals.items(), key=str)}
    if "{model}" in path:
        schema = {"type": "string", "title": "Model", "pattern": _MODEL_PATTERN}
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": schema}]
    return operation


def _reference(struct: type[Any]) -> Document:
    return {"$ref": _REFERENCE.format(name=struct.__name__)}
