"""Front ends with real processes: the same answers as without them, and what happens when a process ends."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.guard import PROBE_PATHS
from tests.acceptance.conftest import Home, Service
from tests.acceptance.processes import Client, Server, children, is_running, problem, until
from tests.acceptance.test_drain import DELAY_S, GRACE_S, SENDING_S, Outcome, predict_until_gone

FRONT = "service.front"
JSON = {"Content-Type": "application/json"}
GOOD = {"model": "tiny", "inputs": ["a good film", "dull"], "parameters": {"return_embedding": True}}
THREADS = 4


@pytest.fixture(scope="module")
def fronted(make_home: Callable[..., Home]) -> Iterator[Service]:
    home = make_home(POLYHEAD_HTTP_PROCESSES="2")
    with home.server() as server, Client(server.wait_ready().url) as client:
        yield Service(home, server, client)


@pytest.fixture(scope="module")
def alone(make_home: Callable[..., Home]) -> Iterator[Service]:
    """The same without front ends, and with nothing that other tests have registered."""
    home = make_home()
    with home.server() as server, Client(server.wait_ready().url) as client:
        yield Service(home, server, client)


def front_ends(server: Server) -> set[int]:
    return set(children(server.pid, FRONT))


def metric(client: Client, name: str) -> float:
    """The sum over the series whose name and labels begin so."""
    text = client.http.get("/metrics").text
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}\S* (\S+)$", text, re.MULTILINE))


# Parity

REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/predict", {"json": GOOD}),
    ("POST", "/v1/models/tiny/predict", {"json": {k: GOOD[k] for k in ("inputs", "parameters")}}),
    ("POST", "/predict", {"json": GOOD | {"inputs": [["a", "b"]]}}),
    ("POST", "/predict", {"json": GOOD | {"parameters": {"return_embedding": True, "top_k": 10**30}}}),
    ("POST", "/predict", {"json": GOOD | {"parameters": {"return_embedding": "true"}}}),
    ("POST", "/predict", {"json": {"model": "tiny", "inputs": "a"}}),
    ("POST", "/predict", {"json": {"model": "nosuch", "inputs": "a"}}),
    ("POST", "/predict", {"json": {"model": "No Such", "inputs": "a"}}),
    ("POST", "/predict", {"json": {"inputs": "a"}}),
    ("POST", "/predict", {"json": GOOD | {"inputs": []}}),
    ("POST", "/predict", {"json": GOOD | {"inputs": ["a", " "]}}),
    ("POST", "/predict", {"json": GOOD | {"inputs": ["a"] * 257}}),
    ("POST", "/predict", {"json": GOOD | {"inputs": 3}}),
    ("POST", "/predict", {"json": GOOD | {"inputs": ["a " * 2000], "parameters": {"truncate": False}}}),
    ("POST", "/predict", {"json": GOOD | {"parameters": {"truncate": False, "max_length": 4}, "inputs": "a b c d e"}}),
    ("POST", "/v1/models/tiny/predict", {"json": GOOD | {"model": "other"}}),
    ("POST", "/predict", {"json": GOOD, "headers": {"X-Request-Timeout-Ms": "nonsense"}}),
    ("POST", "/predict", {"content": b"{", "headers": JSON}),
    ("POST", "/predict", {"content": b"", "headers": JSON}),
    ("POST", "/predict", {"content": b'{"model": "tiny", "inputs": "\xff"}', "headers": JSON}),
    ("POST", "/predict", {"content": b"[" * 100, "headers": JSON}),
    ("POST", "/predict", {"content": json.dumps(GOOD).encode()}),
    ("POST", "/predict", {"content": b"x" * 3_000_000, "headers": JSON}),
    ("POST", "/predict", {"json": GOOD, "headers": {"Content-Encoding": "gzip"}}),
    ("POST", "/predict", {"json": GOOD, "headers": {"Host": "evil.example"}}),
    ("POST", "/predict", {"json": GOOD, "headers": {"Origin": "https://evil.example"}}),
    ("POST", "/v1/embeddings", {"json": {"model": "tiny", "input": ["a", "b"]}}),
    ("POST", "/v1/embeddings", {"json": {"model": "tiny", "input": "a", "encoding_format": "base64", "unknown": 1}}),
    ("POST", "/v1/embeddings", {"json": {"model": "tiny", "input": "a", "dimensions": 3}}),
    ("POST", "/v1/embeddings", {"json": {"model": "nosuch", "input": "a"}}),
    ("POST", "/v1/embeddings", {"json": {"model": "tiny", "input": [1, 2]}}),
    ("GET", "/predict", {}),
    ("HEAD", "/openapi.json", {}),
    ("GET", "/openapi.json", {}),
    ("GET", "/docs", {}),
    ("GET", "/livez", {}),
    ("GET", "/readyz", {}),
    ("GET", "/models", {}),
    ("GET", "/models/%2e%2e%2fpasswd/../x", {}),
    ("GET", "/finetune?limit=5&after=", {}),
    ("GET", "/finetune?limit=none", {}),
    ("GET", "/nosuch", {}),
    ("DELETE", "/datasets/ds_" + "0" * 24, {}),
    ("POST", "/finetune", {"json": {"dataset": "none"}}),
    ("POST", "/datasets", {"content": b"no form", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}),
]


def comparable(response: httpx.Response) -> tuple[int, dict[str, str], Any]:
    """An answer without what is new each time."""
    fresh = {"date", "x-request-id", "server-timing", "content-length"}
    headers = {name: value for name, value in response.headers.items() if name not in fresh}
    try:
        body = response.json()
    except ValueError:
        return response.status_code, headers, response.content
    if isinstance(body, dict):
        for name in ("id", "request_id"):
            body.pop(name, None)
        for row in body.get("data", []) if isinstance(body.get("data"), list) else []:
            row.pop("created", None)
    return response.status_code, headers, body


def test_every_answer_is_the_one_of_a_single_process(alone: Service, fronted: Service) -> None:
    for method, path, request in REQUESTS:
        single, several = (
            client.http.request(method, path, **request, follow_redirects=False)
            for client in (alone.client, fronted.client)
        )
        given = str(request)[:200]
        assert several.headers.get_list("x-request-id") and len(several.headers.get_list("date")) == 1, given
        ours, theirs = comparable(several), comparable(single)
        assert ours == theirs, (method, path, given)


def test_a_request_keeps_its_id_on_both_ways(fronted: Service) -> None:
    for body in (GOOD, GOOD | {"inputs": 3}):
        response = fronted.client.http.post("/predict", json=body, headers={"X-Request-ID": "my.id-1"})
        assert response.headers.get_list("x-request-id") == ["my.id-1"]
    assert response.json()["request_id"] == "my.id-1"


def test_a_request_of_http_1_0_without_a_host(fronted: Service) -> None:
    with socket.create_connection(("127.0.0.1", fronted.server.port), timeout=10) as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.startswith(b"HTTP/1.1 200 ") and b'"ok"' in received


# What passes through


def test_uploads_and_event_streams_pass_through(fronted: Service) -> None:
    client = fronted.client
    rows = "".join(f"text number {number},{'ab'[number % 2]}\n" for number in range(20_000))
    before = client.upload("text,label\n" + rows)
    assert before["rows"] == 20_000

    def parts() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="d.csv"\r\n\r\ntext,label\n'
        for start in range(0, len(rows), 50_000):
            yield rows[start : start + 50_000].encode()
        yield b"\r\n--b--\r\n"

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    assert client.http.post("/datasets", content=parts(), headers=form).status_code == 201
    job = client.finetune(before["id"], "never", method="baseline")
    stream = client.http.stream("GET", f"/finetune/{job}/events", headers={"Accept": "text/event-stream"})
    with stream as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first = next(response.iter_lines())
    assert first.startswith("id: ")
    assert client.http.post(f"/finetune/{job}/cancel").status_code == 200


def test_a_client_that_leaves_is_counted_so(fronted: Service) -> None:
    body = json.dumps(GOOD | {"inputs": ["word " * 400] * 250}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"

    def left() -> bool:
        with socket.create_connection(("127.0.0.1", fronted.server.port), timeout=10) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            time.sleep(0.02)
        time.sleep(0.2)
        return metric(fronted.client, 'polyhead_requests_total{code="499",model="tiny"') > 0

    until(left, within_s=20, what="a request that was given up")


def test_requests_are_counted_whoever_answers_them(fronted: Service) -> None:
    client = fronted.client
    asked = {
        '{code="200",model="tiny"': {"json": GOOD},
        '{code="422",model=""': {"json": GOOD | {"inputs": 3}},
        '{code="404",model=""': {"json": GOOD | {"model": "nosuch"}},
        '{code="403",model=""': {"json": GOOD, "headers": {"Origin": "https://evil.example"}},
    }
    for series, request in asked.items():
        name = f"polyhead_requests_total{series}"
        before = metric(client, name)
        for _ in range(3):
            client.http.post("/predict", **request)  # type: ignore[arg-type]
        until(lambda name=name, before=before: metric(client, name) >= before + 3, within_s=5, what=name)  # type: ignore[misc]
        assert metric(client, name) == before + 3


# Processes


def test_a_front_end_that_is_killed_harms_no_other_and_comes_back(fronted: Service) -> None:
    server, client = fronted.server, fronted.client
    pids = front_ends(server)
    assert len(pids) == 2
    for pid in pids:  # as a terminal and a service manager would
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    outcomes: list[Outcome] = []
    is_over = threading.Event()
    with ThreadPoolExecutor(THREADS) as clients:
        loops = [clients.submit(predict_until_gone, server.url, is_over, outcomes) for _ in range(THREADS)]
        try:
            until(lambda: len(outcomes) > 5 * THREADS, within_s=30, what="some load")
            os.kill(victim := min(pids), signal.SIGKILL)
            killed = len(outcomes)
            until(lambda: len(outcomes) > killed + 5 * THREADS, within_s=30, what="more load")
            until(lambda: len(front_ends(server) - {victim}) == 2, within_s=10, what="a new front end")
        finally:
            is_over.set()
        for loop in loops:
            loop.result()
    failed = [outcome for outcome in outcomes if outcome.status != 200]
    assert {outcome.status for outcome in failed} <= {0} and len(failed) <= THREADS  # its own connections
    until(lambda: metric(client, "polyhead_front_ends") == 2, within_s=10, what="two front ends")
    assert metric(client, "polyhead_front_end_restarts_total") == 1
    assert max(pids) in front_ends(server)


def test_no_front_end_outlives_the_engine_process(fronted: Service) -> None:
    pids = front_ends(fronted.server)
    fronted.server.kill()
    until(lambda: not any(is_running(pid) for pid in pids), within_s=10, what="the end of the front ends")


# Keys, and the end of a server that has some

SCOPES = {"predicting": ["predict"], "nothing": [], "ours": ["admin"], "theirs": ["admin"]}
KEYS = {name: f"sk-{name}-0123456789" for name in SCOPES}


@pytest.fixture(scope="module")
def keyed(make_home: Callable[..., Home]) -> Iterator[Server]:
    listed = [
        {
            "name": name,
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "scopes": SCOPES[name],
            "tenant": "them" if name == "theirs" else "us",
        }
        for name, key in KEYS.items()
    ]
    home = make_home(
        POLYHEAD_API_KEYS=json.dumps(listed),
        POLYHEAD_HTTP_PROCESSES="2",
        POLYHEAD_DRAIN_DELAY_S=str(DELAY_S),
        POLYHEAD_DRAIN_GRACE_S=str(GRACE_S),
    )
    with home.server() as server:
        yield server.wait_ready()


def test_keys_stay_out_of_sight(keyed: Server) -> None:
    for pid in front_ends(keyed):
        shown = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        assert not any(hashlib.sha256(key.encode()).hexdigest().encode() in shown for key in KEYS.values())


def test_keys_scopes_and_tenants_hold(keyed: Server) -> None:
    with Client(keyed.url) as nobody:
        for path in sorted(PROBE_PATHS):
            assert nobody.http.get(path).status_code == 200
        problem(nobody.http.post("/predict", json=GOOD), 401, "unauthenticated")
        problem(nobody.http.get("/models"), 401, "unauthenticated")
        assert nobody.http.get("/models", headers={"X-API-Key": KEYS["nothing"]}).status_code == 200
    with Client(keyed.url, key=KEYS["nothing"]) as client:
        problem(client.http.post("/predict", json=GOOD), 403, "forbidden")
        assert client.http.post("/v1/embeddings", json={"model": "tiny", "input": "a"}).status_code == 403
    with Client(keyed.url, key=KEYS["predicting"]) as client:
        assert client.http.post("/predict", json=GOOD, headers={"Host": "service.example"}).status_code == 200
        problem(client.http.get("/datasets"), 403, "forbidden")
    with Client(keyed.url, key=KEYS["ours"]) as ours, Client(keyed.url, key=KEYS["theirs"]) as theirs:
        dataset = ours.upload("text,label\n" + "a b,x\nc d,y\n" * 50)["id"]
        assert theirs.get("/datasets")["data"] == []
        problem(theirs.http.get(f"/datasets/{dataset}"), 404, "dataset_not_found")


def test_no_request_fails_that_came_before_the_drain_ended(keyed: Server) -> None:
    outcomes: list[Outcome] = []
    is_over = threading.Event()
    key = KEYS["ours"]
    with ThreadPoolExecutor(THREADS + 1) as clients, Client(keyed.url, key=key) as streaming:
        dataset = streaming.upload("text,label\n" + "e f,x\ng h,y\n" * 50)["id"]
        events = clients.submit(stream_to_end, streaming, streaming.finetune(dataset, "never", method="baseline"))
        loops = [clients.submit(predict_until_gone, keyed.url, is_over, outcomes, key) for _ in range(THREADS - 1)]
        try:
            until(lambda: len(outcomes) > 5 * THREADS, within_s=30, what="some load")
            pids = front_ends(keyed)
            signalled = time.monotonic()
            slow = clients.submit(send_slowly, streaming, seconds=DELAY_S + 1)
            time.sleep(0.2)
            for pid in (*pids, keyed.pid):  # Ctrl-C reaches them all
                os.kill(pid, signal.SIGINT)
            with httpx.Client(base_url=keyed.url, timeout=10) as probe:
                until(lambda: probe.get("/readyz").status_code == 503, within_s=1, what="/readyz to turn")
                assert probe.get("/readyz").json()["reason"] == "draining"
            assert keyed.popen.wait(DELAY_S + GRACE_S) == 0
            ended = time.monotonic()
        finally:
            is_over.set()
        for loop in loops:
            loop.result()
        assert events.result()
        assert slow.result() == 422  # let in before the end of the delay, passed on after it
    drain_began = signalled + DELAY_S
    early = [outcome for outcome in outcomes if outcome.started < drain_began - SENDING_S]
    late = [outcome for outcome in outcomes if outcome.started >= drain_began]
    assert [(o.status, o.code, o.started - drain_began) for o in early if o.status != 200] == []
    assert sum(outcome.started > signalled for outcome in early) > THREADS
    assert {(o.status, o.code) for o in late} <= {(200, ""), (503, "draining"), (0, "gone")}
    assert DELAY_S <= ended - signalled < DELAY_S + 5
    assert not any(is_running(pid) for pid in pids)


def send_slowly(client: Client, *, seconds: float) -> int:
    """The status of a request that a front end leaves to the engine process, once all of it is there."""

    def parts() -> Iterator[bytes]:
        yield b'{"model": "tiny", '
        time.sleep(seconds)
        yield b'"inputs": 3}'

    return client.http.post("/predict", content=parts(), headers=JSON).status_code


def stream_to_end(client: Client, job: str) -> bool:
    """Whether the stream of events ended as a stream should."""
    with client.http.stream("GET", f"/finetune/{job}/events", headers={"Accept": "text/event-stream"}) as response:
        response.read()
    return True
