"""The inference routes by ASGI messages: what they take, refuse in a client's words, and document."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.errors import DatabaseUnavailable, ModelNotFound
from modeling.tasks import TASKS, Options
from service.api import inference, wire
from service.api.body_errors import read_or_explain
from service.api.compat import openai
from service.api.guard import PROBE_PATHS
from service.api.problems import STATUS_BY_CODE, Problem
from service.inference.errors import DeadlineExceeded, InferenceFailed, ParameterUnfit, QueueFull
from service.inference.predictor import PredictResult, Timings
from service.settings import ApiKey, ServingSettings
from tests.support.answered import rows_of_one_task
from tests.support.asgi import Answered, AppUnderTest, result_for
from tests.support.uncollected import uncollected

PREDICT, PREDICT_WITH, EMBEDDINGS = "/predict", "/v1/models/{model}/predict", "/v1/embeddings"
PATHS = (PREDICT, PREDICT_WITH.format(model="p"), EMBEDDINGS)
STRUCTS: tuple[type[Any], ...] = (wire.PredictRequest, openai.EmbeddingsRequest)
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
    "model": st.none() | st.sampled_from(["p", "p:3", "x" * 64]),
    "inputs": texts | st.lists(texts | pairs, max_size=3),
    "parameters": st.none()
    | st.fixed_dictionaries(
        {},
        optional={
            "top_k": st.none() | st.integers(1, 10**20),
            "threshold": st.none() | st.floats(0, 1) | st.integers(0, 1),
            "truncate": st.none() | st.booleans(),
            "max_length": st.none() | st.integers(4, 100_000),
            "return_embedding": st.none() | st.booleans(),
            "timeout_ms": st.none() | st.integers(1, 3_600_000),
        },
    ),
}
good_predicts = st.fixed_dictionaries(
    {"inputs": good_fields["inputs"]}, optional={key: good_fields[key] for key in ("model", "parameters")}
)
good_embeddings = st.fixed_dictionaries(
    {"model": st.sampled_from(["p", "x" * 64]), "input": texts | st.lists(texts, max_size=3)},
    optional={
        "encoding_format": st.sampled_from(["float", "base64", None]),
        "dimensions": st.none() | st.integers(),
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

# What a body may be by `/predict`: its status and the places that are refused.
ODD_BODIES: list[tuple[bytes, int, list[str]]] = [
    (b"", 400, []),
    (b"null", 422, ["the body must be an object, not null"]),
    (b"[]", 422, ["the body must be an object, not a list"]),
    (b'"inputs"', 422, ["the body must be an object, not a string"]),
    (b"{}", 422, ["inputs is missing"]),
    (b"{", 400, []),
    (b"\xef\xbb\xbf" + GOOD[PREDICT], 200, []),
    ("é".encode("utf-16"), 400, []),
    (b'{"inputs": "a"}x', 400, []),
    (b'{"inputs": "a",}', 400, []),
    (b"{'inputs': 'a'}", 400, []),
    (b'{"inputs": 1, }', 400, []),
    (b'{"inputs": "\xff"}', 400, []),
    (b'{"inputs": "\xed\xa0\x80"}', 400, []),
    (b'{"inputs": "a\x00"}', 400, []),
    (b'{"inputs": "a\\u0000", "model": "p"}', 200, []),
    (b'{"inputs": "\\ud83d\\ude00", "model": "p"}', 200, []),
    (b'{"inputs": "\\ud800"}', 400, ["inputs escapes half of a surrogate pair, which is no character"]),
    (
        b'{"inputs": ["a", ["b", "c \\udc00 d"]], "model": "p"}',
        400,
        ["inputs[1][1] escapes half of a surrogate pair, which is no character"],
    ),
    (b'{"inputs": "a", "model": "\\ud83d"}', 400, ["model escapes half of a surrogate pair, which is no character"]),
    (b'{"inputs": "a", "inputs": ["b"], "model": "p"}', 200, []),
    (b'{"inputs": 1, "inputs": ["b"], "model": "p"}', 200, []),
    (b'{"inputs": ["b"], "inputs": 1}', 422, ["inputs must be a string or a list, not a whole number"]),
    (b'{"\\u0069nputs": "a", "model": "p"}', 200, []),
    (b'{"inputs": ["a", ["b", "c"]], "model": "p"}', 200, []),
    (b'{"inputs": ["a", 3]}', 422, ["inputs[1] must be a string or a list of length 2, not a whole number"]),
    (b'{"inputs": [["a"]]}', 422, ["inputs[0] must be a string or a list of length 2"]),
    (b'{"inputs": [[]]}', 422, ["inputs[0] must be a string or a list of length 2"]),
    (b'{"inputs": [["a", null]]}', 422, ["inputs[0][1] must be a string, not null"]),
    (b'{"inputs": ["a", {"x": 1}]}', 422, ["inputs[1] must be a string or a list of length 2, not an object"]),
    (b'{"inputs": "a", "model": ""}', 422, ["model must be a string of length 1 to 140"]),
    (b'{"inputs": "a", "model": null}', 422, []),  # there is no default_model
    (b'{"inputs": "a", "model": "p", "parameters": null}', 200, []),
    (b'{"inputs": "a", "parameters": []}', 422, ["parameters must be an object, not a list"]),
    (
        b'{"inputs": "a", "parameters": {"top_k": 0}, "input": 1}',
        422,
        [
            "parameters.top_k must be a whole number from 1",
            "input is unknown; the fields here are inputs, model, parameters",
        ],
    ),
    (
        b'{"inputs": "a", "parameters": {"top_k": "5"}}',
        422,
        ["parameters.top_k must be a whole number from 1, not a string"],
    ),
    (
        b'{"inputs": "a", "parameters": {"top_k": 5.0}}',
        422,
        ["parameters.top_k must be a whole number from 1, not a decimal number"],
    ),
    (
        b'{"inputs": "a", "parameters": {"top_k": true}}',
        422,
        ["parameters.top_k must be a whole number from 1, not a boolean"],
    ),
    (
        b'{"inputs": "a", "parameters": {"truncate": "no"}}',
        422,
        ["parameters.truncate must be true or false, not a string"],
    ),
    (b'{"inputs": "a", "model": "p", "parameters": {"threshold": 1}}', 200, []),
    (b'{"inputs": "a", "parameters": {"threshold": 1.5}}', 422, ["parameters.threshold must be a number from 0 to 1"]),
    (b'{"inputs": "a", "parameters": {"threshold": NaN}}', 400, []),
    (b'{"inputs": "a", "parameters": {"threshold": -Infinity}}', 400, []),
    (
        b'{"inputs": "a", "parameters": {"threshold": 1e999}}',
        422,
        ["parameters.threshold must be a number from 0 to 1"],
    ),
    (b'{"inputs": "a", "model": "p", "parameters": {"threshold": 1e-999}}', 200, []),
    (b'{"inputs": "a", "model": "p", "parameters": {"threshold": -0.0}}', 200, []),
    (b'{"inputs": "a", "model": "p", "parameters": {"top_k": 1' + b"0" * 400 + b"}}", 200, []),
    (b'{"inputs": "a", "parameters": {"top_k": 1' + b"0" * 5000 + b"}}", 400, []),
    (b'{"inputs": "a", "model": "p", "parameters": {"threshold": 0.' + b"3" * 5000 + b"}}", 200, []),
    (b'{"inputs": ' + b"[" * 31 + b"]" * 31 + b"}", 422, ["inputs[0] must be a string or a list of length 2"]),
    (b'{"inputs": ' + b"[" * 40 + b"]" * 40 + b"}", 400, []),
    (
        b'{"inputs": [' + b"1," * 99_000 + b"1]}",
        422,
        [f"inputs[{place}] must be a string or a list of length 2, not a whole number" for place in range(20)],
    ),
    (
        b'{"inputs": "a", "' + b"x" * 300 + b'": 1}',
        422,
        [f"{'x' * 64} is unknown; the fields here are inputs, model, parameters"],
    ),
]
# By `/v1/embeddings`: its status and the message.
ODD_EMBEDDINGS: list[tuple[bytes, int, str]] = [
    (b"{", 400, "The body is not valid JSON"),
    (b'{"model": "p"}', 422, "input is missing"),
    (
        b'{"input": [1, 2], "model": "p"}',
        422,
        "input[0] must be a string, not a whole number; errors lists 2 places. Token ids",
    ),
    (b'{"input": "a", "model": null}', 422, "model must be a string of length 1 to 140, not null"),
    (b'{"input": "a", "model": "p", "dimensions": 3}', 200, ""),
    (b'{"input": "a", "model": "p", "dimensions": 4}', 422, "leave dimensions out"),
    (b'{"input": "a", "model": "p", "dimensions": 1' + b"0" * 30 + b"}", 422, "leave dimensions out"),
    (b'{"input": [], "model": "p", "dimensions": 4}', 400, "empty"),
    (b'{"input": "a", "model": "p", "encoding_format": "BASE64"}', 422, "must be 'base64' or 'float'"),
    (b'{"input": "a", "model": "p", "encoding_format": null, "dimensions": null, "user": null}', 200, ""),
    (b'{"input": "a", "model": "p", "unknown": {"y": [1e999]}}', 200, ""),
]


def well_refused(path: str, answered: Answered) -> None:
    """A refusal is a document of the route's shape, names codes of ours, and no library."""
    is_openai = path == EMBEDDINGS and answered.headers["content-type"] == "application/json"
    document = answered.document["error"] if is_openai else answered.document
    assert answered.headers["content-type"] == ("application/json" if is_openai else "application/problem+json")
    assert (answered.status, document["code"]) in {
        (400, "malformed_request"),
        (400, "empty_input"),
        (422, "invalid_request"),
    }
    said = json.dumps(document["message"] if is_openai else [document["detail"], document.get("errors", [])])
    assert not any(word in said for word in ("msgspec", "Expected `", "`$", "NoneType", "sys."))


@given(body=bodies, path=st.sampled_from(PATHS))
@settings(max_examples=500, deadline=None)
def test_any_body_is_answered_or_refused(under_test: AppUnderTest, body: bytes, path: str) -> None:
    answered = under_test.ask(path, body)
    if answered.status != 200:
        well_refused(path, answered)


@pytest.mark.parametrize(("body", "status", "places"), ODD_BODIES, ids=lambda part: repr(part)[:60])
def test_odd_bodies(under_test: AppUnderTest, body: bytes, status: int, places: list[str]) -> None:
    answered = under_test.ask(PREDICT, body)
    assert answered.status == status, answered.body
    if status != 200:
        well_refused(PREDICT, answered)
        assert [place["message"] for place in answered.document.get("errors", [])] == places
        assert all(place["loc"][0] == "body" for place in answered.document.get("errors", []))
        assert not places or places[0] in answered.document["detail"]


@pytest.mark.parametrize(("body", "status", "message"), ODD_EMBEDDINGS, ids=lambda part: repr(part)[:60])
def test_odd_bodies_of_embeddings(under_test: AppUnderTest, body: bytes, status: int, message: str) -> None:
    answered = under_test.ask(EMBEDDINGS, body)
    assert answered.status == status, answered.body
    if status != 200:
        well_refused(EMBEDDINGS, answered)
        assert message in answered.document["error"]["message"]


@given(body=good_predicts, path=st.sampled_from(PATHS[:2]))
@settings(deadline=None)
def test_good_predictions_reach_the_predictor(under_test: AppUnderTest, body: Any, path: str) -> None:
    under_test.predictor.asked.clear()
    answered = under_test.ask(path, json.dumps(body).encode())
    inputs = [body["inputs"]] if isinstance(body["inputs"], str) else body["inputs"]
    named = body.get("model")
    if (named not in (None, "p")) if path != PREDICT else named is None:
        assert answered.status == 422
        return
    assert answered.status == (200 if inputs else 400)
    (asked,) = under_test.predictor.asked
    assert asked.inputs == [item if isinstance(item, str) else tuple(item) for item in inputs]
    given_parameters = {name: value for name, value in (body.get("parameters") or {}).items() if value is not None}
    allowed_ms = given_parameters.pop("timeout_ms", 30_000)
    assert asked.options == Options(**given_parameters)
    assert asked.allowed_s == pytest.approx(min(30, allowed_ms / 1000), abs=1)


@given(body=good_embeddings)
@settings(deadline=None)
def test_good_embeddings_reach_the_predictor(under_test: AppUnderTest, body: Any) -> None:
    under_test.predictor.asked.clear()
    answered = under_test.ask(EMBEDDINGS, json.dumps(body).encode())
    (asked,) = under_test.predictor.asked
    assert asked.inputs == ([body["input"]] if isinstance(body["input"], str) else body["input"])
    assert (asked.options, asked.needs_labels) == (Options(return_embedding=True), False)
    assert answered.status == (400 if body["input"] == [] else 200 if body.get("dimensions") in (None, 3) else 422)


@given(content=objects() | damaged(), struct=st.sampled_from(STRUCTS))
@settings(max_examples=1000, deadline=None)
def test_what_msgspec_refuses_is_explained(content: bytes, struct: type[Any]) -> None:
    """The second reading refuses what the first does, but if the last of two members of one name is right."""
    try:
        msgspec.json.decode(content, type=struct)
        return
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        asyncio.run(read_or_explain(content, struct))
    except Problem as problem:
        assert problem.status == 400 or problem.errors
    else:
        assert repeats_a_member(content)


def repeats_a_member(content: bytes) -> bool:
    found: list[bool] = []
    json.loads(content, object_pairs_hook=lambda pairs: found.append(len(pairs) > len(dict(pairs))))
    return any(found)


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
def test_errors_of_the_predictor(
    under_test: AppUnderTest,
    caplog: pytest.LogCaptureFixture,
    path: str,
    error: Exception,
    status: int,
    retry_after: str | None,
) -> None:
    under_test.predictor.error = error
    answered = under_test.ask(path, GOOD[path])
    assert (answered.status, answered.headers.get("retry-after")) == (status, retry_after)
    assert b"secret" not in answered.body
    # What the document hides is in the log.
    is_hidden = status >= 500 and (path != EMBEDDINGS or isinstance(error, RuntimeError))
    assert [str(error) in logged_text(record) for record in caplog.records] == [True] * is_hidden


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
    under_test.predictor.asked.clear()
    answered = under_test.ask(path, GOOD[path], headers={"x-request-timeout-ms": timeout})
    if allowed_s is None:
        assert answered.status == 422
    else:
        assert under_test.predictor.asked[0].allowed_s == pytest.approx(allowed_s, abs=0.5)


def test_the_earliest_deadline_counts(under_test: AppUnderTest) -> None:
    body = b'{"model": "p", "inputs": "a", "parameters": {"timeout_ms": 3000}}'
    for header, allowed_s in (("2000", 2), ("9000", 3)):
        under_test.predictor.asked.clear()
        under_test.ask(PREDICT, body, headers={"x-request-timeout-ms": header})
        assert under_test.predictor.asked[0].allowed_s == pytest.approx(allowed_s, abs=0.5)


def test_the_path_and_the_body_may_not_name_two_models(under_test: AppUnderTest) -> None:
    path = "/v1/models/p/predict"
    assert under_test.ask(path, b'{"model": "p", "inputs": "a"}').status == 200
    assert under_test.ask(path, b'{"model": "p:1", "inputs": "a"}').status == 422
    assert under_test.ask(PREDICT, b'{"inputs": "a"}').status == 422  # there is no default_model
    assert under_test.ask("/v1/models/p%20q/predict", b'{"inputs": "a"}').status == 422


@pytest.mark.parametrize("path", PATHS)
def test_other_methods_and_types(under_test: AppUnderTest, path: str) -> None:
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
            assert app.ask(path, GOOD[path], headers={"authorization": "Bearer may"}).status == 200
            for body in (GOOD[path], b"{"):
                refused = app.ask(path, body, headers={"authorization": "Bearer may-not", "content-type": "text/x"})
                assert (refused.status, refused.document["code"]) == (403, "forbidden")
            assert app.ask(path, GOOD[path]).status == 401


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_cancels_its_work(path: str) -> None:
    with closing(AppUnderTest()) as app:
        app.predictor.hold = True
        assert app.ask(path, GOOD[path], leaves=True).status == 499
        assert app.predictor.cancelled == 1


def test_a_draining_server_refuses() -> None:
    with closing(AppUnderTest()) as app:
        app.drain.refusing = True
        assert app.ask(PREDICT, GOOD[PREDICT]).document["code"] == "draining"


@pytest.mark.parametrize("path", PATHS)
def test_refusals_leave_nothing_to_the_garbage_collector(under_test: AppUnderTest, path: str) -> None:
    under_test.predictor.error = QueueFull("full", reason="queue_full", retry_after_s=1.2)
    with uncollected() as kinds:
        for _ in range(20):
            assert under_test.ask(path, GOOD[path]).status == 429
    assert sum(kinds.values()) < 20, kinds


def test_requests_are_counted() -> None:
    with closing(AppUnderTest()) as app:
        for path in PATHS:
            app.ask(path, GOOD[path])
            app.ask(path, b"{")
            app.ask(path.replace("/p/", "/other/"), GOOD[path].replace(b'"p"', b'"other"'))
    counted = {
        (sample.labels["model"], sample.labels["code"]): sample.value
        for family in app.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "polyhead_requests_total" and sample.value
    }
    assert counted == {("p", "200"): 3, ("", "400"): 3, ("", "200"): 3}


def test_a_body_in_pieces_is_read_whole() -> None:
    with closing(AppUnderTest(ServingSettings(max_body_bytes=1 << 27))) as app:  # above what the guard keeps
        for path in PATHS:
            assert app.ask(path, GOOD[path]).status == 200


class Unwanted:
    """In the framework's place."""

    async def __call__(self, *_: Any) -> None:
        raise AssertionError("the framework was asked")


@pytest.mark.parametrize("path", PATHS)
def test_the_framework_sees_no_inference(under_test: AppUnderTest, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(cast(Any, under_test.app).app, "_app", Unwanted())
    for body in (GOOD[path], b"{", b"{}", b""):
        assert under_test.ask(path, body).status in {200, 400, 422}
        assert under_test.ask(path, body, headers={"content-type": "text/plain"}).status in {200, 400, 415, 422}
    assert under_test.ask(path, b"", method="GET").status == 405


def test_paths(under_test: AppUnderTest) -> None:
    find = cast(Any, under_test.app).app.find
    assert find("/predict") == (inference.ROUTES[PREDICT], None)
    assert find("/v1/embeddings") == (openai.ROUTES[EMBEDDINGS], None)
    assert find("/v1/models/a:7/predict") == (inference.ROUTES[PREDICT_WITH], "a:7")
    for path in ("/", "/predict/", "/predict\n", "/v1/models//predict", "/v1/models/predict", "/v1/models/a/b/predict"):
        assert find(path) is None


# The OpenAPI document


@pytest.fixture(scope="module")
def document(under_test: AppUnderTest) -> dict[str, Any]:
    answered = under_test.ask("/openapi.json", b"", method="GET")
    assert answered.status == 200
    document: dict[str, Any] = answered.document
    return document


def test_the_document_shows_the_inference_routes(document: dict[str, Any]) -> None:
    identifiers = {
        PREDICT: "predict_predict_post",
        PREDICT_WITH: "predict_with_v1_models__model__predict_post",
        EMBEDDINGS: "embeddings_v1_embeddings_post",
    }
    for path, identifier in identifiers.items():
        name = "Embeddings" if path == EMBEDDINGS else "Predict"
        operation = document["paths"][path]["post"]
        assert operation["operationId"] == identifier
        assert operation["requestBody"] == {"required": True, "content": {"application/json": of(f"{name}Request")}}
        assert operation["responses"]["200"]["content"] == {"application/json": of(f"{name}Response")}
        parameters = [(parameter["name"], parameter["in"]) for parameter in operation.get("parameters", [])]
        assert parameters == [("model", "path")] * (path == PREDICT_WITH)
        assert "X-Request-Timeout-Ms" in operation["description"]
        own = {"application/json"} if path == EMBEDDINGS else set()
        for status, response in operation["responses"].items():
            if status != "200":
                assert set(response["content"]) == {"application/problem+json"} | own
        assert {"400", "401", "403", "404", "413", "422", "429", "503", "504"} <= set(operation["responses"])


def test_every_operation_says_who_may_and_how_it_may_be_refused(document: dict[str, Any]) -> None:
    assert set(document["components"]["securitySchemes"]) == {"bearer", "apiKey"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            is_open = path in PROBE_PATHS
            assert ("security" in operation) != is_open, path
            statuses = set(operation["responses"])
            assert {"400", "403", "408", "413", "414", "415", "431", "500"} <= statuses, path
            assert is_open or {"401", "422", "503"} <= statuses, path
            for status, response in operation["responses"].items():
                if "x-codes" in response:
                    assert {STATUS_BY_CODE[code] for code in response["x-codes"]} == {int(status)}
                    assert all(f"`{code}`" in response["description"] for code in response["x-codes"])
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                assert examples_of(document, body["schema"]), (method, path)


def examples_of(document: dict[str, Any], schema: dict[str, Any]) -> list[Any]:
    named = [one["$ref"].rpartition("/")[2] for one in [schema, *schema.get("anyOf", [])] if "$ref" in one]
    return [example for name in named for example in document["components"]["schemas"][name].get("examples", [])]


def of(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


def test_every_reference_of_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    named = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))
    assert set(named) <= set(document["components"]["schemas"])
    assert {"PredictRequest", "FinetuneRequest", "OneLabel"} <= set(named)


def test_the_document_says_what_each_parameter_is(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    defaults = {"truncate": True, "return_embedding": False}
    assert set(schemas["PredictParameters"]["properties"]) == {*Options.__dataclass_fields__, "timeout_ms"}
    for name, schema in schemas["PredictParameters"]["properties"].items():
        assert schema["description"]
        assert schema["default"] == defaults.get(name)
        assert {"type": "null"} in schema["anyOf"]  # null is as good as leaving it out
    assert (
        schemas["PredictParameters"]["additionalProperties"]
        is schemas["PredictRequest"]["additionalProperties"]
        is False
    )
    assert "additionalProperties" not in schemas["EmbeddingsRequest"]
    assert schemas["PredictRequest"]["required"] == ["inputs"]
    for example in schemas["PredictRequest"]["examples"]:
        wire.PredictRequest(**example)
    assert len(schemas["PredictResponse"]["examples"]) == len(TASKS)


def test_the_document_shows_the_answer_of_each_task(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    shown = [option["items"] for option in schemas["PredictResponse"]["properties"]["predictions"]["anyOf"]]
    assert shown == [of(task.answer_type.__name__)["schema"] for task in TASKS.values()]
    for task in TASKS.values():
        schema = schemas[task.answer_type.__name__]
        assert schema["properties"]["embedding"] == {"type": "array", "items": {"type": "number"}}
        assert "embedding" not in schema["required"]
        assert "index" in schema["required"]


# Answers

finite = st.floats(allow_nan=False, allow_infinity=False)
vectors = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1).map(
    lambda values: np.array(values, dtype=np.float32)
)


@given(rows_of_one_task(texts=texts, numbers=finite, vectors=vectors), st.none() | st.integers(1, 10**8))
def test_the_answer_is_the_documented_one(
    document: dict[str, Any], answered: tuple[str, list[Any], list[Any]], version: int | None
) -> None:
    task, rows, vectors = answered
    result = PredictResult("m", version, task, rows, vectors, 5, "torch", 1, Timings(0.0, 0.0, 0.0, 0.0))
    written = json.loads(wire.predictions(result))
    schemas = document["components"]["schemas"]
    for index, (row, found) in enumerate(zip(rows, written["predictions"], strict=True)):
        schema = schemas[type(row).__name__]
        assert set(schema["required"]) <= set(found) <= set(schema["properties"])
        assert found == msgspec.to_builtins(msgspec.structs.replace(row, embedding=msgspec.UNSET)) | {
            "index": index
        } | ({"embedding": found["embedding"]} if vectors else {})
    for vector, found in zip(vectors, written["predictions"], strict=bool(vectors)):
        assert np.array_equal(np.array(found["embedding"], dtype=np.float32), vector)
    assert written["id"].startswith("pred_") and len(written["id"]) == 37
    assert (written["object"], written["model"], written["version"]) == ("predictions", "m", version)
    assert written["usage"] == {"input_tokens": 5}
    assert set(written) == set(schemas["PredictResponse"]["required"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_vectors_of_any_layout(dtype: Any) -> None:
    vector = np.arange(8, dtype=dtype)[::2]
    assert json.loads(bytes(wire.decimals(vector))) == [0.0, 2.0, 4.0, 6.0]
    assert np.frombuffer(base64.b64decode(json.loads(wire.encode(openai.in_base64(vector)))), "<f4").tolist() == [
        0.0,
        2.0,
        4.0,
        6.0,
    ]


def test_an_embedding_as_floats_and_as_base64(under_test: AppUnderTest) -> None:
    found = []
    for encoding in ("float", "base64"):
        body = json.dumps({"model": "p", "input": ["a", "b"], "encoding_format": encoding}).encode()
        document = under_test.ask(EMBEDDINGS, body).document
        assert document["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        assert [(row["object"], row["index"]) for row in document["data"]] == [("embedding", 0), ("embedding", 1)]
        found.append(document["data"][1]["embedding"])
    (expected,) = result_for(1, with_embedding=True).vectors
    assert np.array_equal(np.array(found[0], dtype=np.float32), expected)
    assert np.array_equal(np.frombuffer(base64.b64decode(found[1]), "<f4"), expected)
