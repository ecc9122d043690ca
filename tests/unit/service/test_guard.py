"""The guard driven by hand: messages in, messages out, no socket and no waiting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_registry.errors import AliasConflict, DatabaseUnavailable, HashMismatch, ModelNotFound
from service.api.guard import DrainState, GuardLimits, RequestGuard, json_fault
from service.api.problems import Problem, problem_body, problem_for, problem_response

BODY_LIMIT = 1000
UPLOAD_LIMIT = 1 << 30


@dataclass
class Clock:
    """Time that passes only when told."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Answer:
    """What the guard sent."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        document: dict[str, Any] = json.loads(self.body)
        assert document["status"] == self.status
        assert document["request_id"] == self.headers["x-request-id"]
        return document


@dataclass
class Exchange:
    """One request through a guard over `app`, with the body in the given messages."""

    app: ASGIApp
    limits: GuardLimits = field(default_factory=GuardLimits)
    state: DrainState = field(default_factory=DrainState)
    clock: Clock = field(default_factory=Clock)
    seconds_per_message: float = 0.0
    never_ends: bool = False

    def run(
        self,
        *parts: bytes,
        path: str = "/predict",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        return asyncio.run(self._run(list(parts), path, headers or {}))

    async def _run(self, parts: list[bytes], path: str, headers: dict[str, str]) -> Answer:
        sent: list[Message] = []
        waiting = parts or [b""]

        async def receive() -> Message:
            if waiting:
                self.clock.now_s += self.seconds_per_message
                body = waiting.pop(0)
                return {"type": "http.request", "body": body, "more_body": bool(waiting) or self.never_ends}
            if self.never_ends:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        given_headers = {"transfer-encoding": "chunked"} | headers if parts else headers
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in given_headers.items()],
        }
        guard = RequestGuard(self.app, self.limits, self.state, body_limit, clock=self.clock)
        await guard(scope, receive, send)
        assert self.state.in_flight == 0
        start, *bodies = sent
        return Answer(
            start["status"],
            {name.decode(): value.decode() for name, value in start["headers"]},
            b"".join(message.get("body", b"") for message in bodies),
        )


def body_limit(path: str, method: str) -> int:
    return UPLOAD_LIMIT if path == "/datasets" else BODY_LIMIT


async def answer(send: Send, body: bytes = b"fine", status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body it was given and how many messages that took."""
    body, messages = b"", 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client left")
        body += message["body"]
        messages += 1
        if not message["more_body"]:
            break
    await answer(send, f"{messages}:".encode() + body)


def app_that(act: Callable[[Send], Awaitable[None]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await act(send)

    return app


def test_a_kept_body_arrives_as_one_message() -> None:
    assert Exchange(echo).run(b'{"a":', b"[1,", b"2]}").body == b'1:{"a":[1,2]}'


def test_an_upload_is_streamed() -> None:
    assert Exchange(echo).run(b"a", b"b", path="/datasets").body == b"2:ab"


def test_the_disconnect_reaches_the_app_after_the_body() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])
        await answer(send)

    Exchange(app).run(b"{}")
    assert seen == ["http.request", "http.disconnect"]


@pytest.mark.parametrize("path", ["/predict", "/datasets"])
def test_too_many_bytes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.UPLOAD_LIMIT", (64 << 20) + 1)
    part = b"1" * (BODY_LIMIT // 2 if path == "/predict" else 32 << 20)
    refused = Exchange(echo).run(part, part, b"12", b"more", path=path)
    assert (refused.status, refused.problem["code"]) == (413, "payload_too_large")
    assert refused.headers["connection"] == "close"


def test_a_declared_size_is_refused_before_the_body() -> None:
    async def receive_nothing(*_: Any) -> None:
        raise AssertionError("the app was called")

    for length in ("1001", "9" * 30, "-1"):
        assert Exchange(receive_nothing).run(headers={"content-length": length}).status == 413


def test_too_many_chunks_and_more_for_a_large_body() -> None:
    limits = GuardLimits(max_body_chunks=8)
    assert Exchange(echo, limits=limits).run(*[b"1"] * 8).status == 200
    assert Exchange(echo, limits=limits).run(*[b"1"] * 9).problem["code"] == "malformed_request"
    assert Exchange(echo, limits=limits).run(*[b""] * 9).status == 400
    assert Exchange(echo, limits=limits).run(*[b"x" * 1024] * 50, path="/datasets").status == 200


@pytest.mark.parametrize("path", ["/predict", "/datasets"])
def test_a_slow_body(path: str) -> None:
    limits = GuardLimits(min_body_bytes_per_s=10, body_grace_s=5, max_body_gap_s=100)
    slow = Exchange(echo, limits=limits, seconds_per_message=2).run(*[b"1"] * 4, path=path)
    assert (slow.status, slow.problem["code"], slow.headers["connection"]) == (408, "request_timeout", "close")
    assert Exchange(echo, limits=limits, seconds_per_message=2).run(*[b"1" * 20] * 10, path=path).status == 200


@pytest.mark.parametrize("path", ["/predict", "/datasets"])
def test_a_body_that_stops(path: str) -> None:
    limits = GuardLimits(body_grace_s=0, min_body_bytes_per_s=1_000_000)
    assert Exchange(echo, limits=limits, never_ends=True).run(b"1", path=path).status == 408
    limits = GuardLimits(max_body_gap_s=0)
    assert Exchange(echo, limits=limits, never_ends=True).run(b"1", path=path).status == 408


def test_time_of_a_slow_app_is_not_counted() -> None:
    clock = Clock()

    async def slow_app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            clock.now_s += 1000
        await answer(send)

    assert Exchange(slow_app, clock=clock).run(b"a", b"b", b"c", path="/datasets").status == 200


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "identity, br"])
def test_compressed_bodies(encoding: str) -> None:
    assert Exchange(echo).run(b"{}", headers={"content-encoding": encoding}).problem["code"] == "unsupported_media_type"
    assert Exchange(echo).run(b"{}", headers={"content-encoding": "identity"}).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 33 + b"]" * 33,
        b'{"a":' * 33,
        b"]" + b"[" * 33,
        b'"\\""' + b"[" * 33,
        b'{"a": "\xff"}',
        "[1]".encode("utf-16-le"),
    ],
)
def test_json_bombs_and_bad_text(body: bytes) -> None:
    assert Exchange(echo).run(body).problem["code"] == "malformed_request"


def test_json_that_only_looks_dangerous() -> None:
    body = orjson.dumps({"inputs": ["[{" * 100 + '\\"' + "é" * 20]})
    assert Exchange(echo).run(body).body == b"1:" + body
    assert Exchange(echo).run(b"[" * 32 + b"]" * 32).status == 200


def test_other_types_are_not_read_as_json() -> None:
    headers = {"content-type": "multipart/form-data; boundary=json"}
    assert Exchange(echo).run(b"\xff[" * 100, headers=headers).status == 200


def test_a_large_scan_leaves_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.BODY_LIMIT", 1 << 20)
    body = b"[" + b"1," * 100_001 + b"1]"
    assert "more than 100000 values" in Exchange(echo).run(body).problem["detail"]
    assert Exchange(echo).run(b"[" * 33 + b" " * 70_000).status == 400


json_values = st.recursive(
    st.none() | st.integers(-10, 10) | st.text(max_size=6),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=4),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(depth_of, children), default=0)


@given(json_values, st.booleans())
def test_the_scan_measures_what_the_parser_sees(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    depth = depth_of(value)
    assert json_fault(text, max_depth=depth, max_tokens=1000) is None
    if depth:
        assert json_fault(text, max_depth=depth - 1, max_tokens=1000) is not None


@given(st.binary(max_size=200))
def test_the_scan_never_fails(content: bytes) -> None:
    json_fault(content, max_depth=3, max_tokens=5)


def test_the_request_id_is_echoed_or_made() -> None:
    assert Exchange(echo).run(headers={"x-request-id": "abc-1_2.3"}).headers["x-request-id"] == "abc-1_2.3"
    for bad in ("", "a b", "x" * 129, "ab\n"):
        made = Exchange(echo).run(headers={"x-request-id": bad}).headers["x-request-id"]
        assert len(made) == 32 and int(made, 16) >= 0


def test_a_fault_becomes_a_500_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(send: Send) -> None:
        raise ValueError("a secret")

    failed = Exchange(app_that(fail)).run(headers={"x-request-id": "r-1"})
    assert failed.problem["code"] == "internal_error"
    assert b"secret" not in failed.body
    assert "r-1" in caplog.text and "a secret" in caplog.text


def test_a_fault_after_the_start_is_raised_again() -> None:
    async def fail(send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        Exchange(app_that(fail)).run()


def test_draining_closes_connections_and_refusing_refuses() -> None:
    state = DrainState()
    state.draining = True
    drained = Exchange(echo, state=state).run()
    assert (drained.status, drained.headers["connection"]) == (200, "close")
    state.refusing = True
    refused = Exchange(echo, state=state).run()
    assert (refused.status, refused.problem["code"]) == (503, "draining")
    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("5", "close")
    assert refused.problem["retry_after_ms"] == 5000
    assert Exchange(echo, state=state).run(path="/readyz").status == 200


def test_in_flight_counts_requests_but_not_probes() -> None:
    state = DrainState()
    counts: list[int] = []

    async def count(send: Send) -> None:
        counts.append(state.in_flight)
        await answer(send)

    for path in ("/predict", "/livez", "/metrics"):
        Exchange(app_that(count), state=state).run(path=path)
    assert counts == [1, 0, 0]


def test_a_cancelled_request_is_told_that_the_server_drains() -> None:
    state = DrainState()

    async def be_cancelled(send: Send) -> None:
        state.refusing = True
        raise asyncio.CancelledError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def run() -> None:
        scope: Scope = {"type": "http", "method": "GET", "path": "/predict", "headers": []}
        with pytest.raises(asyncio.CancelledError):
            await RequestGuard(app_that(be_cancelled), GuardLimits(), state, body_limit)(scope, receive, send)

    asyncio.run(run())
    assert sent[0]["status"] == 503


def test_errors_are_mapped_by_their_nearest_parent() -> None:
    missing = problem_for(ModelNotFound("no model x"))
    assert missing is not None and (missing.status, missing.code, missing.detail) == (
        404,
        "model_not_found",
        "no model x",
    )
    altered = problem_for(HashMismatch("file"))
    assert altered is not None and (altered.status, altered.code) == (409, "artifact_invalid")
    moved = problem_for(AliasConflict("moved", current_version=2))
    assert moved is not None and moved.status == 409
    away = problem_for(DatabaseUnavailable("table secrets is locked"))
    assert away is not None and (away.status, away.retry_after_s) == (503, 1.0)
    assert "secrets" not in away.detail
    assert problem_for(ValueError("x")) is None


def test_the_document_has_what_there_is_and_no_more() -> None:
    bare = problem_body(Problem(404, "not_found", "No."), path="/x", request_id="r")
    assert bare == {
        "type": "urn:polyhead:error:not_found",
        "title": "Not found",
        "status": 404,
        "detail": "No.",
        "instance": "/x",
        "code": "not_found",
        "request_id": "r",
    }
    full = Problem(429, "queue_full", "Full.", errors=[{"loc": ["body", "\ud800"], "message": "m"}], retry_after_s=1.2)
    response = problem_response(full, path="/x", request_id="r")
    assert response.headers["retry-after"] == "2"
    assert orjson.loads(response.body)["errors"] == [{"loc": ["body", "?"], "message": "m"}]
    assert orjson.loads(response.body)["retry_after_ms"] == 1200
