"""What the pool does when loads fail, versions go and come back, and aliases move: with real files and a real (tiny)
backbone, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from model_registry.errors import ArtifactError, ModelNotFound
from model_registry.refs import ModelRef
from model_registry.removal import Removal
from model_registry.store import FileStore
from modeling.adapters import Adapter
from modeling.backbone import Backbone, ingest
from modeling.encoder import load_encoder
from modeling.engines.protocol import EngineBatch, EngineOutputs
from modeling.engines.torch import TorchEngine
from modeling.errors import EngineFailed, GoldenRowsDiffer
from modeling.multi_lora import Routing, route
from modeling.networks import NETWORKS
from modeling.tasks import Options
from modeling.testing import write_tiny_checkpoint
from service.inference.capacity import AdmissionController
from service.inference.engine_worker import Runtime
from service.inference.errors import InferenceFailed, MemoryBudgetExceeded, ModelNotReady
from service.inference.lanes import BackboneLane
from service.inference.model_pool import ModelPool
from service.inference.predictor import Predictor
from service.metrics import ServingMetrics
from tests.support.adapters import random_adapter
from tests.support.virtual import elapse, run_virtually, virtual_runtime
from tests.support.world import World

TENANT = "default"
BASELINE_BYTES = 119
Scenario = Callable[[], Coroutine[Any, Any, None]]


class UnsteadyStore(FileStore):
    """Counts the reads of every manifest, and fails those of versions in `broken`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()
        self.broken: set[str] = set()

    def get_bytes(self, key: str, *, max_bytes: int) -> bytes:
        version = key.removeprefix(f"models/{TENANT}/").rpartition("/")[0].replace("/", ":")
        if key.endswith("/manifest.json"):
            self.reads[version] += 1
        if version in self.broken:
            raise ArtifactError(f"{key} cannot be read from the store") from OSError(5, "input/output error")
        return super().get_bytes(key, max_bytes=max_bytes)


@pytest.fixture
def store(world: World) -> UnsteadyStore:
    world.store = UnsteadyStore(world.store.root)
    return world.store


async def ask(pool: ModelPool, model: str, runtime: Runtime, **options: Any) -> int | None:
    """The version that answered."""
    admission = AdmissionController(max_inputs=100, max_queue_delay_s=60)
    predictor = Predictor(admission, ServingMetrics(), max_inputs=5, preprocessor_threads=1, runtime=runtime)
    ref, deadline = ModelRef.parse(model), runtime.clock() + 30
    found = await pool.find(TENANT, ref)
    answer = await predictor.predict(found, ["a good film"], Options(**options), deadline=deadline)
    return answer.version


async def serving(pool: ModelPool, model: str) -> int | None:
    return (await pool.find(TENANT, ModelRef.parse(model))).version


async def refusal(pool: ModelPool, model: str) -> ModelNotReady:
    with pytest.raises(ModelNotReady) as refused:
        await serving(pool, model)
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s > 0
    return refused.value


def adapter_of(world: World, seed: int) -> Adapter:
    return random_adapter(route(load_encoder(world.backbone.folder), Routing(), NETWORKS["text"]), rank=4, seed=seed)


# Versions that are deleted


def delete(world: World, *versions: int, name: str = "m") -> None:
    removal = Removal(world.registry._database, world.registry, world.store)
    for version in versions:
        removal.delete_version(tenant=TENANT, name=name, version=version, actor="test", reason="")


def series_of(metrics: ServingMetrics, version: int) -> set[str]:
    wanted = {"model": "m", "version": str(version), "tenant": TENANT}
    return {
        sample.name
        for family in metrics.registry.collect()
        for sample in family.samples
        if wanted.items() <= sample.labels.items()
    }


def test_a_deleted_version_drains_and_goes_with_its_series(world: World) -> None:
    world.publish_baseline("m", seed=1)
    second = world.publish_baseline("m", seed=2)
    metrics = ServingMetrics()

    async def scenario() -> None:
        runtime = virtual_runtime()
        async with world.bare_pool(metrics=metrics, runtime=runtime) as pool:
            await pool.apply(world.registry.snapshot())
            await pool.ensure(TENANT, "m", second)
            model = await pool.find(TENANT, ModelRef.parse("m:2"))
            with model.lease():
                delete(world, 2)
                await pool.apply(world.registry.snapshot())
                await elapse(5)
                assert model.state == "draining", "a request is at it"
                with pytest.raises(ModelNotFound):
                    await pool.find(TENANT, ModelRef.parse("m:2"))
            await elapse(1)
            assert model.state == "unloading" and series_of(metrics, 2) == set()
            assert await ask(pool, "m", runtime) == 1 and series_of(metrics, 1)

    run_virtually(scenario())


def test_a_version_deleted_while_it_is_loaded_never_answers(world: World) -> None:
    world.publish_baseline("m", seed=1)
    second = world.publish_baseline("m", seed=2)
    metrics = ServingMetrics()

    async def scenario() -> None:
        runtime = virtual_runtime(loader_s=lambda *_: 1.0)
        async with world.bare_pool(metrics=metrics, runtime=runtime) as pool:
            await pool.apply(world.registry.snapshot())
            loading = asyncio.create_task(pool.ensure(TENANT, "m", second, within_s=30))
            await elapse(0.5)
            delete(world, 2)
            pool.follow(world.registry.snapshot())
            with contextlib.suppress(ArtifactError):
                await loading
            await elapse(30)
            with pytest.raises(ModelNotFound):
                await pool.find(TENANT, ModelRef.parse("m:2"))
            assert pool.status.version((TENANT, "m", 2)) == ("unloaded", None)
            assert series_of(metrics, 2) == set()
            assert await serving(pool, "m") == 1

    run_virtually(scenario())


def test_what_serves_an_alias_whose_version_cannot_be_loaded_serves_on_though_it_was_deleted_elsewhere(
    world: World, store: UnsteadyStore
) -> None:
    world.publish_baseline("m", seed=1)
    metrics = ServingMetrics()

    async def scenario() -> None:
        runtime = virtual_runtime()
        async with world.bare_pool(metrics=metrics, runtime=runtime) as pool:
            await pool.apply(world.registry.snapshot())
            world.publish_baseline("m", seed=2, promote=True)
            store.broken.add("m:2")
            await pool.apply(world.registry.snapshot())
            assert pool.status.serves_instead(TENANT, "m", 1) == {"champion": 2}
            delete(world, 1)  # on another replica, which serves version 2
            await pool.apply(world.registry.snapshot())
            assert await ask(pool, "m", runtime) == 1
            with pytest.raises(ModelNotFound):
                await pool.find(TENANT, ModelRef.parse("m:1"))
            store.broken.clear()
            await elapse(120)
            assert await ask(pool, "m", runtime) == 2
            assert series_of(metrics, 1) == set() and pool.status.serves_instead(TENANT, "m", 1) == {}

    run_virtually(scenario())


def test_a_deleted_model_is_gone_and_its_name_can_be_used_again(world: World) -> None:
    for seed in (1, 2):
        world.publish_baseline("m", seed=seed)
    metrics = ServingMetrics()

    async def scenario() -> None:
        runtime = virtual_runtime()
        async with world.bare_pool(metrics=metrics, runtime=runtime) as pool:
            await pool.apply(world.registry.snapshot())
            removal = Removal(world.registry._database, world.registry, world.store)
            removal.delete_model(tenant=TENANT, name="m", is_forced=True, actor="test", reason="")
            await pool.apply(world.registry.snapshot())
            await elapse(1)
            with pytest.raises(ModelNotFound):
                await pool.find(TENANT, ModelRef.parse("m"))
            assert series_of(metrics, 1) == set() and b'model="m"' not in metrics.render()[0]
            world.publish_baseline("m", seed=3)
            await pool.apply(world.registry.snapshot())
            assert await ask(pool, "m", runtime) == 3

    run_virtually(scenario())


def test_a_deleted_version_that_could_not_be_loaded_leaves_nothing(world: World, store: UnsteadyStore) -> None:
    world.publish_baseline("m", seed=1)
    world.publish_baseline("m", seed=2)
    metrics = ServingMetrics()

    async def scenario() -> None:
        async with world.bare_pool(metrics=metrics, runtime=virtual_runtime()) as pool:
            await pool.apply(world.registry.snapshot())
            store.broken.add("m:2")
            await refusal(pool, "m:2")
            await elapse(2)
            assert pool.status.version((TENANT, "m", 2))[0] == "failed" and series_of(metrics, 2)
            delete(world, 2)
            await pool.apply(world.registry.snapshot())
            assert pool.status.version((TENANT, "m", 2)) == ("unloaded", None)
            assert series_of(metrics, 2) == set()

    run_virtually(scenario())


# Loads that fail


def test_a_promoted_version_that_fails_is_loaded_once_per_back_off_and_serves_by_itself(
    world: World, store: UnsteadyStore
) -> None:
    world.publish_baseline("m", seed=1)

    async def scenario() -> None:
        async with world.bare_pool(runtime=virtual_runtime(loader_s=lambda *_: 0.05)) as pool:
            await pool.apply(world.registry.snapshot())
            world.publish_baseline("m", seed=2, promote=True)
            store.reads.clear()
            store.broken.add("m:2")
            pool.follow(world.registry.snapshot())  # the last that it hears of the registry
            for _ in range(200):  # within 20 s
                assert await serving(pool, "m") == 1
                assert "m:2" in str(await refusal(pool, "m:2"))
                await elapse(0.1)
            assert store.reads["m:2"] == 5, "at about 0, 1, 3, 7 and 15 s"
            state = pool.status.alias((TENANT, "m", "champion"), 2)
            assert (state.wanted, state.serving) == (2, 1)
            assert "cannot be read" in str(state.reason)
            assert state.retry_at is not None
            store.broken.clear()
            await elapse(20)
            assert await serving(pool, "m") == 2
            assert store.reads["m:2"] == 6
            assert pool.status.alias((TENANT, "m", "champion"), 2).reason is None

    run_virtually(scenario())


def test_back_off_is_bounded(world: World, store: UnsteadyStore) -> None:
    world.publish_baseline("m", seed=1)

    async def scenario() -> None:
        async with world.bare_pool(runtime=virtual_runtime()) as pool:
            store.broken.add("m:1")
            await pool.apply(world.registry.snapshot())
            await elapse(3600)
            store.reads.clear()
            await elapse(600)
            assert store.reads["m:1"] == 10
            assert (await refusal(pool, "m")).retry_after_s <= 60  # type: ignore[operator]

    run_virtually(scenario())


def test_many_requests_for_a_version_that_is_not_loaded_load_it_once(world: World, store: UnsteadyStore) -> None:
    world.publish_baseline("m", seed=1)
    world.publish_baseline("m", seed=2)

    async def scenario() -> None:
        async with world.bare_pool(runtime=virtual_runtime(loader_s=lambda *_: 1.0)) as pool:
            await pool.apply(world.registry.snapshot())
            store.reads.clear()
            store.broken.add("m:2")
            for _ in range(200):
                await refusal(pool, "m:2")
            await elapse(1.5)
            assert store.reads["m:2"] == 1
            assert "cannot be read" in str(await refusal(pool, "m:2"))

    run_virtually(scenario())


def test_an_engine_that_says_when_to_come_back_is_believed(world: World) -> None:
    class OutOfOrder(TorchEngine):
        is_broken = False

        def run(self, batch: EngineBatch) -> EngineOutputs:
            if self.is_broken:
                raise EngineFailed("out of order")
            return super().run(batch)

    world.make_engine = OutOfOrder
    world.publish("m", seed=1)

    async def scenario() -> None:
        runtime = virtual_runtime()
        async with world.pool(runtime=runtime) as pool:
            await pool.apply(world.registry.snapshot())
            (lane,) = pool.engines.lanes()
            assert isinstance(lane, BackboneLane) and isinstance(lane.engine, OutOfOrder)
            lane.engine.is_broken = True
            for _ in range(3):
                with pytest.raises(InferenceFailed):
                    await ask(pool, "m", runtime)
            await elapse(0.1)
            assert not lane.worker.is_fit
            world.publish("m", seed=2, promote=True)
            await pool.apply(world.registry.snapshot())
            state = pool.status.version((TENANT, "m", 2))
            assert state[0] == "failed" and "unhealthy" in str(state[1])
            assert (await refusal(pool, "m:2")).retry_after_s == pytest.approx(5)
            lane.engine.is_broken = False
            await elapse(10)
            assert lane.worker.is_fit
            assert await ask(pool, "m", runtime) == 2

    run_virtually(scenario())


def test_ensure_waits_for_what_may_pass_and_raises_what_will_not(world: World, store: UnsteadyStore) -> None:
    def other_answers(folder: Path) -> None:
        golden = json.loads((folder / "golden.json").read_text())
        golden["rows"][0]["logits"][0] += 1.0
        (folder / "golden.json").write_text(json.dumps(golden))

    world.publish_baseline("m", seed=1)
    unsteady, wrong = world.publish_baseline("m", seed=2), world.publish_baseline("m", seed=3, spoil=other_answers)

    async def scenario() -> None:
        async with world.bare_pool(runtime=virtual_runtime()) as pool:
            await pool.apply(world.registry.snapshot())
            store.broken.add("m:2")
            assert not await pool.ensure(TENANT, "m", unsteady, within_s=10)
            assert store.reads["m:2"] == 4, "at 0, 1, 3 and 7 s"
            store.broken.clear()
            assert await pool.ensure(TENANT, "m", unsteady, within_s=10)
            for _ in range(2):
                with pytest.raises(GoldenRowsDiffer):
                    await pool.ensure(TENANT, "m", wrong, within_s=10)
            assert store.reads["m:3"] == 1, "its back-off holds for everybody"

    run_virtually(scenario())


def test_a_champion_that_loads_late_is_pinned_and_counted_under_its_name(world: World, store: UnsteadyStore) -> None:
    world.publish_baseline("m", seed=1)
    others = [world.publish_baseline("m", seed=seed) for seed in (2, 3)]

    async def scenario() -> None:
        async with world.bare_pool(memory_budget_bytes=2 * BASELINE_BYTES, runtime=virtual_runtime()) as pool:
            store.broken.add("m:1")
            await pool.apply(world.registry.snapshot())
            store.broken.clear()
            await elapse(2)
            assert await serving(pool, "m") == 1
            found = await pool.find(TENANT, ModelRef.parse("m"))
            assert found.metric_labels == ("m", "1", "text-classification", TENANT)
            for version in others:
                await pool.ensure(TENANT, "m", version)
            await elapse(1)
            states = [pool.status.version((TENANT, "m", number))[0] for number in (1, 2, 3)]
            assert states == ["ready", "unloaded", "ready"]

    run_virtually(scenario())


# Versions that go and come back


def test_a_version_that_comes_back_while_its_last_load_drains_keeps_its_weights(world: World) -> None:
    world.publish("m", seed=1)
    first = world.publish("m", seed=2, adapter=adapter_of(world, 2))
    second = world.publish("m", seed=3, adapter=adapter_of(world, 3))
    metrics = ServingMetrics()

    async def scenario() -> None:
        runtime = virtual_runtime()
        async with world.pool(runtime=runtime) as pool:  # to see how large one is
            await pool.apply(world.registry.snapshot())
            await pool.ensure(TENANT, "m", first)
            model = await pool.find(TENANT, ModelRef.parse("m:2"))
            room = int(1.5 * model.own_bytes)
        async with world.pool(memory_budget_bytes=room, metrics=metrics, runtime=runtime) as pool:
            await pool.apply(world.registry.snapshot())
            await pool.ensure(TENANT, "m", first)
            model = await pool.find(TENANT, ModelRef.parse("m:2"))
            with model.lease():
                await pool.ensure(TENANT, "m", second)  # pushes the first out, which waits for this lease
                await elapse(1)
                assert pool.status.version((TENANT, "m", 2))[0] == "unloaded"
                await pool.ensure(TENANT, "m", first)
            await elapse(1)
            assert await ask(pool, "m:2", runtime) == 2
            labels = {"model": "m", "version": "2", "task": "text-classification", "tenant": TENANT}
            assert metrics.registry.get_sample_value("polyhead_model_state", labels | {"state": "ready"}) == 1

    run_virtually(scenario())


def test_each_version_is_unloaded_once(world: World) -> None:
    versions = [world.publish_baseline("m", seed=seed) for seed in range(1, 6)]
    metrics = ServingMetrics()

    async def scenario() -> None:
        async with world.bare_pool(
            memory_budget_bytes=2 * BASELINE_BYTES, metrics=metrics, runtime=virtual_runtime()
        ) as pool:
            await pool.apply(world.registry.snapshot())
            for version in versions:
                await pool.ensure(TENANT, "m", version)
                await pool.apply(world.registry.snapshot())
            await elapse(1)
            states = [pool.status.version((TENANT, "m", version.version))[0] for version in versions]
            assert states == ["ready", "unloaded", "unloaded", "unloaded", "ready"]
            assert metrics.registry.get_sample_value("polyhead_adapter_evictions_total") == 3

    run_virtually(scenario())


def test_a_version_larger_than_its_files_is_refused_instead_of_loaded_again_and_again(
    world: World, store: UnsteadyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish("m", seed=1)
    lora = world.publish("m", seed=2, adapter=adapter_of(world, 2))
    monkeypatch.setattr(TorchEngine, "adapter_bytes", lambda self, key: 1 << 20)

    async def scenario() -> None:
        async with world.pool(memory_budget_bytes=1 << 19, runtime=virtual_runtime()) as pool:
            await pool.apply(world.registry.snapshot())
            with pytest.raises(MemoryBudgetExceeded):
                await pool.ensure(TENANT, "m", lora)
            state, reason = pool.status.version((TENANT, "m", 2))
            assert state == "failed" and "memory_budget_bytes" in str(reason)

    run_virtually(scenario())


def test_the_version_before_stays_in_memory_longest_so_a_rollback_needs_no_load(
    world: World, store: UnsteadyStore
) -> None:
    world.publish_baseline("m", seed=1)
    second = world.publish_baseline("m", seed=2)
    others = [world.publish_baseline("m", seed=seed) for seed in (3, 4)]

    async def scenario() -> None:
        async with world.bare_pool(memory_budget_bytes=3 * BASELINE_BYTES, runtime=virtual_runtime()) as pool:
            await pool.apply(world.registry.snapshot())
            await pool.ensure(TENANT, "m", second)
            world.registry.set_alias(
                tenant=TENANT, name="m", alias="champion", version=2, expected_version=1, actor="test", reason=""
            )
            await pool.apply(world.registry.snapshot())
            assert await serving(pool, "m") == 2
            for version in others:
                await pool.ensure(TENANT, "m", version)
            store.reads.clear()
            world.registry.rollback(tenant=TENANT, name="m", alias="champion", actor="test", reason="")
            pool.follow(world.registry.snapshot())
            assert await serving(pool, "m") == 1
            assert not store.reads

    run_virtually(scenario())


# Backbones


@pytest.fixture
def former(world: World, tmp_path: Path) -> Iterator[Backbone]:
    """The world's backbone as it was before its revision was raised: other weights under the same name."""
    now = world.backbone
    checkpoint = write_tiny_checkpoint(tmp_path / "former", seed=9)
    yield ingest(world.store, checkpoint, name="tiny", source="file:former")
    world.backbone = now


def test_a_backbone_that_is_no_longer_configured_counts_and_goes_with_its_last_version(
    world: World, former: Backbone
) -> None:
    now, world.backbone = world.backbone, former
    olds = [world.publish("old", seed=seed) for seed in (1, 2)]
    world.backbone = now
    news = [world.publish("new", tuple(f"label {n}" for n in range(40)), seed=seed) for seed in (3, 4, 5)]
    weights = TorchEngine(former).memory().weights
    metrics = ServingMetrics()

    async def scenario() -> None:
        room = weights + 10_000  # its files have headers
        async with world.pool(memory_budget_bytes=room, metrics=metrics, runtime=virtual_runtime()) as pool:
            snapshot = world.registry.snapshot()
            pool.follow(type(snapshot)(snapshot.epoch, {}, snapshot.versions))  # no alias holds them
            for version in olds:
                await pool.ensure(TENANT, "old", version)
            assert (await serving(pool, "old:1"), await serving(pool, "old:2")) == (1, 2), "their backbone counts once"
            assert len(pool.engines.lanes()) == 2
            for version in news:
                await pool.ensure(TENANT, "new", version)
            await elapse(1)
            assert [pool.status.version((TENANT, "old", number))[0] for number in (1, 2)] == ["unloaded", "unloaded"]
            (lane,) = pool.engines.lanes()
            assert lane.worker.name == ("tiny", "torch/fp32")
            assert metrics.registry.get_sample_value(
                "polyhead_batch_tokens_limit", {"backbone": "tiny", "engine": "torch/fp32"}
            )

    run_virtually(scenario())


def test_a_backbone_that_does_not_fit_the_budget_is_refused(world: World, former: Backbone) -> None:
    now, world.backbone = world.backbone, former
    old = world.publish("old", seed=1)
    world.backbone = now

    async def scenario() -> None:
        async with world.pool(memory_budget_bytes=1000, runtime=virtual_runtime()) as pool:
            with pytest.raises(MemoryBudgetExceeded):
                await pool.ensure(TENANT, "old", old)
            assert len(pool.engines.lanes()) == 1

    run_virtually(scenario())


def test_a_backbone_that_hides_a_model_is_announced(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.publish("tiny", seed=1)

    async def scenario() -> None:
        async with world.pool(runtime=virtual_runtime()) as pool:
            with caplog.at_level(logging.WARNING, "service.model_pool"):
                await pool.apply(world.registry.snapshot())
                await pool.apply(world.registry.snapshot())
            (told,) = [record for record in caplog.records if record.__dict__.get("action") == "model_hidden"]
            assert "'tiny'" in told.getMessage() and "backbones" in told.getMessage()
            assert pool.status.hidden == {(TENANT, "tiny")}
            assert await serving(pool, "tiny") is None
            assert await serving(pool, "tiny:1") == 1

    run_virtually(scenario())


def test_while_the_service_starts_what_is_known_is_not_ready_instead_of_unknown(world: World) -> None:
    world.publish("m", seed=1)

    async def scenario() -> None:
        runtime = virtual_runtime()
        async with world.bare_pool(backbones=("tiny",), runtime=runtime) as pool:
            for unread in ("tiny", "m"):
                assert "starting" in str(await refusal(pool, unread))
            await pool.apply(world.registry.snapshot())
            for known in ("tiny", "m", "m:1"):
                assert "tiny" in str(await refusal(pool, known))
            with pytest.raises(ModelNotFound):
                await serving(pool, "nothing")
            await pool.add_backbone("tiny", world.backbone)
            await pool.settled()
            assert (await serving(pool, "tiny"), await serving(pool, "m")) == (None, 1)

    run_virtually(scenario())


def test_a_request_for_a_name_that_is_not_known_looks_at_the_registry_first(world: World) -> None:
    async def scenario() -> None:
        runtime = virtual_runtime()
        async with world.bare_pool(runtime=runtime) as pool:
            await pool.apply(world.registry.snapshot())

            can_look = False

            async def look() -> bool:
                if can_look:
                    pool.follow(world.registry.snapshot())
                return can_look

            pool.look_again = look
            assert "the registry cannot be read now" in str(await refusal(pool, "m")), "it may be there"
            can_look = True
            with pytest.raises(ModelNotFound):
                await ask(pool, "m", runtime)
            world.publish_baseline("m", seed=1)
            with pytest.raises(ModelNotReady):
                await ask(pool, "m", runtime)
            await pool.settled()
            assert await ask(pool, "m", runtime) == 1

    run_virtually(scenario())


# Metrics


def test_metrics_show_what_an_alias_should_serve_and_what_it_serves(world: World, store: UnsteadyStore) -> None:
    world.publish_baseline("m", seed=1)
    metrics = ServingMetrics()

    def shown() -> tuple[float | None, float | None]:
        labels = {"tenant": TENANT, "model": "m", "alias": "champion"}
        value = metrics.registry.get_sample_value
        return value("polyhead_alias_wanted_version", labels), value("polyhead_alias_serving_version", labels)

    async def scenario() -> None:
        async with world.bare_pool(metrics=metrics, runtime=virtual_runtime()) as pool:
            store.broken.update(("m:1", "m:2"))
            await pool.apply(world.registry.snapshot())
            assert shown() == (1, 0)
            store.broken.discard("m:1")
            await elapse(5)
            assert shown() == (1, 1)
            world.publish_baseline("m", seed=2, promote=True)
            await pool.apply(world.registry.snapshot())
            assert shown() == (2, 1)
            snapshot = world.registry.snapshot()
            await pool.apply(type(snapshot)(snapshot.epoch, {}, snapshot.versions))
            assert shown() == (None, None)

    run_virtually(scenario())
