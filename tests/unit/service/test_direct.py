"""The short way through the inference routes against the long one: whatever the body, both answer alike."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from model_registry.errors import DatabaseUnavailable, ModelNotFound
from modeling.tasks import Options
from modeling.tasks.multi_label import ManyLabels
from modeling.tasks.regression import Value
from service.api import answers, wire
from service.api.compat import openai
from service.api.direct import DirectRoutes
from service.api.measure import EMBEDDINGS, PREDICT, PREDICT_WITH, inference_route
from service.api.schemas import LabelsOut, PredictionOut, PredictRequest, PredictResponse, ValueOut
from service.inference.errors import DeadlineExceeded, InferenceFailed, ParameterUnfit, QueueFull
from service.inference.predictor import PredictResult, Timings
from service.settings import ApiKey, ServingSettings
from tests.support.answered import rows_of_one_task
from tests.support.asgi import Answered, AppUnderTest, result_for
from tests.support.uncollected import uncollected

LONG_WAY = {"content-type": "application/json; way=long"}
PATHS = (PREDICT, "/v1/models/p/predict", EMBEDDINGS)
GOOD = {
    PREDICT: b'{"model": "p", "inputs": "a"}',
    "/v1/models/p/predict": b'{"inputs": ["a", "b"]}',
    EMBEDDINGS: b'{"model": "p", "input": ["a"]}',
}


@pytest.fixture(scope="module")
def under_test() -> Iterator[AppUnderTest]:
    with closing(AppUnderTest()) as app:
        yield app


@pytest.fixture(autouse=True)
def calm(under_test: AppUnderTest) -> None:
    under_test.predictor.error = None


# Bodies

surrogates = st.characters(categories=["Cs"])
words = st.text(st.characters(codec="utf-8") | surrogates, max_size=6)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.integers()
    | st.floats()
    | words
    | st.sampled_from([10**30, 2**63, 2**64, 1e300, 0.5, 3_600_000, 3_600_001, 100_000, 100_001, "5", "", "float"])
)
anything = st.recursive(
    scalars, lambda child: st.lists(child, max_size=3) | st.dictionaries(words, child, max_size=3), max_leaves=8
)
texts = st.text(max_size=8)
pairs = st.tuples(texts, texts).map(list)
names = st.sampled_from(["p", "p@champion", "p:7", "other", "No Such", "x" * 64, "x" * 140, "x" * 141, "é" * 140])

good_fields = {
    "model": st.none() | st.sampled_from(["p", "p:3", "x" * 140]),
    "inputs": texts | st.lists(texts, max_size=3) | st.lists(pairs, max_size=3),
    "parameters": st.fixed_dictionaries(
        {},
        optional={
            "top_k": st.none() | st.integers(1, 10**20),
            "threshold": st.none() | st.floats(0, 1) | st.integers(0, 1),
            "truncate": st.booleans(),
            "max_length": st.none() | st.integers(4, 100_000),
            "return_embedding": st.booleans(),
            "timeout_ms": st.none() | st.integers(1, 3_600_000),
        },
    ),
}
good_predicts = st.fixed_dictionaries(
    {"inputs": good_fields["inputs"]}, optional={key: good_fields[key] for key in ("model", "parameters")}
)
good_embeddings = st.fixed_dictionaries(
    {"model": st.sampled_from(["p", "x" * 140]), "input": texts | st.lists(texts, max_size=3)},
    optional={
        "encoding_format": st.sampled_from(["float", "base64"]),
        "dimensions": st.none() | st.integers(1, 1 << 32),
        "user": st.none() | texts,
    },
)
parameters = st.dictionaries(
    st.sampled_from([*Options.__dataclass_fields__, "timeout_ms"]) | words, scalars, max_size=3
)
members = st.one_of(
    st.tuples(st.just("inputs"), good_fields["inputs"] | st.lists(texts | pairs | anything, max_size=3) | anything),
    st.tuples(st.just("input"), texts | st.lists(texts | anything, max_size=3) | anything),
    st.tuples(st.just("model"), names | anything),
    st.tuples(st.just("parameters"), good_fields["parameters"] | parameters | anything),
    st.tuples(st.just("encoding_format"), st.sampled_from(["float", "base64", "int8", None])),
    st.tuples(st.sampled_from(["dimensions", "user"]) | words, anything),
)


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """JSON objects around the schemas, with repeated members; surrogates stand alone, as bytes or as escapes."""
    ascii_only, space = draw(st.booleans()), draw(st.sampled_from(["", " ", "\n\t"]))
    dumped = [
        f"{json.dumps(key, ensure_ascii=ascii_only)}:{space}{json.dumps(value, ensure_ascii=ascii_only)}"
        for key, value in draw(st.lists(members, max_size=5))
    ]
    return ("{" + f"{space},".join(dumped) + "}").encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good body with a few bytes replaced."""
    content = json.dumps(draw(good_predicts | good_embeddings), ensure_ascii=draw(st.booleans())).encode()
    start = draw(st.integers(0, len(content)))
    patch = draw(st.binary(max_size=3) | st.sampled_from([b"NaN", b"-", b"0", b"1e999", b"\\u0000", b"\\ud800", b","]))
    return content[:start] + patch + content[start + draw(st.integers(0, 3)) :]


bodies = objects() | damaged() | anything.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20)

ODD_BODIES = [
    b"",
    b"null",
    b"[]",
    b'"inputs"',
    b"{}",
    b"{",
    b"\xef\xbb\xbf" + GOOD[PREDICT],
    "é".encode("utf-16"),
    b'{"inputs": "a"}x',
    b'{"inputs": "a",}',
    b"{'inputs': 'a'}",
    b'{"inputs": "\xff"}',
    b'{"inputs": "\xed\xa0\x80"}',
    b'{"inputs": "\\ud800"}',
    b'{"inputs": "\\ud83d\\ude00"}',
    b'{"inputs": "a\x00"}',
    b'{"inputs": "a\\u0000"}',
    b'{"inputs": "a", "inputs": ["b"]}',
    b'{"inputs": 1, "inputs": ["b"]}',
    b'{"\\u0069nputs": "a"}',
    b'{"inputs": ["a", ["b", "c"]]}',
    b'{"inputs": [["b", "c"], "a"]}',
    b'{"inputs": [["a"]]}',
    b'{"inputs": [[]]}',
    b'{"inputs": "a", "parameters": null}',
    b'{"inputs": "a", "parameters": {"top_k": 5.0}}',
    b'{"inputs": "a", "parameters": {"top_k": true}}',
    b'{"inputs": "a", "parameters": {"truncate": "no"}}',
    b'{"inputs": "a", "parameters": {"threshold": NaN}}',
    b'{"inputs": "a", "parameters": {"threshold": Infinity}}',
    b'{"inputs": "a", "parameters": {"threshold": 1e-999}}',
    b'{"inputs": "a", "parameters": {"threshold": -0.0}}',
    b'{"inputs": "a", "parameters": {"top_k": 1' + b"0" * 400 + b"}}",
    b'{"inputs": "a", "parameters": {"top_k": 1' + b"0" * 5000 + b"}}",
    b'{"inputs": "a", "parameters": {"threshold": 0.' + b"3" * 5000 + b"}}",
    b'{"inputs": ' + b"[" * 31 + b"]" * 31 + b"}",
    b'{"inputs": ' + b"[" * 40 + b"]" * 40 + b"}",
    b'{"input": "a", "model": "p", "x": "\\ud800"}',
    b'{"input": "a", "model": "p", "x": {"y": [1e999]}}',
    b'{"input": [1, 2], "model": "p"}',
    b'{"input": "a", "model": "p", "dimensions": 3}',
    b'{"input": "a", "model": "p", "dimensions": 4}',
    b'{"input": [], "model": "p", "dimensions": 4}',
    b'{"input": "a", "model": "p", "encoding_format": "BASE64"}',
]


# Both ways


def both(app: AppUnderTest, path: str, body: bytes, **headers: str) -> Answered:
    """The answer, which must not depend on the way it was come by."""
    answers, asked = [], []
    given_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    for way in ({}, LONG_WAY):
        app.predictor.asked.clear()
        answers.append(app.ask(path, body, headers=given_headers | way))
        asked.append(list(app.predictor.asked))
    assert asked[0] == asked[1]
    for short, long in zip(*asked, strict=True):
        assert abs(short.allowed_s - long.allowed_s) < 5
    assert plain(answers[0]) == plain(answers[1])
    return answers[0]


def plain(answer: Answered) -> tuple[Any, ...]:
    """An answer without what is new each time."""
    document = answer.document
    fresh = {name: document.pop(name) for name in ("id", "request_id") if name in document}
    assert all(len(value) in (32, 37) for value in fresh.values())
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    return answer.status, headers, document


@given(body=bodies, path=st.sampled_from(PATHS))
@settings(max_examples=500, deadline=None)
def test_any_body_is_answered_alike(under_test: AppUnderTest, body: bytes, path: str) -> None:
    both(under_test, path, body)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", ODD_BODIES, ids=lambda body: repr(body[:60]))
def test_odd_bodies_are_answered_alike(under_test: AppUnderTest, body: bytes, path: str) -> None:
    answered = both(under_test, path, body)
    assert answered.status in {200, 400, 422}
    assert answered.status == 200 or answered.headers["content-type"] == (
        "application/json" if path == EMBEDDINGS and "error" in answered.document else "application/problem+json"
    )


@given(body=good_predicts, path=st.sampled_from(PATHS[:2]))
@settings(deadline=None)
def test_good_predictions_are_answered_alike(under_test: AppUnderTest, body: Any, path: str) -> None:
    both(under_test, path, json.dumps(body).encode())


@given(body=good_embeddings)
@settings(deadline=None)
def test_good_embeddings_are_answered_alike(under_test: AppUnderTest, body: Any) -> None:
    both(under_test, EMBEDDINGS, json.dumps(body).encode())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull("full", reason="queue_full", retry_after_s=1.2), 429, "2"),
        (ModelNotFound("no model"), 404, None),
        (DeadlineExceeded("late"), 504, None),
        (InferenceFailed("the engine failed"), 500, None),
        (DatabaseUnavailable("table secrets is locked"), 503, "1"),
        (ParameterUnfit("top_k is for labels", parameter="top_k"), 422, None),
        (RuntimeError("the inner secret"), 500, None),
    ],
)
def test_errors_are_answered_alike(
    under_test: AppUnderTest,
    caplog: pytest.LogCaptureFixture,
    path: str,
    error: Exception,
    status: int,
    retry_after: str | None,
) -> None:
    under_test.predictor.error = error
    # The framework raises an error of ours once more after its answer; the guard lets it go, as it is logged.
    answered = both(under_test, path, GOOD[path])
    assert (answered.status, answered.headers.get("retry-after")) == (status, retry_after)
    assert b"secret" not in answered.body
    # What the document hides stands in the log, once for each of the two requests.
    is_hidden = status >= 500 and (path != EMBEDDINGS or isinstance(error, RuntimeError))
    assert [str(error) in logged_text(record) for record in caplog.records] == [True] * (2 * is_hidden)


def logged_text(record: logging.LogRecord) -> str:
    return record.getMessage() + str(record.exc_info)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("timeout", "allowed_s"),
    [
        ("1", 0.001),
        ("2500", 2.5),
        ("3600000", 30),
        ("000000000001", 0.001),
        ("0", None),
        ("3600001", None),
        ("-1", None),
        ("1.5", None),
        ("\xb2", None),
        ("", None),
        ("1" + "0" * 20, None),
        ("0" * 11 + "1" * 5000, None),
    ],
)
def test_the_deadline_in_the_header(under_test: AppUnderTest, path: str, timeout: str, allowed_s: float | None) -> None:
    answered = both(under_test, path, GOOD[path], x_request_timeout_ms=timeout)
    if allowed_s is None:
        assert answered.status == 422
    else:
        assert under_test.predictor.asked[0].allowed_s == pytest.approx(allowed_s, abs=0.5)


def test_the_earliest_deadline_counts(under_test: AppUnderTest) -> None:
    body = b'{"model": "p", "inputs": "a", "parameters": {"timeout_ms": 3000}}'
    for header, allowed_s in (("2000", 2), ("9000", 3)):
        both(under_test, PREDICT, body, x_request_timeout_ms=header)
        assert under_test.predictor.asked[0].allowed_s == pytest.approx(allowed_s, abs=0.5)


def test_the_path_and_the_body_may_not_name_two_models(under_test: AppUnderTest) -> None:
    path = "/v1/models/p/predict"
    assert both(under_test, path, b'{"model": "p", "inputs": "a"}').status == 200
    assert both(under_test, path, b'{"model": "p:1", "inputs": "a"}').status == 422
    assert both(under_test, PREDICT, b'{"inputs": "a"}').status == 422  # there is no default_model
    assert both(under_test, "/v1/models/p%20q/predict", b'{"inputs": "a"}').status == 422


@pytest.mark.parametrize("path", PATHS)
def test_other_methods_and_types_are_the_frameworks(under_test: AppUnderTest, path: str) -> None:
    for method in ("GET", "HEAD", "PUT", "OPTIONS"):
        answered = under_test.ask(path, b"", method=method)
        assert (answered.status, answered.headers["allow"]) == (405, "POST")
    untyped = under_test.ask(path, GOOD[path], headers={"content-type": "text/plain"})
    assert untyped.status == (200 if path == EMBEDDINGS else 415)
    for content_type in ("Application/JSON", "application/json;charset=UTF-8", "application/vnd.api+json"):
        assert under_test.ask(path, GOOD[path], headers={"content-type": content_type}).status == 200


def test_scopes_and_keys() -> None:
    def key(name: str, *scopes: Any) -> ApiKey:
        return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), scopes=frozenset(scopes))

    with closing(AppUnderTest(ServingSettings(api_keys=(key("may", "predict"), key("may-not", "datasets"))))) as app:
        for path in PATHS:
            assert both(app, path, GOOD[path], authorization="Bearer may").status == 200
            assert both(app, path, GOOD[path], authorization="Bearer may-not").document["code"] == "forbidden"
            assert both(app, path, b"{", authorization="Bearer may-not").status in {400, 403}
            assert both(app, path, GOOD[path]).status == 401


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_cancels_its_work(path: str) -> None:
    with closing(AppUnderTest()) as app:
        app.predictor.hold = True
        for number, way in enumerate(({}, LONG_WAY), 1):
            assert app.ask(path, GOOD[path], headers=way, leaves=True).status == 499
            assert app.predictor.cancelled == number


def test_a_draining_server_refuses() -> None:
    with closing(AppUnderTest()) as app:
        app.drain.refusing = True
        assert both(app, PREDICT, GOOD[PREDICT]).document["code"] == "draining"


@pytest.mark.parametrize("path", PATHS)
def test_refusals_leave_nothing_to_the_garbage_collector(under_test: AppUnderTest, path: str) -> None:
    under_test.predictor.error = QueueFull("full", reason="queue_full", retry_after_s=1.2)
    with uncollected() as kinds:
        for _ in range(20):
            assert under_test.ask(path, GOOD[path]).status == 429
    assert sum(kinds.values()) < 20, kinds


def test_requests_are_counted_alike() -> None:
    with closing(AppUnderTest()) as app:
        for path in PATHS:
            both(app, path, GOOD[path])
            both(app, path, b"{")
            both(app, path.replace("/p/", "/other/"), GOOD[path].replace(b'"p"', b'"other"'))
    counted = {
        (sample.labels["model"], sample.labels["code"]): sample.value
        for family in app.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "polyhead_requests_total" and sample.value
    }
    assert counted == {("p", "200"): 6, ("", "400"): 6, ("", "200"): 6}


# The short way by itself


class Unwanted:
    """In the framework's place."""

    async def __call__(self, *_: Any) -> None:
        raise AssertionError("the framework was asked")


def test_well_formed_bodies_do_not_reach_the_framework(
    under_test: AppUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = cast(Any, under_test.app).app._app._app
    assert isinstance(direct, DirectRoutes)
    monkeypatch.setattr(direct, "_app", Unwanted())
    for path, body in GOOD.items():
        assert under_test.ask(path, body).status == 200
        assert under_test.ask(path, body, headers={"content-type": "application/json; charset=UTF-8"}).status == 200
        assert under_test.ask(path, body, headers=LONG_WAY).status == 500


@given(bodies)
@settings(max_examples=1000, deadline=None)
def test_the_decoders_take_no_more_than_the_models(content: bytes) -> None:
    for decode, parse in (
        (wire.decode_predict, lambda content: PredictRequest.model_validate(json.loads(content))),
        (wire.decode_embeddings, openai._parse),
    ):
        try:
            body = decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        assert fields(body) == fields(parse(content))


@given(good_predicts, st.booleans())
def test_the_decoder_takes_good_predictions(body: Any, ascii_only: bool) -> None:
    wire.decode_predict(json.dumps(body, ensure_ascii=ascii_only).encode())


@given(good_embeddings, st.booleans())
def test_the_decoder_takes_good_embeddings(body: Any, ascii_only: bool) -> None:
    wire.decode_embeddings(json.dumps(body, ensure_ascii=ascii_only).encode())


def fields(body: Any) -> Any:
    """A model or a struct as plain values; -0.0 and 0.0 are told apart."""
    names = type(body).model_fields if isinstance(body, BaseModel) else getattr(body, "__struct_fields__", None)
    return repr(body) if names is None else {name: fields(getattr(body, name)) for name in names}


def test_inference_routes() -> None:
    assert inference_route("/predict") == (PREDICT, None)
    assert inference_route("/v1/embeddings") == (EMBEDDINGS, None)
    assert inference_route("/v1/models/a:7/predict") == (PREDICT_WITH, "a:7")
    for path in ("/", "/predict/", "/predict\n", "/v1/models//predict", "/v1/models/predict", "/v1/models/a/b/predict"):
        assert inference_route(path) is None


# Schemas


def shape(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema without references, and without what one library writes and the other does not."""
    if isinstance(schema, list):
        return sorted((shape(item, definitions) for item in schema), key=lambda item: json.dumps(item, sort_keys=True))
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return shape(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    silent = {"title", "description", "examples", "$defs"} | ({"type"} if "enum" in schema else set())
    silent |= {"required"} if not schema.get("required") else set()
    return {key: shape(value, definitions) for key, value in schema.items() if key not in silent}


def shapes(struct: Any, model: type[BaseModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    (reference,), definitions = msgspec.json.schema_components([struct])
    documented = model.model_json_schema()
    return shape(reference, definitions), shape(documented, documented.get("$defs", {}))


def test_requests_have_one_schema() -> None:
    decoded, documented = shapes(wire.PredictBody, PredictRequest)
    assert {"type": "string"} in decoded["properties"]["inputs"]["anyOf"]
    del decoded["properties"]["inputs"], documented["properties"]["inputs"]  # a union that msgspec cannot say
    assert decoded == documented
    decoded, documented = shapes(wire.EmbeddingsBody, openai.EmbeddingsRequest)
    del decoded["properties"]["dimensions"], documented["properties"]["dimensions"]
    assert decoded == documented | {"additionalProperties": False}


def test_the_document_shows_the_models(under_test: AppUnderTest) -> None:
    document = under_test.ask("/openapi.json", b"", method="GET").document
    schemas = document["components"]["schemas"]
    for model in (PredictRequest, PredictResponse):
        whole = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, schema in ({model.__name__: whole} | whole.pop("$defs")).items():
            assert schemas[name] == without_nulls(schema)
    for path in (PREDICT, PREDICT_WITH):
        operation = document["paths"][path]["post"]
        (content,) = operation["requestBody"]["content"].items()
        assert content == ("application/json", {"schema": {"$ref": "#/components/schemas/PredictRequest"}})
        answers = operation["responses"]
        assert answers["200"]["content"]["application/json"]["schema"] == {
            "$ref": "#/components/schemas/PredictResponse"
        }
        assert set(answers) == {"200", "422"}
    operation = document["paths"][EMBEDDINGS]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema == without_nulls(openai.EmbeddingsRequest.model_json_schema())


def without_nulls(schema: Any) -> Any:
    """FastAPI leaves out every default that is null."""
    if isinstance(schema, dict):
        return {key: without_nulls(value) for key, value in schema.items() if value is not None}
    return [without_nulls(item) for item in schema] if isinstance(schema, list) else schema


# Answers

finite = st.floats(allow_nan=False, allow_infinity=False)
vectors = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1).map(
    lambda values: np.array(values, dtype=np.float32)
)
DOCUMENTED = {"text-multi-label": LabelsOut, "text-regression": ValueOut}


def documented_row(index: int, row: Any) -> dict[str, Any]:
    """As the contract has it, without the embedding."""
    if isinstance(row, Value):
        return {"index": index, "value": row.value}
    scores = {"scores": [{"label": score.label, "score": score.score} for score in row.scores]}
    if isinstance(row, ManyLabels):
        return {"index": index, "labels": row.labels} | scores
    return {"index": index, "label": row.label, "score": row.score} | scores


@given(rows_of_one_task(texts=texts, numbers=finite, vectors=vectors), st.none() | st.integers(1, 10**8))
def test_the_answer_is_the_documented_one(answered: tuple[str, list[Any], list[Any]], version: int | None) -> None:
    task, rows, vectors = answered
    result = PredictResult("m", version, task, rows, vectors, 5, "torch", 1, Timings(0.0, 0.0, 0.0, 0.0))
    written = json.loads(answers._encoded(result))
    assert written["predictions"] == [
        documented_row(index, row) | ({"embedding": next_row["embedding"]} if vectors else {})
        for index, (row, next_row) in enumerate(zip(rows, written["predictions"], strict=True))
    ]
    for row in written["predictions"]:
        DOCUMENTED.get(task, PredictionOut).model_validate(row, extra="forbid")
    read = PredictResponse.model_validate(written, extra="forbid").predictions
    for vector, row in zip(vectors, read, strict=bool(vectors)):
        assert np.array_equal(np.array(row.embedding, dtype=np.float32), vector)
    assert written["id"].startswith("pred_") and len(written["id"]) == 37
    assert (written["object"], written["model"], written["version"]) == ("predictions", "m", version)
    assert written["usage"] == {"input_tokens": 5}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_vectors_of_any_layout(dtype: Any) -> None:
    vector = np.arange(8, dtype=dtype)[::2]
    assert json.loads(bytes(wire.decimals(vector))) == [0.0, 2.0, 4.0, 6.0]
    assert np.frombuffer(base64.b64decode(json.loads(wire.encode(wire.in_base64(vector)))), "<f4").tolist() == [
        0.0,
        2.0,
        4.0,
        6.0,
    ]


def test_an_embedding_as_floats_and_as_base64(under_test: AppUnderTest) -> None:
    found = []
    for encoding in ("float", "base64"):
        body = json.dumps({"model": "p", "input": ["a", "b"], "encoding_format": encoding}).encode()
        document = both(under_test, EMBEDDINGS, body).document
        assert document["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        assert [(row["object"], row["index"]) for row in document["data"]] == [("embedding", 0), ("embedding", 1)]
        found.append(document["data"][1]["embedding"])
    (expected,) = result_for(1, with_embedding=True).vectors
    assert np.array_equal(np.array(found[0], dtype=np.float32), expected)
    assert np.array_equal(np.frombuffer(base64.b64decode(found[1]), "<f4"), expected)
