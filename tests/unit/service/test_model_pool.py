"""Hot loading with real files and a real (tiny) backbone: load, warm, swap, drain, fail."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_registry.errors import ArtifactError, ModelNotFound
from model_registry.refs import ModelRef
from modeling.adapters import Adapter, LoraPair
from modeling.encoder import load_encoder
from modeling.engines.protocol import EngineBatch
from modeling.errors import AdapterMismatch, GoldenRowsDiffer, ModelingError
from modeling.inputs.text import TextInput
from modeling.multi_lora import Routing, route
from modeling.networks import NETWORKS
from modeling.tasks import Options
from modeling.weights import FloatArray
from service.inference.capacity import AdmissionController
from service.inference.errors import EmptyInput, ModelNotReady, NotPredictable
from service.inference.lanes import BackboneLane
from service.inference.model_pool import ModelPool
from service.inference.predictor import Predictor, PredictResult
from service.metrics import ServingMetrics
from tests.support.adapters import random_adapter, write_adapter
from tests.support.world import World, one_labels, run


async def ask(pool: ModelPool, model: str, texts: Sequence[TextInput], **options: Any) -> PredictResult:
    admission = AdmissionController(max_inputs=100, max_queue_delay_s=60)
    predictor = Predictor(admission, ServingMetrics(), max_inputs=50, preprocessor_threads=1)
    try:
        return await predictor.predict(
            await pool.find("default", ModelRef.parse(model)),
            texts,
            Options(**options),
            deadline=time.monotonic() + 30,
        )
    finally:
        predictor.close()


def test_a_published_version_answers_and_its_successor_takes_over(world: World) -> None:
    world.publish("m", seed=1)

    async def scenario() -> list[int | None]:
        async with world.pool() as pool:
            await pool.apply(world.registry.snapshot())
            first = await ask(pool, "m", ["a good film"])
            world.publish("m", seed=2, promote=True)
            await pool.apply(world.registry.snapshot())
            second = await ask(pool, "m", ["a good film"])
            return [first.version, second.version]

    assert run(scenario()) == [1, 2]


def test_a_request_keeps_its_version_while_the_alias_moves(world: World) -> None:
    world.publish("m", seed=1)

    async def scenario() -> int | None:
        async with world.pool() as pool:
            await pool.apply(world.registry.snapshot())
            model = await pool.find("default", ModelRef.parse("m"))
            with model.lease():
                world.publish("m", seed=2, promote=True)
                await pool.apply(world.registry.snapshot())
                assert pool.status.version(("default", "m", 2)) == ("ready", None)
                return model.version

    assert run(scenario()) == 1


def _truncate(folder: Path) -> None:
    path = folder / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _other_answers(folder: Path) -> None:
    path = folder / "golden.json"
    golden = json.loads(path.read_text())
    golden["rows"][0]["logits"][0] += 1.0
    path.write_text(json.dumps(golden))


@pytest.mark.parametrize(("spoil", "error"), [(_truncate, ModelingError), (_other_answers, GoldenRowsDiffer)])
def test_a_version_that_does_not_load_leaves_the_old_one_serving(world: World, spoil: Any, error: type) -> None:
    world.publish("m", seed=1)

    async def scenario() -> tuple[int | None, str, str | None]:
        async with world.pool() as pool:
            await pool.apply(world.registry.snapshot())
            broken = world.publish("m", seed=2, promote=True, spoil=spoil)
            await pool.apply(world.registry.snapshot())
            answered = await ask(pool, "m", ["a good film"])
            state, reason = pool.status.version(("default", "m", 2))
            with pytest.raises(error):
                await pool.ensure("default", "m", broken)
            return answered.version, state, reason

    version, state, reason = run(scenario())
    assert (version, state) == (1, "failed")
    assert reason


def test_an_adapter_that_does_not_fit_is_named_and_leaves_the_old_version_serving(world: World) -> None:
    layout = route(load_encoder(world.backbone.folder), Routing(), NETWORKS["text"])
    fits = random_adapter(layout, rank=4, seed=1)
    name = layout.groups[1].linears[0][0]
    wide = LoraPair(np.zeros((4, 99), np.float32), fits.pairs[name].b)

    def misfit(folder: Path) -> None:
        write_adapter(folder / "adapter", Adapter(4, {**fits.pairs, name: wide}))

    world.publish("m", seed=1, adapter=fits)

    async def scenario() -> tuple[int | None, str, str | None, int | None]:
        async with world.pool() as pool:
            await pool.apply(world.registry.snapshot())
            broken = world.publish("m", seed=1, adapter=fits, promote=True, spoil=misfit)
            await pool.apply(world.registry.snapshot())
            with pytest.raises(AdapterMismatch):
                await pool.ensure("default", "m", broken)
            serving = await ask(pool, "m", ["a good film"])
            others = await ask(pool, "tiny", ["a good film"], return_embedding=True)
            state, reason = pool.status.version(("default", "m", 2))
            return serving.version, state, reason, others.version

    version, state, reason, _ = run(scenario())
    assert (version, state) == (1, "failed")
    assert reason is not None and name in reason and "99" in reason


def test_a_file_altered_after_registration_is_refused(world: World) -> None:
    version = world.publish("m", seed=1)
    path = world.store.local_path("models/default/m/1/head.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    async def scenario() -> None:
        async with world.pool() as pool:
            with pytest.raises(ArtifactError):
                await pool.ensure("default", "m", version)
            await pool.apply(world.registry.snapshot())
            with pytest.raises(ModelNotReady, match="could not be loaded"):
                await ask(pool, "m", ["a good film"])

    run(scenario())


def test_a_version_by_number_loads_on_first_use(world: World) -> None:
    world.publish("m", seed=1)
    world.publish("m", seed=2)

    async def scenario() -> int | None:
        async with world.pool() as pool:
            await pool.apply(world.registry.snapshot())
            with pytest.raises(ModelNotReady) as not_ready:
                await ask(pool, "m:2", ["a good film"])
            assert not_ready.value.retry_after_s
            while pool.status.version(("default", "m", 2))[0] != "ready":
                await asyncio.sleep(0.01)
            return (await ask(pool, "m:2", ["a good film"])).version

    assert run(scenario()) == 2


def test_over_the_budget_the_least_used_unaliased_version_goes(world: World) -> None:
    first, second = world.publish("m", seed=1), world.publish("m", seed=2)
    third = world.publish("m", seed=3)

    async def scenario() -> list[str]:
        async with world.pool(memory_budget_bytes=700) as pool:  # two heads of some 264 bytes
            await pool.apply(world.registry.snapshot())
            for version in (first, second, third):
                await pool.ensure("default", "m", version)
            await asyncio.sleep(0)
            while pool.status.version(("default", "m", 2))[0] != "unloaded":
                await asyncio.sleep(0.01)
            return [pool.status.version(("default", "m", number))[0] for number in (1, 2, 3)]

    assert run(scenario()) == ["ready", "unloaded", "ready"]


def test_models_with_different_label_sets_share_a_batch_and_answer_as_alone(world: World) -> None:
    for index, labels in enumerate([("a", "b"), ("x", "y", "z"), tuple(f"l{i}" for i in range(40))]):
        world.publish(f"m{index}", labels, seed=index)
    texts: list[TextInput] = ["a good film", "dull plot and bad actor", "wheat"]

    async def scenario() -> tuple[list[PredictResult], list[PredictResult]]:
        async with world.pool() as pool:
            await pool.apply(world.registry.snapshot())
            alone = [await ask(pool, f"m{index}", texts) for index in range(3)]
            together = await asyncio.gather(*(ask(pool, f"m{index}", texts) for index in range(3)))
            return alone, list(together)

    alone, together = run(scenario())
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one_labels(one), one_labels(other), strict=True):
            assert a.label == b.label
            np.testing.assert_allclose([s.score for s in a.scores], [s.score for s in b.scores], atol=1e-5)


def test_options_shape_the_answer(world: World) -> None:
    world.publish("m", ("a", "b", "c"), seed=1)

    async def scenario() -> None:
        async with world.pool() as pool:
            await pool.apply(world.registry.snapshot())
            (full,) = one_labels(await ask(pool, "m", ["a good film"]))
            assert abs(sum(score.score for score in full.scores) - 1) < 1e-5
            assert full.scores == sorted(full.scores, key=lambda score: -score.score)
            (two,) = one_labels(await ask(pool, "m", ["a"], top_k=2))
            assert len(two.scores) == 2
            (unsure,) = one_labels(await ask(pool, "m", ["a"], threshold=1.0))
            assert unsure.label is None and unsure.score is not None
            (vector,) = (await ask(pool, "m", ["a"], return_embedding=True)).vectors
            assert vector.shape == (32,)

    run(scenario())


def test_unknown_models_and_empty_inputs_are_refused(world: World) -> None:
    async def scenario() -> None:
        async with world.pool() as pool:
            await pool.apply(world.registry.snapshot())
            with pytest.raises(ModelNotFound):
                await ask(pool, "nobody", ["a"])
            with pytest.raises(NotPredictable):
                await ask(pool, "tiny", ["a"])
            for empty in ([], [""], ["a", "  "]):
                with pytest.raises(EmptyInput):
                    await ask(pool, "tiny", empty)

    run(scenario())


def test_a_version_whose_requests_still_run_moves_along_to_another_engine(world: World) -> None:
    layout = route(load_encoder(world.backbone.folder), Routing(), NETWORKS["text"])
    world.publish("m", seed=1)
    loras = [world.publish("m", seed=seed, adapter=random_adapter(layout, rank=4, seed=seed)) for seed in (2, 3)]

    async def scenario() -> FloatArray:
        async with world.pool(memory_budget_bytes=20_000) as pool:
            await pool.apply(world.registry.snapshot())
            await pool.ensure("default", "m", loras[0])
            model = await pool.find("default", ModelRef.parse("m:2"))
            with model.lease():
                assert model.own_bytes < 20_000 < 2 * model.own_bytes
                await pool.ensure("default", "m", loras[1])
                await pool.settled()
                assert pool.status.version(("default", "m", 2))[0] == "unloaded"
                lane = model.lane
                assert isinstance(lane, BackboneLane)
                before, lane.engine_name = lane.engine, "other/fp32"
                lane.worker.supervisor.on_engine_failed("a test")
                await pool.engines.idle()
                assert lane.engine is not before
                (work,) = lane.preprocess(["a good film"], truncate=True, max_length=None)
                return lane.engine.run(EngineBatch(work, [model.adapter_key])).pooled

    assert run(scenario()).shape == (1, 32)


def test_the_engine_of_a_lane_that_closes_goes_without_a_garbage_collection(world: World) -> None:
    async def scenario() -> None:
        async with world.pool() as pool:
            lane = pool.engines.lanes()[0]
            assert isinstance(lane, BackboneLane)
            engine = weakref.ref(lane.engine)
            gc.collect()
            gc.disable()
            try:
                await lane.close()
                assert engine() is None
            finally:
                gc.enable()

    run(scenario())
