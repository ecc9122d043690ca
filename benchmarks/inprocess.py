"""The engine that the service would run, in this process: without HTTP, without a queue.

It is built by the service's own wiring from the same settings and over a copy of its data folder, so what the
service has chosen or cached for this machine is what runs here.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import ROOT
from benchmarks.servers import Spec
from model_registry.refs import ModelRef
from modeling.engines.protocol import EngineBatch
from modeling.inputs import Features, single
from modeling.weights import FloatArray
from service.api.deps import Services
from service.api.guard import DrainState
from service.inference.lanes import BackboneLane
from service.inference.model_pool import ModelPool
from service.metrics import ServingMetrics
from service.settings import ServingSettings
from service.wiring import build

_SETTLES_S = 600.0


class InProcess:
    """Between two calls nothing runs: the event loop stands still."""

    def __init__(self, runner: asyncio.Runner, pool: ModelPool, lane: BackboneLane) -> None:
        self._runner, self._pool, self._lane = runner, pool, lane

    def adapter_key(self, name: str) -> str:
        """By which the engine knows the adapter of the LoRA model `name`, a champion of the data folder."""
        model = self._runner.run(self._pool.find("default", ModelRef.parse(name)))
        assert model.adapter_key is not None
        return model.adapter_key

    def encode(self, texts: Sequence[str]) -> list[Features]:
        return single(self._lane.preprocess(texts, truncate=True, max_length=None))

    def run(self, batches: Sequence[EngineBatch]) -> tuple[FloatArray, float]:
        """Vectors float32[rows of all batches, hidden] and the seconds they took, on the engine's own thread."""
        engine = self._lane.engine

        def run() -> tuple[FloatArray, float]:
            started = time.perf_counter()
            vectors = [engine.run(batch).pooled for batch in batches]
            return np.concatenate(vectors), time.perf_counter() - started

        return self._runner.run(self._lane.worker.call(run))


@contextlib.contextmanager
def opened(spec: Spec, data_dir: Path, *, engine: str) -> Iterator[InProcess]:
    """The lane of the first backbone, once `engine` serves it."""
    if spec.checkout != ROOT:
        raise SystemExit(f"{spec.label}: what runs in this process is this checkout's code")
    values: dict[str, Any] = {**spec.settings, "data_dir": data_dir}
    with asyncio.Runner() as runner:
        context = build(ServingSettings(**values), DrainState(), ServingMetrics())
        services = runner.run(context.__aenter__())
        try:
            yield InProcess(runner, services.pool, runner.run(_settled(services, engine)))
        finally:
            runner.run(context.__aexit__(None, None, None))


def copied(data_dir: Path, target: Path) -> Path:
    """A copy, so that two processes do not share a database file while one of them is paused."""
    return Path(shutil.copytree(data_dir, target))


def batches_by_length(inputs: Sequence[Features], *, rows: int = 32) -> list[EngineBatch]:
    """Inputs in order of length, `rows` a batch: next to no padding."""
    ordered = sorted(inputs, key=lambda item: item.cost)
    return [EngineBatch(ordered[start : start + rows]) for start in range(0, len(ordered), rows)]


async def _settled(services: Services, engine: str) -> BackboneLane:
    deadline = time.monotonic() + _SETTLES_S
    while time.monotonic() < deadline:
        if services.pool.has_failed:
            raise SystemExit("the backbone could not be loaded in this process")
        if services.pool.is_started:
            lane = services.pool.engines.lanes()[0]
            if isinstance(lane, BackboneLane) and lane.engine_name == engine:
                return lane
        await asyncio.sleep(0.1)
    raise SystemExit(f"in this process {engine} did not come to serve")
