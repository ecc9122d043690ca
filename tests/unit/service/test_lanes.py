"""A backbone's lane over a fake engine: what is measured at warm-up, what changes with the engine, who fails alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from modeling.engines.fake import FakeEngine
from modeling.engines.protocol import EngineBatch, EngineOutputs
from modeling.errors import EngineFailed
from modeling.heads import DenseLayer, TaskHead, softmax
from modeling.tasks import NO_CALIBRATION, TASKS, Calibration, FeatureExtraction, Task
from modeling.weights import FloatArray
from service.inference.engine_worker import BatchLimits
from service.inference.errors import InferenceFailed
from service.inference.lanes import BackboneLane, LinearLane, apply_heads
from service.inference.queue import QueueEntry, Ticket
from service.metrics import ModelLabels, ServingMetrics
from tests.support.world import World

LIMITS = BatchLimits(1024, 32)


def tokens_of(batch: EngineBatch) -> int:
    return max(item.cost for item in batch.inputs) * len(batch.inputs)


@asynccontextmanager
async def lane_over(
    world: World, before_run: Callable[[EngineBatch], None], limits: BatchLimits = LIMITS
) -> AsyncIterator[BackboneLane]:
    lane = BackboneLane(world.backbone, FakeEngine(32, before_run=before_run), ServingMetrics(), limits, label="tiny")
    lane.worker.start()
    try:
        yield lane
    finally:
        await lane.worker.stop()


def test_warming_up_finds_what_a_batch_costs(world: World) -> None:
    async def scenario() -> tuple[float, float]:
        async with lane_over(world, lambda batch: time.sleep(0.004 + 2e-5 * tokens_of(batch))) as lane:
            await lane.measure()
            return lane.worker.load.cost.seconds(16), lane.worker.load.cost.seconds(512)

    small, large = asyncio.run(scenario())
    assert 0.003 < small < large
    assert large > 0.01


def test_an_engine_that_runs_out_of_memory_gets_smaller_batches(world: World) -> None:
    def limited(batch: EngineBatch) -> None:
        if tokens_of(batch) > 300:
            raise EngineFailed("out of memory")

    async def scenario() -> int:
        async with lane_over(world, limited) as lane:
            await lane.measure()
            return lane.worker.load.max_tokens

    assert asyncio.run(scenario()) <= 300


def test_an_engine_that_computes_nothing_does_not_come_up(world: World) -> None:
    def broken(batch: EngineBatch) -> None:
        raise EngineFailed("no device")

    async def scenario() -> None:
        async with lane_over(world, broken) as lane:
            with pytest.raises(EngineFailed):
                lane.check()
            with pytest.raises(EngineFailed):
                await lane.measure()

    asyncio.run(scenario())


def test_another_engine_takes_over_under_its_own_name_and_ends_an_outage(world: World) -> None:
    async def scenario() -> tuple[str, bool, bool]:
        async with lane_over(world, lambda batch: None) as lane:
            lane.worker.supervisor.hangs(object(), "a run has not ended")
            was_alive = lane.worker.is_fit
            engine = FakeEngine(32)
            engine.name = "faster"
            await lane.switch(engine, {})
            return lane.worker.name[1], was_alive, lane.worker.is_fit

    assert asyncio.run(scenario()) == ("faster/fp32", False, True)


# Heads


ONE, MANY, VALUE, _ = TASKS.values()


@dataclass(eq=False)
class Headed:
    head: TaskHead | None
    task: Task = ONE
    calibration: Calibration = NO_CALIBRATION
    metric_labels: ModelLabels = ("m", "1", "t", "default")
    adapter_key: str | None = None
    lane: Any = None


def head(labels: int, seed: int) -> TaskHead:
    weight = np.random.default_rng(seed).normal(size=(labels, 4)).astype(np.float32)
    return TaskHead((DenseLayer(weight, np.zeros(labels, np.float32)),))


def entries_of(models: Sequence[Any]) -> list[QueueEntry]:
    unused: Any = None
    return [QueueEntry(Ticket(model, unused, [], 0.0, unused, 1), unused, 1) for model in models]


def test_each_row_goes_through_its_models_head_at_its_temperature() -> None:
    first, second = Headed(head(2, 1), calibration=Calibration(0.5)), Headed(head(5, 2))
    bare = Headed(None, FeatureExtraction("feature-extraction", "text"))
    vectors = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    models = [first, second, first, bare, second]
    outputs = apply_heads(entries_of(models), EngineOutputs(vectors))
    for model, vector, scores in zip(models, vectors, outputs.scores, strict=True):
        if model.head is None:
            assert scores is None
        else:
            assert scores is not None
            expected = softmax(model.head.logits(vector[None])[0] / np.float32(model.calibration.temperature))
            np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert list(outputs.is_finite) == [True] * 5


@given(
    order=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    values=arrays(np.float32, (12, 4), elements=st.floats(-3, 3, width=32)),
)
def test_a_batch_of_several_tasks_answers_each_row_as_alone(order: list[int], values: Any) -> None:
    models = [
        Headed(head(3, 1), ONE, Calibration(0.5)),
        Headed(head(3, 2), MANY, Calibration(2.0, (0.5, 0.2, 0.9))),
        Headed(head(1, 3), VALUE),
        Headed(None, FeatureExtraction("feature-extraction", "text")),
        Headed(head(2, 4), MANY),
    ]
    rows, vectors = [models[index] for index in order], values[: len(order)]
    together = apply_heads(entries_of(rows), EngineOutputs(vectors))
    assert all(together.is_finite)
    for row, model in enumerate(rows):
        alone = apply_heads(entries_of([model]), EngineOutputs(vectors[row : row + 1])).scores[0]
        mixed = together.scores[row]
        assert (mixed is None) == (alone is None) == (model.head is None)
        if alone is not None and mixed is not None:
            np.testing.assert_allclose(mixed, alone, rtol=1e-5, atol=1e-6)


class OfPositions:
    """One label for each position."""

    needs: ClassVar[str] = "states"

    def __getattr__(self, name: str) -> Any:
        return getattr(ONE, name)


@given(st.lists(st.sampled_from([None, 1, 2, 7]), min_size=1, max_size=8))
def test_a_head_on_states_answers_each_position_as_alone(lengths: list[int | None]) -> None:
    """Rows with a length go through a head on states, among others that do not."""
    random, tagger, plain = np.random.default_rng(1), Headed(head(3, 1), cast(Any, OfPositions())), Headed(head(3, 1))
    states = {row: random.normal(size=(n, 4)).astype(np.float32) for row, n in enumerate(lengths) if n is not None}
    vectors = random.normal(size=(len(lengths), 4)).astype(np.float32)
    if states:
        broken = max(states)
        states[broken][-1, 0] = np.inf
    models = [plain if length is None else tagger for length in lengths]
    outputs = apply_heads(entries_of(models), EngineOutputs(vectors, states))
    assert [row for row, is_finite in enumerate(outputs.is_finite) if not is_finite] == ([broken] if states else [])
    for row, scores in enumerate(outputs.scores):
        assert scores is not None and tagger.head is not None
        if row in states and row != broken:
            assert scores.shape == (lengths[row], 3)
            np.testing.assert_allclose(scores, softmax(tagger.head.logits(states[row])), atol=1e-6)
        elif row not in states:
            assert scores.shape == (3,)


@pytest.mark.parametrize("task", [ONE, MANY, VALUE], ids=lambda task: task.name)
@pytest.mark.parametrize("sign", [1, -1])
def test_rows_that_are_not_finite_are_told_from_the_others(task: Task, sign: int) -> None:
    weight = np.asarray([[np.float32(sign * 3e38)] * 4], dtype=np.float32)
    overflowing = Headed(TaskHead((DenseLayer(weight, np.zeros(1, np.float32)),)), task)
    fine = Headed(TaskHead((DenseLayer(weight * np.float32(1e-38), np.zeros(1, np.float32)),)), task)
    vectors = np.ones((4, 4), dtype=np.float32)
    vectors[1, 2] = np.nan
    outputs = apply_heads(entries_of([Headed(None), Headed(None), overflowing, fine]), EngineOutputs(vectors))
    assert list(outputs.is_finite) == [True, False, False, True]


@dataclass(eq=False)
class Linear:
    """As much of a served baseline as its lane needs; `words` counts as margins."""

    metric_labels: ModelLabels = ("m", "1", "t", "default")
    task: Task = ONE
    calibration: Calibration = NO_CALIBRATION
    adapter_key: str | None = None
    lane: Any = None
    seen: list[list[str]] = field(default_factory=list)
    head: TaskHead | None = None

    def margins(self, texts: Sequence[str]) -> FloatArray:
        self.seen.append(list(texts))
        if "bad" in texts:
            raise ValueError("a bug")
        return np.asarray([[len(text.split()), 0] for text in texts], dtype=np.float32)


def test_baselines_share_a_queue_and_a_bad_text_fails_alone() -> None:
    async def scenario() -> list[Any]:
        metrics = ServingMetrics()
        lane = LinearLane(metrics, LIMITS)
        lane.worker.start()
        tickets = []
        for model, text in ((Linear(), "a b"), (Linear(), "bad"), (Linear(), "c")):
            future = asyncio.get_running_loop().create_future()
            series = metrics.of_model(model.metric_labels)
            ticket = Ticket(model, series, [text], time.monotonic() + 30, future, lane.max_length)
            ticket.fill(lane.preprocess([text], truncate=True, max_length=None))
            tickets.append(ticket)
        lane.worker.put(tickets)
        await asyncio.gather(*(ticket.future for ticket in tickets), return_exceptions=True)
        await lane.worker.stop()
        return [ticket.future.exception() or ticket.entries[0].scores for ticket in tickets]

    first, failed, last = asyncio.run(scenario())
    assert isinstance(failed, InferenceFailed)
    assert first[0] > last[0] > 0.5
