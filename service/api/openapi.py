"""The OpenAPI document: of the management routes by the framework, of the inference routes by their structs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from modeling.tasks import TASKS
from service.api.inference import Route
from service.api.schemas import FinetuneRequest
from service.api.wire import PredictRequest, PredictResponse

Document = dict[str, Any]

_REFERENCE: Final = "#/components/schemas/{name}"


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
    ],
}


def with_inference(document: Document, routes: Mapping[str, Route[Any]]) -> Document:
    """The framework's document with `routes` before its own."""
    answers = list(dict.fromkeys(task.answer_type for task in TASKS.values()))
    structs = [struct for route in routes.values() for struct in (route.request, route.response)]
    _, schemas = msgspec.json.schema_components([*structs, *answers], ref_template=_REFERENCE)
    for struct, examples in _EXAMPLES.items():
        schemas[struct.__name__]["examples"] = examples
    # msgspec refuses unions of structs without tags, and answers carry none: they differ by their fields.
    lists = [{"type": "array", "items": _reference(answer)} for answer in answers]
    schemas[PredictResponse.__name__]["properties"]["predictions"] = {"anyOf": lists}
    del schemas["Answer"]
    by_hand = FinetuneRequest.model_json_schema(ref_template="#/components/schemas/{model}")  # it may be multipart too
    schemas |= by_hand.pop("$defs") | {FinetuneRequest.__name__: by_hand}
    paths = {path: {"post": _operation(path, route)} for path, route in routes.items()}
    components = document.get("components", {})
    return document | {
        "paths": paths | document["paths"],
        "components": components | {"schemas": schemas | components.get("schemas", {})},
    }


def _operation(path: str, route: Route[Any]) -> Document:
    """Named as the framework names its own."""
    operation: Document = {
        "tags": [route.tag],
        "summary": route.summary,
        "operationId": re.sub(r"\W", "_", f"{route.name}{path}") + "_post",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(route.request)}}},
        "responses": {
            "200": {
                "description": "Successful Response",
                "content": {"application/json": {"schema": _reference(route.response)}},
            },
            "422": {
                "description": "Validation Error",
                "content": {route.errors: {"schema": {"type": "object"}}},
            },
        },
    }
    if "{model}" in path:
        schema = {"type": "string", "title": "Model"}
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": schema}]
    return operation


def _reference(struct: type[Any]) -> Document:
    return {"$ref": _REFERENCE.format(name=struct.__name__)}
