"""The second engine: exported in the background, proven equal, then it serves; torch goes on where it fails."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from model_registry.refs import ModelRef
from modeling.engines.torch import TorchEngine
from service.inference import model_pool
from service.inference.admission import AdmissionController
from service.inference.lanes import BatchLimits
from service.inference.model_pool import EnginePolicy, ModelPool
from service.inference.predictor import PredictOptions, Predictor, PredictResult
from service.metrics import ServingMetrics
from tests.support.world import World, run


def onnx_pool(world: World, metrics: ServingMetrics) -> ModelPool:
    policy = EnginePolicy(
        engine="onnx", device="cpu", threads=1, onnx_folder=world.folder / "onnx", memory_budget_bytes=1 << 30,
        make_engine=TorchEngine,
    )  # fmt: skip
    return ModelPool(world.store, policy, BatchLimits(1024, 32, 0.0), metrics)


async def ask(pool: ModelPool, model: str) -> PredictResult:
    predictor = Predictor(
        pool,
        AdmissionController(max_inputs=9, max_queue_delay_s=60),
        ServingMetrics(),
        max_inputs=9,
        tokenizer_threads=1,
    )
    try:
        return await predictor.predict(
            "default", ModelRef.parse(model), ["a good film", "dull"], PredictOptions(), deadline=time.monotonic() + 30
        )
    finally:
        predictor.close()


async def settled(pool: ModelPool) -> None:
    while pool._background:
        await asyncio.sleep(0.05)


def test_onnx_takes_over_once_proven_equal(world: World) -> None:
    world.publish("m", seed=1)
    metrics = ServingMetrics()

    async def scenario() -> tuple[PredictResult, PredictResult]:
        pool = onnx_pool(world, metrics)
        try:
            await pool.add_backbone("tiny", world.backbone)
            await pool.apply(world.registry.snapshot())
            before = await ask(pool, "m")
            await settled(pool)
            return before, await ask(pool, "m")
        finally:
            await pool.stop()

    before, after = run(scenario())
    assert (before.engine, after.engine) == ("torch", "onnx")
    for one, other in zip(before.predictions, after.predictions, strict=True):
        assert one.label == other.label
        np.testing.assert_allclose(one.score, other.score, atol=1e-5)


def test_where_the_export_fails_torch_goes_on_and_the_fallback_is_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no exporter")

    monkeypatch.setattr(model_pool, "build_onnx", fail)
    world.publish("m", seed=1)
    metrics = ServingMetrics()

    async def scenario() -> PredictResult:
        pool = onnx_pool(world, metrics)
        try:
            await pool.add_backbone("tiny", world.backbone)
            await pool.apply(world.registry.snapshot())
            await settled(pool)
            return await ask(pool, "m")
        finally:
            await pool.stop()

    assert run(scenario()).engine == "torch"
    labels = {"backbone": "tiny", "from": "onnx", "to": "torch", "reason": "RuntimeError"}
    assert metrics.registry.get_sample_value("polyhead_engine_fallback_total", labels) == 1


def test_a_broken_onnx_file_is_not_served(world: World) -> None:
    from modeling.export import cache_name

    target: Path = world.folder / "onnx" / cache_name(world.backbone)
    target.parent.mkdir()
    target.write_bytes(b"not a graph")

    async def scenario() -> str:
        pool = onnx_pool(world, ServingMetrics())
        try:
            await pool.add_backbone("tiny", world.backbone)
            await settled(pool)
            return pool.backbones()["tiny"].lane.engine_name
        finally:
            await pool.stop()

    assert run(scenario()) == "torch"
