"""Refusals for want of room by the protocol: the same as those of the routes, and only those."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from service.inference.errors import QueueFull
from service.settings import ApiKey, ServingSettings
from tests.support.asgi import HEADERS, LABELS, AppUnderTest
from tests.support.uncollected import uncollected

KEY, READER = "k" * 40, "r" * 40
GOOD = {
    "/predict": b'{"model": "p", "inputs": "a"}',
    "/v1/models/p/predict": b'{"inputs": ["a", "b"]}',
    "/v1/embeddings": b'{"model": "p", "input": ["a"]}',
}
ID = {"x-request-id": "mine"}


@pytest.fixture
def under_test() -> Iterator[AppUnderTest]:
    with closing(AppUnderTest()) as app:
        overload(app)
        yield app


def overload(app: AppUnderTest) -> None:
    app.predictor.error = app.predictor.refused = QueueFull("come back", reason="queue_full", retry_after_s=1.25)


def early(app: AppUnderTest, path: str, body: bytes, **headers: str) -> Any:
    given = HEADERS | ID | {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    assert app.app.early is not None
    return app.app.early.answer(path, raw, body)


@pytest.mark.parametrize("path", GOOD)
def test_the_answer_is_that_of_the_route(under_test: AppUnderTest, path: str) -> None:
    usual = under_test.ask(path, GOOD[path], headers=ID)
    response = early(under_test, path, GOOD[path])
    headers = {name.decode(): value.decode() for name, value in response.raw_headers}
    assert (response.status_code, response.body, headers) == (429, usual.body, usual.headers)
    assert headers["x-request-id"] == "mine"
    answered = under_test.metrics.requests_total.labels(*LABELS, "429")
    assert answered._value.get() == 2


def test_it_is_due_while_the_predictor_refuses_and_the_server_stays(under_test: AppUnderTest) -> None:
    assert under_test.app.early is not None
    assert under_test.app.early.is_due
    under_test.drain.draining = True
    assert not under_test.app.early.is_due
    under_test.drain.draining, under_test.predictor.refused = False, None
    assert not under_test.app.early.is_due


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/predict", b'{"model": "p", "inputs": ', {}),
        ("/predict", b'{"model": "p", "inputs": "\xff"}', {}),
        ("/predict", b'{"model": "p", "inputs": "a", "more": 1}', {}),
        ("/predict", b'{"inputs": "a"}', {}),
        ("/v1/embeddings", b'{"model": "p", "input": "a", "more": ' + b"[" * 30_000, {}),
        ("/predict", b'{"model": "not a name!", "inputs": "a"}', {}),
        ("/predict", GOOD["/predict"], {"content_type": "text/plain"}),
        ("/predict", GOOD["/predict"], {"content_encoding": "gzip"}),
        ("/predict", GOOD["/predict"], {"origin": "https://elsewhere.example"}),
        ("/predict?a=1", GOOD["/predict"], {}),
        ("/v1/models/p%40x/predict", GOOD["/v1/models/p/predict"], {}),
        ("/finetune", GOOD["/predict"], {}),
    ],
)
def test_all_else_goes_the_usual_way(under_test: AppUnderTest, path: str, body: bytes, headers: dict[str, str]) -> None:
    assert early(under_test, path, body, **headers) is None


def test_where_there_is_room_the_request_goes_the_usual_way(under_test: AppUnderTest) -> None:
    under_test.predictor.refused = None
    assert early(under_test, "/predict", GOOD["/predict"]) is None


def test_callers_are_known_first() -> None:
    keys = [
        ApiKey(name=name, sha256=hashlib.sha256(key.encode()).hexdigest(), tenant="t", scopes=scopes)
        for name, key, scopes in (("all", KEY, ["predict"]), ("reader", READER, ["datasets"]))
    ]
    with closing(AppUnderTest(ServingSettings(api_keys=keys))) as app:
        overload(app)
        ask: Callable[..., Any] = lambda **headers: early(app, "/predict", GOOD["/predict"], **headers)  # noqa: E731
        assert ask() is None
        assert ask(authorization="Bearer wrong") is None
        assert ask(authorization=f"Bearer {READER}") is None
        assert ask(authorization=f"Bearer {KEY}").status_code == 429


@pytest.mark.parametrize("path", GOOD)
def test_refusals_leave_nothing_to_the_garbage_collector(under_test: AppUnderTest, path: str) -> None:
    with uncollected() as kinds:
        for _ in range(20):
            under_test.ask(path, GOOD[path])
            early(under_test, path, GOOD[path])
    assert sum(kinds.values()) < 20, kinds
