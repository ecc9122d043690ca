"""CPU time of a request outside of the model: `python -m benchmarks.http_overhead [--base CHECKOUT]`.

One process, no socket. `app` calls the guarded application as a server would, from the guard inwards; `server` feeds
the request's bytes to the HTTP protocol and collects what it writes. The predictor is replaced by one that answers a
constant after one turn of the event loop, so that all that is left is HTTP; in the rows `real predictor` it is the real
one, over an engine that is free, and only the event loop's thread counts.

With `--base` the same is measured in another checkout, in turns with this one, and the ratio of the medians is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import uvicorn
import uvloop
from starlette.types import ASGIApp, Message
from uvicorn.server import ServerState

from benchmarks.service import write_results
from model_registry.db import Database
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.backbone import ingest
from modeling.engines.fake import FakeEngine
from modeling.tasks import Answer, Score
from modeling.tasks.single_label import OneLabel
from modeling.testing import write_tiny_checkpoint
from service.api.cancellation import CONNECTION_LOST
from service.api.deps import Services
from service.api.guard import DrainState
from service.app import create_app
from service.http_limits import HeaderLimits, limited_protocol
from service.inference.capacity import AdmissionController
from service.inference.model_pool import ModelPool
from service.inference.predictor import Predictor, PredictResult, Timings
from service.metrics import ServingMetrics
from service.settings import ApiKey, ServingSettings
from tests.support.world import World

WIDTH = 384
LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
WARM_UP = 200
SHORT = "the film holds the attention to the end"
LONG = "An effective film that holds the attention to the end; its actors are better than their lines. " * 20
KEY = "not-a-secret"
KEYS = (ApiKey(name="bench", sha256=hashlib.sha256(KEY.encode()).hexdigest(), scopes=frozenset({"predict"})),)

Ask = Callable[[], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    path: str
    body: dict[str, Any]

    @property
    def rows(self) -> int:
        inputs = self.body.get("inputs", self.body.get("input"))
        return 1 if isinstance(inputs, str) else len(cast(list[str], inputs))


CASES = (
    Case("predict, one short text", "/predict", {"model": "m", "inputs": SHORT}),
    Case("predict, one long text", "/predict", {"model": "m", "inputs": LONG}),
    Case("predict, 32 texts", "/predict", {"model": "m", "inputs": [SHORT] * 32}),
    Case(
        "predict, parameters, model in the path",
        "/v1/models/m/predict",
        {"inputs": [SHORT], "parameters": {"top_k": 1, "timeout_ms": 5000}},
    ),
    Case("embeddings, one short text", "/v1/embeddings", {"model": "tiny", "input": SHORT}),
    Case(
        "embeddings, one short text, base64",
        "/v1/embeddings",
        {"model": "tiny", "input": SHORT, "encoding_format": "base64"},
    ),
    Case("embeddings, one long text", "/v1/embeddings", {"model": "tiny", "input": LONG}),
    Case("embeddings, 32 texts", "/v1/embeddings", {"model": "tiny", "input": [SHORT] * 32}),
)
KEYED = Case("predict, one short text, with a key", "/predict", CASES[0].body)


class ConstantPredictor:
    """Answers after one turn of the event loop, as any real answer needs at least one."""

    def __init__(self) -> None:
        probabilities = np.linspace(0.3, 0.01, len(LABELS))
        self._scores = [Score(label, float(value)) for label, value in zip(LABELS, probabilities, strict=True)]
        self._vector = np.random.default_rng(0).normal(size=WIDTH).astype(np.float32)

    async def predict(
        self, model: Any, inputs: Any, options: Any, *, deadline: float, needs_labels: bool = True
    ) -> PredictResult:
        await asyncio.sleep(0)
        return PredictResult(
            model=model.name,
            version=1,
            task="text-classification",
            answers=[self._answer(embedded=options.return_embedding) for _ in inputs],
            vectors=[self._vector] * len(inputs) if options.return_embedding else [],
            input_tokens=12,
            engine="fake",
            batch_rows=1,
            timings=Timings(queue=0.00042, preprocess=0.00013, inference=0.0042, total=0.0051),
        )

    def _answer(self, *, embedded: bool) -> Answer:
        return OneLabel(0, None, None, []) if embedded else OneLabel(0, LABELS[0], 0.3, self._scores)


class FakeTransport(asyncio.Transport):
    """Collects what the protocol writes; complete once the body's announced length is there."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 50000), "sockname": ("127.0.0.1", 8000)})
        self.written: list[bytes] = []
        self.answered = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))
        if not bytes(data).startswith(b"HTTP/1.1 "):
            self.answered.set()

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def measure(*, requests: int, repeats: int) -> dict[str, float]:
    """Median microseconds a request by case."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        for name, row in uvloop.run(_measure(Path(folder), requests, repeats)):
            figures[name] = round(statistics.median(row), 1)
    return figures


async def _measure(folder: Path, requests: int, repeats: int) -> list[tuple[str, list[float]]]:
    figures = []
    async with _pool(folder) as pool:
        constant = cast(Predictor, ConstantPredictor())
        async with _served(pool, constant) as app:
            for case in CASES:
                figures.append((f"app: {case.name}", await _repeat(_through_app(app, case), requests, repeats)))
            for case in (CASES[0], CASES[2], CASES[4]):
                figures.append((f"server: {case.name}", await _repeat(_through_server(app, case), requests, repeats)))
        async with _served(pool, constant, keys=KEYS) as app:
            figures.append((f"app: {KEYED.name}", await _repeat(_through_app(app, KEYED), requests, repeats)))
        admission = AdmissionController(max_inputs=512, max_queue_delay_s=60)
        real = Predictor(admission, ServingMetrics(), max_inputs=256, preprocessor_threads=2)
        async with _served(pool, real) as app:
            for case in (CASES[0], CASES[2], CASES[4]):
                ask = _through_app(app, case)
                times = await _repeat(ask, requests // 2, repeats, clock=time.thread_time)
                figures.append((f"real predictor: {case.name}", times))
        real.close()
    return figures


@asynccontextmanager
async def _pool(folder: Path) -> AsyncIterator[ModelPool]:
    """A pool with one backbone and one version, on an engine that costs nothing on the event loop."""
    database = Database(f"sqlite:///{folder / 'registry.db'}")
    migrate(database)
    store = FileStore(folder / "store")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", hidden_size=WIDTH)
    backbone = ingest(store, checkpoint, name="tiny", source="file:tiny")
    world = World(
        Registry(database), store, backbone, folder, make_engine=lambda found: FakeEngine(found.info.hidden_size)
    )
    world.publish("m", LABELS)
    async with world.pool() as pool:
        await pool.apply(world.registry.snapshot())
        yield pool
    database.dispose()


@asynccontextmanager
async def _served(pool: ModelPool, predictor: Predictor, *, keys: tuple[ApiKey, ...] = ()) -> AsyncIterator[ASGIApp]:
    """The whole application over `predictor`, started."""
    settings, metrics, drain = ServingSettings(api_keys=keys), ServingMetrics(), DrainState()
    unused: Any = SimpleNamespace()
    services = Services(
        settings=settings,
        pool=pool,
        predictor=predictor,
        watcher=unused,
        registry=unused,
        removal=unused,
        jobs=unused,
        datasets=unused,
        intake=unused,
        imports=unused,
        store=unused,
        metrics=metrics,
        drain=drain,
        events=unused,
        backbones={},
        folder=unused,
    )
    metrics.start_model("m", "1", "text-classification", "default")
    metrics.start_model("tiny", "", "feature-extraction", "")

    @asynccontextmanager
    async def build() -> AsyncIterator[Services]:
        yield services

    app = create_app(settings, build, drain, metrics)
    async with _lifespan(app):
        yield app


@asynccontextmanager
async def _lifespan(app: ASGIApp) -> AsyncIterator[None]:
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    outbox: asyncio.Queue[Message] = asyncio.Queue()
    task: asyncio.Task[None] = asyncio.create_task(app({"type": "lifespan", "state": {}}, inbox.get, outbox.put))  # type: ignore[arg-type]
    await inbox.put({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    try:
        yield
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        await task


def _headers(body: bytes) -> list[tuple[bytes, bytes]]:
    """What the OpenAI and httpx clients send, in short."""
    return [
        (b"host", b"127.0.0.1:8000"),
        (b"accept-encoding", b"gzip, deflate, br"),
        (b"connection", b"keep-alive"),
        (b"accept", b"application/json"),
        (b"content-type", b"application/json"),
        (b"user-agent", b"python-httpx/0.28.1"),
        (b"authorization", b"Bearer " + KEY.encode()),
        (b"content-length", str(len(body)).encode()),
    ]


def _through_app(app: ASGIApp, case: Case) -> Ask:
    body = json.dumps(case.body).encode()
    headers = _headers(body)
    lost = asyncio.get_running_loop().create_future()

    async def ask() -> bytes:
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        answered = asyncio.Event()
        sent: list[Message] = []

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            await answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 50000),
            "scheme": "http",
            "root_path": "",
            "headers": headers,
            "state": {},
            "method": "POST",
            "path": case.path,
            "raw_path": case.path.encode(),
            "query_string": b"",
            "extensions": {CONNECTION_LOST: {"future": lost}},
        }
        await app(scope, receive, send)
        assert sent[0]["status"] == 200, sent
        return bytes(sent[1]["body"])

    return ask


def _through_server(app: ASGIApp, case: Case) -> Ask:
    body = json.dumps(case.body).encode()
    lines = [b"POST " + case.path.encode() + b" HTTP/1.1", *(b": ".join(pair) for pair in _headers(body))]
    request = b"\r\n".join(lines) + b"\r\n\r\n" + body
    config = uvicorn.Config(
        app,
        http=limited_protocol(HeaderLimits()),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    config.load()
    state = ServerState()
    protocol = cast(Any, config.http_protocol_class)(config=config, server_state=state, app_state={})
    transport = FakeTransport()
    protocol.connection_made(transport)

    async def ask() -> bytes:
        transport.written.clear()
        transport.answered.clear()
        protocol.data_received(request)
        await transport.answered.wait()
        assert transport.written[0].startswith(b"HTTP/1.1 200"), transport.written
        return transport.written[1]

    return ask


async def _repeat(
    ask: Ask, requests: int, repeats: int, *, clock: Callable[[], float] = time.process_time
) -> list[float]:
    for _ in range(WARM_UP):
        await ask()
    figures = []
    for _ in range(repeats):
        started = clock()
        for _ in range(requests):
            await ask()
        figures.append((clock() - started) / requests * 1e6)
    return figures


def compare(base: Path, here: Path, *, rounds: int, requests: int, repeats: int) -> dict[str, dict[str, float]]:
    """Both checkouts in turns, each time in a fresh process; medians over the rounds, and their ratio."""
    figures: dict[Path, list[dict[str, float]]] = {base: [], here: []}
    for number in range(rounds):
        for folder in (base, here) if number % 2 == 0 else (here, base):
            command = [sys.executable, "-m", "benchmarks.http_overhead", "--json", "--requests", str(requests)]
            command += ["--repeats", str(repeats)]
            output = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
            figures[folder].append(json.loads(output))
    table = {}
    for name in figures[here][0]:
        before, after = (statistics.median(row[name] for row in figures[folder]) for folder in (base, here))
        ratios = [old[name] / new[name] for old, new in zip(figures[base], figures[here], strict=True)]
        table[name] = {"base_us": before, "us": after, "ratio": round(statistics.median(ratios), 2)}
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="turns of both checkouts")
    parser.add_argument("--requests", type=int, default=1000, help="requests of one measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of a case; the median counts")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and write no file")


def run(options: argparse.Namespace) -> None:
    sizes = {"requests": options.requests, "repeats": options.repeats}
    if options.json:
        print(json.dumps(measure(**sizes)))
        return
    if options.base is None:
        table = {name: {"us": value} for name, value in measure(**sizes).items()}
    else:
        table = compare(options.base, Path.cwd(), rounds=options.rounds, **sizes)
    write_results(
        "http-overhead",
        {"benchmark": "http_overhead", "requests": options.requests, "repeats": options.repeats, "cases": table},
    )
    print(json.dumps(table, indent=1))
    columns = list(next(iter(table.values())))
    print(f"{'':55}" + "".join(f"{column:>10}" for column in columns))
    for name, row in table.items():
        print(f"{name:55}" + "".join(f"{row[column]:>10}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_overhead", description=__doc__.split("\n")[0])
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
