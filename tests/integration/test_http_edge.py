"""The edge over real sockets: a uvicorn server in a thread for limits, in a process for signals."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from fastapi import FastAPI, Request, UploadFile
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from model_registry.errors import ModelNotFound
from service.api import problems
from service.api.cancellation import unless_gone
from service.api.guard import DrainState, GuardLimits, RequestGuard
from service.http_limits import HeaderLimits
from service.server import DrainTimes
from tests.support.edge import (
    WAIT_S,
    Edge,
    chunked,
    post,
    problem_in,
    read_all,
    read_answer,
    refusal,
    serving,
    wait_until,
)
from tests.support.uncollected import uncollected

REPOSITORY = Path(__file__).parents[2]
TWO_MB = 2 << 20
TEN_MB = 10 << 20


class Inputs(BaseModel):
    kind: Literal["text", "image"]
    count: int = 0


def make_app() -> FastAPI:
    """A small application with one route for each thing the edge must handle."""
    app = FastAPI()
    problems.install(app)

    @app.post("/predict")
    async def predict(inputs: Inputs) -> dict[str, str]:
        return {"kind": inputs.kind}

    @app.post("/anything")
    async def anything(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.post("/datasets")
    async def upload(file: UploadFile) -> dict[str, int]:
        return {"bytes": len(await file.read())}

    @app.get("/slow")
    async def slow(seconds: float) -> dict[str, bool]:
        await asyncio.sleep(seconds)
        return {"done": True}

    @app.get("/until_disconnect")
    async def until_disconnect(request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        app.state.has_seen_disconnect = True

    app.state.held = app.state.given_up = 0

    @app.post("/held")
    async def held(request: Request) -> None:
        async def hold() -> None:
            app.state.held += 1
            await asyncio.Event().wait()

        try:
            await unless_gone(request.scope, hold())
        except problems.Problem as problem:
            app.state.given_up += problem.status == 499

    @app.get("/missing")
    async def missing() -> None:
        raise ModelNotFound("There is no model x.")

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("the inner secret")

    @app.get("/headers")
    async def headers(request: Request) -> list[str]:
        return list(request.headers)

    @app.get("/broken_stream")
    async def broken_stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            raise RuntimeError("the inner secret")

        return StreamingResponse(parts())

    return app


def body_limit(path: str, method: str) -> int:
    return 1 << 30 if path == "/datasets" else TWO_MB


@contextmanager
def running(
    limits: GuardLimits | None = None,
    header_limits: HeaderLimits | None = None,
    app: Any = None,
    lifespan: Literal["on", "off"] = "on",
) -> Iterator[Edge]:
    guard = RequestGuard(app or make_app(), limits or GuardLimits(), DrainState(), body_limit)
    with serving(guard, header_limits, lifespan=lifespan) as edge:
        yield edge


def state_of(edge: Edge) -> Any:
    """The state of the small application behind the guard."""
    return edge.server.config.app.app.state  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    """A server under the default limits."""
    with running() as edge:
        yield edge


@pytest.fixture(scope="module")
def hasty_edge() -> Iterator[Edge]:
    """A server that waits for no request."""
    limits = GuardLimits(body_grace_s=0.3, max_body_chunks=64)
    with running(limits, HeaderLimits(header_timeout_s=0.4)) as edge:
        yield edge


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await Response(b"{}", media_type="application/json")(scope, receive, send)


def test_requests_leave_nothing_to_the_garbage_collector() -> None:
    """Only collections would find it, and those stop every thread."""
    with running(app=plain, lifespan="off") as edge, closing(edge.connect()) as connection:

        def ask(times: int) -> None:
            for _ in range(times):
                connection.sendall(post("/predict", "Content-Length: 16") + b'{"kind": "text"}')
                read_answer(connection)

        ask(5)
        with uncollected() as kinds:
            ask(40)
            time.sleep(0.05)
    assert sum(kinds.values()) < 20, kinds


# Ordinary requests


def test_requests_on_one_connection(edge: Edge) -> None:
    with httpx.Client(base_url=edge.url) as client:
        for _ in range(3):
            answer = client.post("/predict", json={"kind": "text"}, headers={"X-Request-ID": "my.id-1"})
            assert (answer.status_code, answer.json()) == (200, {"kind": "text"})
            assert answer.headers["x-request-id"] == "my.id-1"
            assert "connection" not in answer.headers
        assert len(client.get("/slow?seconds=0").headers["x-request-id"]) == 32


def test_bodies_in_every_framing(edge: Edge) -> None:
    def parts() -> Iterator[bytes]:
        yield from [b"1" * 100_000] * 20

    with httpx.Client(base_url=edge.url) as client:
        assert client.post("/anything", content=parts()).json() == {"bytes": 2_000_000}
        assert client.post("/anything", content=b"1" * 2_000_000).json() == {"bytes": 2_000_000}
        assert client.post("/datasets", files={"file": b"x" * TEN_MB}).json() == {"bytes": TEN_MB}


def test_pipelined_requests_are_answered_in_order(edge: Edge) -> None:
    slow, quick = b"GET /slow?seconds=0.2 HTTP/1.1\r\nHost: x\r\n", b"GET /headers HTTP/1.1\r\nHost: x\r\n"
    raw = edge.exchange(slow + b"\r\n" + quick + b"\r\n" + quick + b"Connection: close\r\n\r\n")
    assert raw.count(b"HTTP/1.1 200") == 3
    assert raw.index(b'{"done":true}') < raw.index(b'["host"]') < raw.index(b'["host","connection"]')


def test_is_disconnected_works(edge: Edge) -> None:
    connection = edge.connect()
    connection.sendall(b"GET /until_disconnect HTTP/1.1\r\nHost: x\r\n\r\n")
    time.sleep(0.1)
    assert not hasattr(state_of(edge), "has_seen_disconnect")
    connection.close()
    wait_until(lambda: getattr(state_of(edge), "has_seen_disconnect", False))


@pytest.mark.parametrize("size", [1, 60_000, 70_000, 1_000_000])
@pytest.mark.parametrize("is_reset", [False, True])
def test_work_ends_when_its_client_leaves(edge: Edge, size: int, is_reset: bool) -> None:
    held, given_up = state_of(edge).held, state_of(edge).given_up
    with closing(edge.connect()) as connection:
        connection.sendall(post("/held", f"Content-Length: {size}") + b"1" * size)
        wait_until(lambda: state_of(edge).held > held)
        time.sleep(0.05)
        assert state_of(edge).given_up == given_up
        if is_reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: state_of(edge).given_up > given_up)


def test_work_ends_when_its_client_sends_no_more(edge: Edge) -> None:
    given_up = state_of(edge).given_up
    with closing(edge.connect()) as connection:
        connection.sendall(post("/held", "Content-Length: 1") + b"1")
        time.sleep(0.05)
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: state_of(edge).given_up > given_up)


def test_expect_continue(edge: Edge) -> None:
    with closing(edge.connect()) as connection:
        connection.sendall(post("/anything", "Content-Length: 4", "Expect: 100-continue"))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"1234")
        assert b'{"bytes":4}' in read_answer(connection)
    refused = edge.exchange(post("/anything", f"Content-Length: {TEN_MB}", "Expect: 100-continue"))
    assert refusal(refused) == (413, "payload_too_large")


# Errors of the application


def test_invalid_and_malformed_json(edge: Edge) -> None:
    with httpx.Client(base_url=edge.url) as client:
        invalid = client.post("/predict", json={"kind": "SECRET", "count": "SECRET"})
        assert (invalid.status_code, invalid.json()["code"]) == (422, "invalid_request")
        assert [item["loc"] for item in invalid.json()["errors"]] == [["body", "kind"], ["body", "count"]]
        assert "SECRET" not in invalid.text
        malformed = client.post("/predict", content=b'{"kind": SECRET', headers={"Content-Type": "application/json"})
        assert (malformed.status_code, malformed.json()["code"]) == (400, "malformed_request")
        assert "SECRET" not in malformed.text


def test_mapped_and_unexpected_errors_keep_the_connection(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    with closing(edge.connect()) as connection:
        connection.sendall(b"GET /missing HTTP/1.1\r\nHost: x\r\n\r\n")
        assert problem_in(read_answer(connection))["code"] == "model_not_found"
        connection.sendall(b"GET /broken HTTP/1.1\r\nHost: x\r\nX-Request-ID: r-7\r\n\r\n")
        broken = read_answer(connection)
        assert problem_in(broken)["code"] == "internal_error"
        assert b"secret" not in broken
        connection.sendall(b"GET /headers HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(connection).startswith(b"HTTP/1.1 200")
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1 and "r-7" in logged[0].getMessage()


def test_a_stream_that_breaks_is_cut_off(edge: Edge) -> None:
    raw = edge.exchange(b"GET /broken_stream HTTP/1.1\r\nHost: x\r\n\r\n")
    assert raw.endswith(b"5\r\nfirst\r\n")


# Bodies


def test_too_large_in_chunks(edge: Edge) -> None:
    part = chunked(b"1" * 65536)
    raw = edge.exchange(post("/anything", "Transfer-Encoding: chunked"), *[part] * 160, b"0\r\n\r\n")
    assert refusal(raw) == (413, "payload_too_large")


def test_a_client_library_sees_the_refusal_of_a_large_body(edge: Edge) -> None:
    with httpx.Client(base_url=edge.url) as client:
        assert client.post("/anything", content=b"1" * TEN_MB).status_code == 413


@pytest.mark.parametrize("path", ["/anything", "/datasets"])
@pytest.mark.parametrize(
    ("framing", "start"),
    [("Content-Length: 1000", b"--b\r\n"), ("Transfer-Encoding: chunked", b"5\r\n--b\r\n\r\n")],
)
def test_a_slow_body(hasty_edge: Edge, path: str, framing: str, start: bytes) -> None:
    raw = hasty_edge.exchange(post(path, framing, media_type="multipart/form-data; boundary=b"), start)
    assert refusal(raw) == (408, "request_timeout")


# Framing and headers


def test_headers_without_end(edge: Edge) -> None:
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = b"x" * 65536
    raw = edge.exchange(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", *[part] * 160)
    assert refusal(raw) == (431, "headers_too_large")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 8 * 1024


def test_trailers_are_bounded_and_never_become_headers(edge: Edge) -> None:
    start = post("/anything", "Transfer-Encoding: chunked", "Connection: close") + chunked(b"1")
    assert b'{"bytes":1}' in edge.exchange(start + b"0\r\nContent-Encoding: gzip\r\n\r\n")
    raw = edge.exchange(start + b"0\r\nX-Long: ", *[b"x" * 65536] * 160)
    assert refusal(raw) == (431, "headers_too_large")


def test_slow_headers(hasty_edge: Edge) -> None:
    with closing(hasty_edge.connect()) as connection:
        for byte in b"GET /he":
            connection.sendall(bytes([byte]))
            time.sleep(0.03)
        assert refusal(read_all(connection)) == (408, "request_timeout")


def test_slow_headers_of_a_second_request(hasty_edge: Edge) -> None:
    with closing(hasty_edge.connect()) as connection:
        connection.sendall(b"GET /headers HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(connection).startswith(b"HTTP/1.1 200")
        time.sleep(0.6)  # idle between requests is not a slow header
        connection.sendall(b"GET /headers")
        assert refusal(read_all(connection)) == (408, "request_timeout")


def test_a_silent_connection_is_closed_without_a_word(hasty_edge: Edge) -> None:
    assert hasty_edge.exchange() == b""


def test_a_bad_second_request_never_answers_for_the_first(edge: Edge) -> None:
    raw = edge.exchange(b"GET /slow?seconds=0.2 HTTP/1.1\r\nHost: x\r\n\r\nNONSENSE\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 200") and raw.count(b"HTTP/1.1 ") == 1
    assert raw.endswith(b'{"done":true}')


# The end of the process

SERVER_PROGRAM = textwrap.dedent(
    """
    import sys
    from contextlib import asynccontextmanager
    from fastapi import FastAPI, Response
    from service.api import problems
    from service.api.guard import DrainState, GuardLimits, RequestGuard
    from service.server import DrainTimes, serve
    import asyncio

    port, delay, grace, within, stop_s = int(sys.argv[1]), *map(float, sys.argv[2:])
    state = DrainState()

    @asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.sleep(stop_s)
        print("stopped", flush=True)

    app = FastAPI(lifespan=lifespan)
    problems.install(app)

    @app.get("/readyz")
    async def ready():
        return Response(status_code=503 if state.draining else 200)

    @app.get("/slow")
    async def slow(seconds: float):
        await asyncio.sleep(seconds)
        return {"done": True}

    guard = RequestGuard(app, GuardLimits(), state, lambda path, method: 1000)
    serve(guard, host="127.0.0.1", port=port, times=DrainTimes(delay, grace, within))
    """
)


@asynccontextmanager
async def served(
    *, delay_s: float, grace_s: float, within_s: float = 10.0, stop_s: float = 0.0
) -> AsyncIterator[tuple[subprocess.Popen[bytes], httpx.AsyncClient]]:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    process = start_program(port, delay_s, grace_s, within_s, stop_s)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
            await answering(client)
            yield process, client
    finally:
        process.kill()
        process.communicate()


def start_program(*arguments: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SERVER_PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


async def answering(client: httpx.AsyncClient) -> None:
    for _ in range(1000):
        try:
            await client.get("/readyz")
            return
        except httpx.TransportError:
            await asyncio.sleep(0.02)
    raise AssertionError("the server did not start")


async def ended(process: subprocess.Popen[bytes], within_s: float) -> int:
    return await asyncio.to_thread(process.wait, within_s)


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(stop_signal: signal.Signals) -> None:
    async def scenario() -> None:
        async with served(delay_s=1.0, grace_s=5.0) as (process, client):
            slow = asyncio.create_task(client.get("/slow?seconds=2.5"))
            before = await client.get("/slow?seconds=0")
            assert (before.status_code, "connection" in before.headers) == (200, False)
            process.send_signal(stop_signal)
            await asyncio.sleep(0.2)
            assert (await client.get("/readyz")).status_code == 503
            during = await client.get("/slow?seconds=0")
            assert (during.status_code, during.headers["connection"]) == (200, "close")
            await asyncio.sleep(1.3)
            after = await client.get("/slow?seconds=0")
            assert (after.status_code, after.json()["code"], after.headers["retry-after"]) == (503, "draining", "5")
            assert (await client.get("/readyz")).status_code == 503
            finished = await slow
            assert (finished.status_code, finished.headers["connection"]) == (200, "close")
            assert await ended(process, 10.0) == 0
            assert process.stdout is not None and process.stdout.read() == b"stopped\n"

    asyncio.run(scenario())


@pytest.mark.parametrize("was_used", [False, True], ids=["opened", "kept alive"])
def test_a_request_on_its_way_at_the_end_is_told(was_used: bool) -> None:
    """The server has decided to end when it comes, on a connection that it could have closed."""

    async def scenario() -> None:
        async with served(delay_s=0.0, grace_s=5.0) as (process, client):
            port = client.base_url.port
            assert port is not None
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if was_used:
                writer.write(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200" in await reader.readuntil(b"\r\n\r\n")
            process.send_signal(signal.SIGTERM)
            while is_listening(port):
                await asyncio.sleep(0.005)
            writer.write(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            assert b" 503 " in answer and b'"code":"draining"' in answer
            writer.close()
            assert await ended(process, 10.0) == 0

    asyncio.run(scenario())


def is_listening(port: int) -> bool:
    """By proc(5): asking by a connection would be a connection."""
    sockets = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(local.endswith(f":{port:04X}") and state == "0A" for local, _, state in sockets)


def test_no_connection_is_lost_as_the_listener_closes() -> None:
    """Clients that open a connection for each request, without a pause, until nothing listens any more."""

    async def client(port: int) -> list[str]:
        outcomes: list[str] = []
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return outcomes
            try:
                writer.write(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                outcomes.append((await reader.read()).partition(b"\r\n")[0].decode() or "closed")
            except ConnectionError as error:
                outcomes.append(type(error).__name__)
            writer.close()

    async def scenario() -> None:
        async with served(delay_s=0.0, grace_s=5.0) as (process, http):
            port = http.base_url.port
            assert port is not None
            clients = [asyncio.create_task(client(port)) for _ in range(16)]
            await asyncio.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            outcomes = Counter(outcome for done in await asyncio.gather(*clients) for outcome in done)
            assert set(outcomes) == {"HTTP/1.1 200 OK", "HTTP/1.1 503 Service Unavailable"}, outcomes
            assert await ended(process, 10.0) == 0

    asyncio.run(scenario())


def test_a_request_that_outlives_the_grace_is_told() -> None:
    async def scenario() -> None:
        async with served(delay_s=0.0, grace_s=0.5) as (process, client):
            slow = asyncio.create_task(client.get("/slow?seconds=60"))
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            told = await slow
            assert (told.status_code, told.json()["code"]) == (503, "draining")
            assert await ended(process, 3.0) == 0

    asyncio.run(scenario())


def test_a_second_signal_ends_it_now() -> None:
    async def scenario() -> None:
        async with served(delay_s=5.0, grace_s=4.0) as (process, client):
            slow = asyncio.create_task(client.get("/slow?seconds=60"))
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert await ended(process, 3.0) == 0
            assert (await slow).json()["code"] == "draining"

    asyncio.run(scenario())


def test_an_application_that_does_not_stop_is_left_behind() -> None:
    async def scenario() -> None:
        async with served(delay_s=0.0, grace_s=0.5, within_s=8.0, stop_s=60.0) as (process, _):
            process.send_signal(signal.SIGTERM)
            assert await ended(process, 20.0) == 0

    asyncio.run(scenario())


def test_times_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="exit_within_s"):
        DrainTimes(drain_delay_s=40, grace_s=30, exit_within_s=60)
