"""The packing rule and the queue: every entry ends exactly once, whatever happens around it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.errors import EngineFailed
from service.inference.batching import DynamicBatcher, QueueEntry, pack
from service.inference.errors import DeadlineExceeded, InferenceFailed, ModelNotReady
from service.metrics import ServingMetrics

POISON, NOT_A_NUMBER = 13, 17


@dataclass
class Item:
    value: int
    length: int = 4


class Model:
    metric_labels = ("m", "1", "text-classification")


def compute(batch: Sequence[QueueEntry]) -> Any:
    values = [entry.work.value for entry in batch]
    if POISON in values:
        raise EngineFailed("poisoned")
    vectors = np.asarray([[np.nan if value == NOT_A_NUMBER else value] for value in values], dtype=np.float32)
    return vectors, [None] * len(batch), ["fake"] * len(batch)


def new_batcher(**options: Any) -> DynamicBatcher:
    limits = {"max_tokens": 64, "max_rows": 8} | options
    return DynamicBatcher(("b", "fake"), limits.pop("compute", compute), ServingMetrics(), **limits)


def entry(value: int, *, seconds: float = 60.0) -> QueueEntry:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    return QueueEntry(Item(value), Model(), time.monotonic() + seconds, future)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(16, 400), st.integers(1, 20))
def test_pack_takes_the_oldest_and_stays_within_the_budget(lengths: list[int], tokens: int, rows: int) -> None:
    chosen = pack(lengths, max_tokens=tokens, max_rows=rows)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= rows
    assert len(chosen) == 1 or max(lengths[i] for i in chosen) * len(chosen) <= tokens


@given(st.lists(st.just(10), min_size=1, max_size=40))
def test_pack_fills_the_batch_when_lengths_are_equal(lengths: list[int]) -> None:
    assert len(pack(lengths, max_tokens=100, max_rows=8)) == min(len(lengths), 8)


def test_pack_prefers_entries_near_the_oldest_in_length() -> None:
    assert pack([10, 90, 11, 80, 12], max_tokens=48, max_rows=8) == [0, 2, 4]


def test_poison_and_nan_rows_fail_alone() -> None:
    async def scenario() -> list[Any]:
        batcher = new_batcher()
        entries = [entry(value) for value in (1, POISON, 3, NOT_A_NUMBER, 5)]
        for item in entries:
            batcher.put(item)
        batcher.start()
        outcomes = await asyncio.gather(*(item.future for item in entries), return_exceptions=True)
        await batcher.stop()
        return list(outcomes)

    outcomes = asyncio.run(scenario())
    assert [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)] == [InferenceFailed] * 2
    assert [float(outcome.vector[0]) for outcome in outcomes if not isinstance(outcome, Exception)] == [1, 3, 5]


def test_a_later_batch_is_not_touched_by_an_earlier_failure() -> None:
    async def scenario() -> float:
        batcher = new_batcher()
        batcher.start()
        bad = entry(POISON)
        batcher.put(bad)
        with pytest.raises(InferenceFailed):
            await bad.future
        good = entry(7)
        batcher.put(good)
        result = await good.future
        await batcher.stop()
        return float(result.vector[0])

    assert asyncio.run(scenario()) == 7


def test_a_bug_in_the_loop_fails_those_who_wait_and_the_queue_goes_on() -> None:
    async def scenario() -> tuple[Any, float, float]:
        metrics = ServingMetrics()
        batcher = DynamicBatcher(("b", "fake"), compute, metrics, max_tokens=64, max_rows=8)
        broken, take = entry(1), batcher._take

        def explode() -> Any:
            batcher._take = take  # type: ignore[method-assign]
            raise RuntimeError("a bug")

        batcher._take = explode  # type: ignore[method-assign]
        batcher.put(broken)
        batcher.start()
        outcome = (await asyncio.gather(broken.future, return_exceptions=True))[0]
        later = entry(2)
        batcher.put(later)
        value = float((await later.future).vector[0])
        await batcher.stop()
        restarts = metrics.registry.get_sample_value(
            "polyhead_worker_restarts_total", {"backbone": "b", "engine": "fake"}
        )
        return outcome, value, restarts or 0.0

    outcome, value, _ = asyncio.run(scenario())
    assert isinstance(outcome, ModelNotReady)
    assert value == 2


def test_expired_and_abandoned_entries_never_reach_the_engine() -> None:
    seen: list[int] = []

    def recording(batch: Sequence[QueueEntry]) -> Any:
        seen.extend(item.work.value for item in batch)
        return compute(batch)

    async def scenario() -> Any:
        batcher = new_batcher(compute=recording)
        expired, abandoned, alive = entry(1, seconds=-1), entry(2), entry(3)
        for item in (expired, abandoned, alive):
            batcher.put(item)
        abandoned.future.cancel()
        batcher.start()
        await alive.future
        outcome = (await asyncio.gather(expired.future, return_exceptions=True))[0]
        await batcher.stop()
        return outcome

    assert isinstance(asyncio.run(scenario()), DeadlineExceeded)
    assert seen == [3]


def test_stop_fails_what_waits_and_refuses_what_comes() -> None:
    gate = threading.Event()

    def blocking(batch: Sequence[QueueEntry]) -> Any:
        gate.wait(10)
        return compute(batch)

    async def scenario() -> tuple[Any, Any]:
        batcher = new_batcher(compute=blocking, max_rows=1)
        running, waiting = entry(1), entry(2)
        batcher.put(running)
        batcher.put(waiting)
        batcher.start()
        while batcher.busy_for_s() == 0:
            await asyncio.sleep(0)
        stopping = asyncio.create_task(batcher.stop())
        outcomes = await asyncio.gather(running.future, waiting.future, return_exceptions=True)
        gate.set()
        await stopping
        with pytest.raises(ModelNotReady):
            batcher.put(entry(3))
        return outcomes[0], outcomes[1]

    assert all(isinstance(outcome, ModelNotReady) for outcome in asyncio.run(scenario()))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "poison", "nan", "expired", "cancel", "pause"]), st.integers(0, 30)),
        min_size=1,
        max_size=60,
    )
)
def test_every_entry_ends_exactly_once(steps: list[tuple[str, int]]) -> None:
    async def scenario() -> None:
        batcher = new_batcher()
        batcher.start()
        entries: list[QueueEntry] = []
        values: list[int] = []
        for action, number in steps:
            if action == "cancel" and entries:
                entries[number % len(entries)].future.cancel()
            elif action == "pause":
                await asyncio.sleep(0)
            elif action in {"put", "poison", "nan", "expired"}:
                value = {"poison": POISON, "nan": NOT_A_NUMBER}.get(action, 100 + number)
                entries.append(entry(value, seconds=-1 if action == "expired" else 60))
                values.append(value)
                batcher.put(entries[-1])
        outcomes = await asyncio.wait_for(
            asyncio.gather(*(item.future for item in entries), return_exceptions=True), timeout=20
        )
        await batcher.stop()
        for value, outcome in zip(values, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, (InferenceFailed, DeadlineExceeded, asyncio.CancelledError))
            else:
                assert float(outcome.vector[0]) == value

    asyncio.run(scenario())


def test_a_small_running_batch_does_not_pass_for_a_full_one() -> None:
    gate = threading.Event()

    def blocking(batch: Sequence[QueueEntry]) -> Any:
        gate.wait(10)
        return compute(batch)

    async def scenario() -> float:
        batcher = new_batcher(compute=blocking, max_tokens=100_000)
        batcher._seconds_per_token = 0.001
        batcher.start()
        running, waiting = entry(1), entry(2)
        batcher.put(running)
        while batcher.busy_for_s() == 0:
            await asyncio.sleep(0)
        batcher.put(waiting)
        predicted = batcher.predicted_wait_s()
        gate.set()
        await asyncio.gather(running.future, waiting.future)
        await batcher.stop()
        return predicted

    assert 0.004 <= asyncio.run(scenario()) <= 0.008
