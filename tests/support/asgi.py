"""The whole application in this process over a predictor that records, asked by ASGI messages and no socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import numpy as np
import orjson
from starlette.types import ASGIApp, Message

from model_registry.refs import ModelRef
from modeling.inputs.text import TextInput
from modeling.tasks import Options, Score
from modeling.tasks.single_label import OneLabel
from service.api.cancellation import CONNECTION_LOST
from service.api.deps import Services
from service.api.guard import DrainState
from service.app import create_app
from service.inference.errors import EmptyInput
from service.inference.predictor import PredictResult, Timings
from service.metrics import ServingMetrics
from service.settings import ServingSettings

LABELS = ("p", "1", "text-classification", "default")


async def _there() -> None: ...


STEADY_FOLDER: Any = SimpleNamespace(reason=None, require=_there)
"""A data directory that does not go away."""
STEADY_WATCHER: Any = SimpleNamespace(is_database_away=False)
HEADERS = {"host": "127.0.0.1:8000", "content-type": "application/json"}


@dataclass(frozen=True)
class Asked:
    """What the predictor was asked; `allowed_s` was left until the deadline."""

    tenant: str
    ref: ModelRef
    inputs: list[TextInput]
    options: Options
    needs_labels: bool
    allowed_s: float = field(compare=False)


class RecordingPredictor:
    """Answers at once with `result`, or raises `error`; with `hold` it waits until it is cancelled."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.error: Exception | None = None
        self.hold = False
        self.cancelled = 0

    async def predict(
        self,
        model: Any,
        inputs: Sequence[TextInput],
        options: Options,
        *,
        deadline: float,
        needs_labels: bool = True,
        max_inputs: int | None = None,
    ) -> PredictResult:
        self.asked.append(
            Asked(model.tenant, model.ref, list(inputs), options, needs_labels, deadline - time.monotonic())
        )
        try:
            await (asyncio.Event().wait() if self.hold else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        if not inputs:
            raise EmptyInput("inputs is empty")
        return result_for(len(inputs), with_embedding=options.return_embedding)


def result_for(rows: int, *, with_embedding: bool = False) -> PredictResult:
    vector = np.array([0.1, -2.5, 3e-8], dtype=np.float32)
    scores = [Score("good", 0.75), Score("bad", 0.25)]
    return PredictResult(
        model="p",
        version=1,
        task="text-classification",
        answers=[OneLabel(0, "good", 0.75, scores) for _ in range(rows)],
        vectors=[vector] * rows if with_embedding else [],
        input_tokens=7,
        engine="torch",
        batch_rows=2,
        timings=Timings(queue=0.001, preprocess=0.002, inference=0.003, total=0.0064),
    )


@dataclass(frozen=True)
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return orjson.loads(self.body)


class RecordingApp:
    """The whole application, guard included; its model `p` is known, all other names are not."""

    def __init__(self, settings: ServingSettings | None = None) -> None:
        self.predictor = RecordingPredictor()
        self.metrics = ServingMetrics()
        self.drain = DrainState()
        self.settings = settings or ServingSettings()
        self.app = create_app(self.settings, self._build, self.drain, self.metrics)

    @asynccontextmanager
    async def _build(self) -> AsyncIterator[Services]:
        unused: Any = SimpleNamespace()

        async def find(tenant: str, ref: ModelRef) -> Any:
            labels = LABELS if ref.name == "p" else ("", "", "", "")
            return SimpleNamespace(tenant=tenant, ref=ref, metric_labels=labels)

        pool: Any = SimpleNamespace(
            find=find,
            engines=SimpleNamespace(lanes=lambda: []),
            backbones=lambda: {},
            missing=lambda: [],
            is_started=True,
            has_failed=False,
        )
        predictor: Any = self.predictor
        yield Services(
            settings=self.settings,
            pool=pool,
            predictor=predictor,
            watcher=STEADY_WATCHER,
            registry=unused,
            removal=unused,
            jobs=unused,
            datasets=unused,
            intake=unused,
            imports=unused,
            store=unused,
            metrics=self.metrics,
            drain=self.drain,
            events=unused,
            backbones={},
            folder=STEADY_FOLDER,
        )


class AppUnderTest(RecordingApp):
    """The same, started on an event loop of its own and asked without a socket."""

    def __init__(self, settings: ServingSettings | None = None) -> None:
        super().__init__(settings)
        self._runner = asyncio.Runner()
        self._lifespan = self._runner.run(_started(self.app))

    def close(self) -> None:
        self._runner.run(self._lifespan())
        self._runner.close()

    def ask(
        self,
        path: str,
        body: bytes,
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        leaves: bool = False,
    ) -> Answered:
        """With `leaves` the client goes as soon as its request is sent."""
        return self._runner.run(_ask(self.app, path, body, method, HEADERS | (headers or {}), leaves))


async def _started(app: ASGIApp) -> Callable[[], Any]:
    """Starts the application's lifespan; returns what ends it."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.ensure_future(app({"type": "lifespan", "state": {}}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"

    async def stop() -> None:
        await inbox.put({"type": "lifespan.shutdown"})
        await task

    return stop


async def _ask(app: ASGIApp, path: str, body: bytes, method: str, headers: dict[str, str], leaves: bool) -> Answered:
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [*raw, (b"content-length", str(len(body)).encode())],
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "extensions": {CONNECTION_LOST: {"future": lost}},
    }
    waiting = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if waiting:
            if leaves:
                lost.set_result(None)
            return waiting.pop()
        await lost
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *parts = sent
    return Answered(
        start["status"],
        {name.decode(): value.decode("latin-1") for name, value in start["headers"]},
        b"".join(part.get("body", b"") for part in parts),
    )
