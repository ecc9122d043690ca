"""The adapter that gets most of the rows is merged while requests run, and nobody can tell by the answers."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_registry.db import Database
from model_registry.migrations import migrate
from model_registry.refs import ModelRef
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest
from modeling.engines.graphs import GraphEngine, GraphFiles
from modeling.engines.onnx import onnx_engine
from modeling.engines.openvino import openvino_engine
from modeling.errors import EngineFailed
from modeling.export import export_graphs
from modeling.merge import MergeRequest, adapter_digest
from modeling.testing import write_tiny_checkpoint
from service.inference import merging
from service.inference.admission import AdmissionController
from service.inference.answering import PredictOptions
from service.inference.lanes import BackboneLane
from service.inference.merge_choice import MergePolicy
from service.inference.merging import AdapterMerger, write_graph
from service.inference.model_pool import ModelPool
from service.inference.predictor import Predictor
from service.metrics import ServingMetrics
from tests.support.adapters import random_adapter
from tests.support.world import World, run

TEXTS = ["a good film", "dull plot and a bad actor", "wheat", "oil and wheat"]
POLICY = MergePolicy(0.8, windows=2, min_rows=40)
MODELS = ("m", "m:1", "bare")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraphFiles]:
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint")
    backbone = ingest(FileStore(folder / "store"), checkpoint, name="tiny", source="file:tiny")
    return checkpoint, export_graphs(backbone, folder / "graphs")


@pytest.fixture(params=["onnx", "openvino"])
def world(request: pytest.FixtureRequest, tmp_path: Path, exported: tuple[Path, GraphFiles]) -> Iterator[World]:
    """Two versions with adapters and one without, over an engine with graphs of its own."""
    checkpoint, files = exported
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    migrate(database)
    store = FileStore(tmp_path / "store")
    shutil.copytree(files.folder, tmp_path / "graphs")

    def engine(backbone: Backbone) -> GraphEngine:
        graphs = GraphFiles(tmp_path / "graphs")
        if request.param == "onnx":
            return onnx_engine(graphs, threads=1)
        return openvino_engine(graphs, max_length=backbone.info.max_length, threads=1)

    backbone = ingest(store, checkpoint, name="tiny", source="file:tiny")
    world = World(Registry(database), store, backbone, tmp_path, engine)
    for seed in (1, 2):
        world.publish("m", seed=seed, adapter=random_adapter(files.layout, rank=4, seed=seed), promote=True)
    world.publish("bare", seed=3)
    yield world
    database.dispose()


class Traffic:
    """Requests to a pool, whose answers must stay what they were at first."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool, self._first = pool, dict[str, Any]()
        admission = AdmissionController(max_inputs=100, max_queue_delay_s=60)
        self._predictor = Predictor(pool, admission, ServingMetrics(), max_inputs=50, tokenizer_threads=1)

    async def ask(self, model: str) -> None:
        result = await self._predictor.predict(
            "default", ModelRef.parse(model), TEXTS, PredictOptions(), deadline=time.monotonic() + 30
        )
        scores = [row.score for row in result.predictions]
        known = self._first.setdefault(f"{model}:{result.version}", scores)
        np.testing.assert_allclose(scores, known, atol=1e-5)

    async def dominate(self, model: str, *, rows: int = 60) -> None:
        for _ in range(rows // len(TEXTS)):
            await self.ask(model)

    async def goes_on(self, stop: asyncio.Event) -> int:
        count = 0
        while not stop.is_set():
            await asyncio.gather(*(self.ask(model) for model in MODELS))
            count += 1
        return count


def merged(pool: ModelPool) -> str | None:
    (lane,) = (lane for lane in pool.lanes() if isinstance(lane, BackboneLane))
    assert isinstance(lane.engine, GraphEngine)
    return lane.engine.merged_key


def gauge(metrics: ServingMetrics, version: int) -> float | None:
    labels = {"model": "m", "version": str(version), "task": "text-classification"}
    return metrics.registry.get_sample_value("polyhead_adapter_merged", labels)


def graphs(world: World) -> list[str]:
    return [path.name for path in (world.folder / "graphs").glob("merged-*")]


async def ready(world: World, pool: ModelPool) -> None:
    snapshot = world.registry.snapshot()
    await pool.apply(snapshot)
    await pool.ensure("default", "m", snapshot.versions["default", "m", 1])


async def two_windows(merger: AdapterMerger, traffic: Traffic, model: str = "m") -> None:
    for _ in range(2):
        await traffic.dominate(model)
        await merger.look()


def test_a_dominating_adapter_is_merged_and_goes_with_its_traffic(world: World) -> None:
    metrics = ServingMetrics()

    async def scenario() -> None:
        async with world.pool(metrics=metrics) as pool:
            await ready(world, pool)
            merger, traffic = AdapterMerger(pool, world.store, metrics, POLICY), Traffic(pool)
            for model in MODELS:
                await traffic.ask(model)
            await traffic.dominate("m")
            await merger.look()
            assert merged(pool) is None and gauge(metrics, 2) == 0
            await traffic.dominate("m")
            stop = asyncio.Event()
            meanwhile = asyncio.create_task(traffic.goes_on(stop))
            await merger.look()
            assert merged(pool) == "default/m/2" and gauge(metrics, 2) == 1 and gauge(metrics, 1) == 0
            stop.set()
            assert await meanwhile > 3
            await asyncio.gather(*(traffic.ask(model) for model in MODELS))

            await merger.look()

            world.registry.rollback(tenant="default", name="m", alias="champion", actor="test", reason="worse")
            await pool.apply(world.registry.snapshot())
            await two_windows(merger, traffic)
            assert merged(pool) == "default/m/1" and gauge(metrics, 2) == 0 and gauge(metrics, 1) == 1
            assert len(graphs(world)) == 1
            await asyncio.gather(*(traffic.ask(model) for model in MODELS))

    run(scenario())


def test_another_engine_begins_without_and_finds_the_graph_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = ServingMetrics()

    async def scenario() -> None:
        async with world.pool(metrics=metrics) as pool:
            await ready(world, pool)
            merger, traffic = AdapterMerger(pool, world.store, metrics, POLICY), Traffic(pool)
            await two_windows(merger, traffic)
            assert merged(pool) == "default/m/2"
            (lane,) = pool.lanes()
            await lane.switch(world.make_engine(world.backbone), pool._adapters_of(pool.users_of(lane)))
            assert merged(pool) is None
            monkeypatch.setattr(merging, "write_graph", None)
            await two_windows(merger, traffic)
            assert merged(pool) == "default/m/2"

    run(scenario())


def test_merged_weights_give_way_to_a_version(world: World) -> None:
    adapter = random_adapter(GraphFiles(world.folder / "graphs").layout, rank=64, seed=9)
    metrics = ServingMetrics()
    graph = world.make_engine(world.backbone).memory().weights

    async def scenario() -> None:
        async with world.pool(memory_budget_bytes=graph + adapter.size_bytes // 2, metrics=metrics) as pool:
            await ready(world, pool)
            merger, traffic = AdapterMerger(pool, world.store, metrics, POLICY), Traffic(pool)
            await two_windows(merger, traffic)
            assert merged(pool) == "default/m/2"
            world.publish("large", adapter=adapter)
            await pool.apply(world.registry.snapshot())
            assert pool.state_of("default", "large", 1) == ("ready", None) and merged(pool) is None
            await two_windows(merger, traffic)
            assert merged(pool) is None and gauge(metrics, 2) == 0, "there is no room for both"

    run(scenario())


def test_a_graph_that_answers_otherwise_never_serves(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with world.pool() as pool:
            await ready(world, pool)
            merger, traffic = AdapterMerger(pool, world.store, ServingMetrics(), POLICY), Traffic(pool)
            (lane,) = pool.lanes()
            (model,) = (user for user in pool.users_of(lane) if user.version == 2)
            engine = lane.engine
            shutil.copyfile(engine.files.bare, engine.files.merged(adapter_digest(model.parts.manifest.files)))
            with caplog.at_level(logging.WARNING, logger="service.merging"):
                for _ in range(3):
                    await two_windows(merger, traffic)
            assert merged(pool) is None and graphs(world) == []

    run(scenario())
    (warning,) = (record for record in caplog.records if "is not merged" in record.message)
    assert "golden rows" in warning.message


@pytest.mark.parametrize("world", ["onnx"], indirect=True)
def test_a_process_that_fails_says_why_and_leaves_nothing(world: World) -> None:
    engine = world.make_engine(world.backbone)
    assert isinstance(engine, GraphEngine)
    target = engine.files.merged("x")
    request = MergeRequest(str(engine.files.bare), str(world.folder / "no adapter"), str(target))
    with pytest.raises(EngineFailed, match=r"adapter_config\.json is missing"):
        run(write_graph(request, timeout_s=60))
    hangs = ("sh", "-c", f"touch '{target}'.$$.partial; exec sleep 60")
    with pytest.raises(EngineFailed, match="not written in 1 s"):
        run(write_graph(request, timeout_s=1, command=hangs))
    assert graphs(world) == []
