"""The queue and its thread: work-conserving, and whatever happens, every entry ends exactly once."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from service.inference.batch_log import BatchLog
from service.inference.capacity import CostModel
from service.inference.engine_worker import BatchLimits, Outputs
from service.inference.errors import DeadlineExceeded, InferenceFailed, ModelNotReady
from service.inference.queue import Batch, QueueEntry, Ticket
from tests.support.lanes import NOT_A_NUMBER, POISON, WordLane, WordModel, ticket_for, words_of
from tests.support.turns import settled
from tests.support.virtual import elapse, run_virtually, virtual_runtime

LIMITS = BatchLimits(64, 8)
RUN_S = 0.1


def lane_of(limits: BatchLimits = LIMITS, *, seconds: Callable[[Any], float] | None = None, **options: Any) -> WordLane:
    """Started, in virtual time; a run takes `RUN_S` and a call nothing."""
    took = seconds or (lambda work: RUN_S if isinstance(work, Batch) else 0.0)
    lane = WordLane(limits, runtime=virtual_runtime(took), **options)
    lane.worker.calibrate(CostModel(RUN_S, 1e-9, 20), limits.max_tokens)
    lane.worker.start()
    return lane


def put(lane: WordLane, *texts: str, seconds: float = 60.0, model: WordModel | None = None) -> Ticket:
    """Queues one request as the tokeniser stage would."""
    loop = asyncio.get_running_loop()
    ticket = ticket_for(model or WordModel(lane), texts, deadline=loop.time() + seconds)
    timer = loop.call_later(seconds, ticket.expire)

    def end(_: object) -> None:
        timer.cancel()
        lane.worker.withdraw(ticket)

    ticket.future.add_done_callback(end)
    ticket.fill(lane.preprocess(texts, truncate=True, max_length=None))
    lane.worker.put([ticket])
    return ticket


def vector_of(entry: QueueEntry) -> list[float]:
    assert entry.vector is not None
    return [float(value) for value in entry.vector]


async def answers(tickets: Sequence[Ticket]) -> list[Any]:
    """A request's values, or the class of its error."""
    errors = await asyncio.gather(*(ticket.future for ticket in tickets), return_exceptions=True)
    return [
        type(error) if isinstance(error, BaseException) else [vector_of(entry)[0] for entry in ticket.entries]
        for ticket, error in zip(tickets, errors, strict=True)
    ]


def value(lane: WordLane, name: str, **labels: str) -> float:
    labels = labels or {"backbone": "tiny", "engine": "fake/fp32"}
    return lane.metrics.registry.get_sample_value(f"polyhead_{name}", labels) or 0.0


def test_a_batch_that_fails_is_halved_until_only_the_culprits_fail() -> None:
    async def scenario() -> list[Any]:
        lane = lane_of()
        found = await answers([put(lane, text) for text in ("a", POISON, "ccc", NOT_A_NUMBER, "eeeee")])
        await lane.worker.stop()
        return found

    assert run_virtually(scenario()) == [[1.0], InferenceFailed, [3.0], InferenceFailed, [5.0]]


def test_the_first_failing_input_fails_its_request_and_the_others_of_it_are_not_computed() -> None:
    async def scenario() -> tuple[list[Any], list[list[str]]]:
        lane = lane_of(BatchLimits(64, 2))
        tickets = [put(lane, POISON, "b", "c", "d", "e"), put(lane, "other")]
        found = await answers(tickets)
        assert all(entry.is_ended for ticket in tickets for entry in ticket.entries)
        await lane.worker.stop()
        return found, lane.seen

    found, seen = run_virtually(scenario())
    assert found == [InferenceFailed, [5.0]]
    assert not any("e" in batch for batch in seen)


def test_an_idle_engine_starts_at_once_and_a_busy_one_takes_what_gathered() -> None:
    async def scenario() -> tuple[list[list[str]], float]:
        lane = lane_of()
        tickets = [put(lane, "a")]
        await elapse(RUN_S / 2)
        tickets += [put(lane, "b"), put(lane, "c")]
        await answers(tickets)
        ended = asyncio.get_running_loop().time()
        await lane.worker.stop()
        return lane.seen, ended

    seen, ended = run_virtually(scenario())
    assert seen == [["a"], ["b", "c"]]
    assert ended == pytest.approx(2 * RUN_S)


def test_with_a_delay_an_idle_engine_waits_for_more_but_not_for_longer_than_that() -> None:
    async def scenario() -> tuple[list[list[str]], float]:
        lane = lane_of(BatchLimits(64, 8, max_delay_s=0.05))
        await settled(1)  # its thread has looked once
        tickets = [put(lane, "a")]
        await elapse(0.04)
        tickets += [put(lane, "b")]
        await answers(tickets)
        ended = asyncio.get_running_loop().time()
        tickets = [put(lane, str(number)) for number in range(8)]  # a full batch waits for nothing
        await answers(tickets)
        assert asyncio.get_running_loop().time() == pytest.approx(ended + RUN_S)
        await lane.worker.stop()
        return lane.seen[:1], ended

    seen, ended = run_virtually(scenario())
    assert seen == [["a", "b"]]
    assert ended == pytest.approx(0.05 + RUN_S)


def test_while_a_run_lasts_a_full_batch_is_made_ready_shortly_before_its_end() -> None:
    async def scenario() -> list[int]:
        lane = lane_of()
        tickets = [put(lane, "a")]
        await elapse(0.001)
        tickets += [put(lane, str(number)) for number in range(10)]
        stages = []
        for moment in (0.5 * RUN_S, 0.95 * RUN_S):
            await elapse(moment - asyncio.get_running_loop().time())
            stages.append(len(lane.worker._queue._ready))
        await answers(tickets)
        await lane.worker.stop()
        return stages

    assert run_virtually(scenario()) == [0, 8]


def test_who_leaves_a_batch_that_stands_ready_is_not_computed() -> None:
    async def scenario() -> tuple[list[list[str]], float]:
        lane = lane_of()
        tickets = [put(lane, "a")]
        await elapse(0.001)
        tickets += [put(lane, str(number)) for number in range(8)]
        await elapse(0.95 * RUN_S)
        tickets[3].future.cancel()
        await answers(tickets)
        await lane.worker.stop()
        return lane.seen, value(
            lane,
            "cancelled_total",
            model="m",
            version="1",
            task="text-classification",
            tenant="default",
            stage="queued",
        )

    seen, cancelled = run_virtually(scenario())
    assert seen[1] == ["0", "1", "3", "4", "5", "6", "7"]
    assert cancelled == 1


def test_expired_and_abandoned_entries_never_reach_the_engine() -> None:
    async def scenario() -> tuple[list[Any], list[list[str]]]:
        lane = lane_of()
        tickets = [put(lane, "running"), put(lane, "expired", seconds=RUN_S / 2), put(lane, "gone"), put(lane, "b")]
        await elapse(RUN_S / 4)
        lane.seen.clear()
        tickets[2].future.cancel()
        found = await answers(tickets)
        await lane.worker.stop()
        return found, lane.seen

    found, seen = run_virtually(scenario())
    assert found == [[7.0], DeadlineExceeded, asyncio.CancelledError, [1.0]]
    assert ["expired"] not in seen


def test_work_that_leaves_counts_no_longer() -> None:
    async def scenario() -> tuple[float, float]:
        lane = lane_of()
        put(lane, "running")
        await settled(1)
        alone = lane.worker.forecast().wait_s
        tickets = [put(lane, "w " * 60) for _ in range(5)]
        assert lane.worker.forecast().wait_s > alone
        for ticket in tickets:
            ticket.future.cancel()
        await settled(1)
        after = lane.worker.forecast().wait_s
        await lane.worker.stop()
        return alone, after

    alone, after = run_virtually(scenario())
    assert after == pytest.approx(alone)


def test_what_is_being_tokenised_counts_from_its_admission() -> None:
    async def scenario() -> list[float]:
        lane = lane_of()
        loop = asyncio.get_running_loop()
        ticket = ticket_for(WordModel(lane), ["w"], deadline=loop.time() + 9, tokens=640)
        waits = [lane.worker.forecast().wait_s]
        lane.worker.announce(ticket)
        waits.append(lane.worker.forecast().wait_s)
        lane.worker.withdraw(ticket)
        lane.worker.withdraw(ticket)
        waits.append(lane.worker.forecast().wait_s)
        await lane.worker.stop()
        return waits

    before, announced, after = run_virtually(scenario())
    assert announced == pytest.approx(before + 10 * RUN_S)  # ten batches of 64 tokens
    assert after == before


def test_a_forecast_that_nothing_has_confirmed_for_long_refuses_nobody() -> None:
    async def scenario() -> tuple[float, float]:
        lane = lane_of()
        fresh = lane.worker.forecast(10).done_s
        await elapse(60)
        stale = lane.worker.forecast(10).done_s
        await lane.worker.stop()
        return fresh, stale

    fresh, stale = run_virtually(scenario())
    assert fresh >= RUN_S
    assert stale == 0


def test_the_measured_limit_is_kept_and_shown_and_never_above_what_was_set() -> None:
    async def scenario() -> tuple[list[int], float, list[int]]:
        lane = lane_of(BatchLimits(64, 100))
        limits = []
        for measured in (16, 1000):
            lane.worker.calibrate(CostModel(), measured)
            limits.append(lane.worker.load.max_tokens)
        lane.worker.calibrate(CostModel(), 16)
        await answers([put(lane, "w w w w") for _ in range(12)])
        shown = value(lane, "batch_tokens_limit")
        await lane.worker.stop()
        return limits, shown, [len(batch) for batch in lane.seen[1:]]

    limits, shown, rows = run_virtually(scenario())
    assert limits == [16, 64]
    assert shown == 16
    assert max(rows) == 4


def test_rows_are_padded_as_the_engine_pads_them() -> None:
    batches: list[Batch] = []

    async def scenario() -> None:
        lane = lane_of(
            padded_width=lambda longest: -(-longest // 8) * 8, record=lambda name, batch: batches.append(batch)
        )
        await answers([put(lane, "w w w"), put(lane, "w w w w w")])
        await lane.worker.stop()

    run_virtually(scenario())
    assert {batch.width for batch in batches} == {8}


def test_stop_fails_what_waits_lets_the_run_end_and_refuses_what_comes() -> None:
    async def scenario() -> list[Any]:
        lane = lane_of(BatchLimits(64, 1))
        tickets = [put(lane, "running"), put(lane, "waiting")]
        await elapse(RUN_S / 2)
        call = asyncio.ensure_future(lane.worker.call(lambda: None))
        await settled(1)
        await lane.worker.stop()
        with pytest.raises(ModelNotReady):
            put(lane, "late")
        with pytest.raises(ModelNotReady):
            await lane.worker.call(lambda: None)
        with pytest.raises(ModelNotReady):
            await call
        assert not lane.worker.is_fit
        return await answers(tickets)

    assert run_virtually(scenario()) == [[7.0], ModelNotReady]


def test_calls_run_between_batches_and_give_back_what_they_raise() -> None:
    async def scenario() -> list[Any]:
        lane = lane_of(BatchLimits(64, 1))
        order: list[str] = []
        tickets = [put(lane, "a"), put(lane, "b")]
        await elapse(RUN_S / 2)
        await lane.worker.call(lambda: order.append(f"call after {len(lane.seen)} batches"))
        with pytest.raises(ZeroDivisionError):
            await lane.worker.call(lambda: 1 // 0)
        await answers(tickets)
        await lane.worker.stop()
        return order

    assert run_virtually(scenario()) == ["call after 1 batches"]


# Faults of the engine


def hanging(work: Any) -> float:
    return 1e6 if isinstance(work, Batch) and "hang" in words_of(work.entries[0]) else RUN_S


def test_a_run_that_hangs_is_given_up_and_the_hook_may_bring_in_another_engine() -> None:
    async def scenario() -> tuple[list[Any], list[str], float, float]:
        lane = lane_of(BatchLimits(64, 1, engine_timeout_s=2.0), seconds=hanging)
        reasons: list[str] = []

        def replace(reason: str) -> None:
            reasons.append(reason)
            lane.worker.supervisor.resume()

        lane.worker.supervisor.on_engine_failed = replace
        tickets = [put(lane, "hang"), put(lane, "waiting")]
        found = await answers(tickets)
        ended = asyncio.get_running_loop().time()
        assert lane.worker.is_fit
        restarts = value(lane, "worker_restarts_total")
        await lane.worker.stop()
        return found, reasons, ended, restarts

    found, reasons, ended, restarts = run_virtually(scenario())
    assert found == [ModelNotReady, [7.0]]
    assert len(reasons) == 1 and "not ended" in reasons[0]
    assert 2 < ended < 4
    assert restarts == 1


def test_without_another_engine_the_queue_refuses_until_the_lost_run_returns() -> None:
    async def scenario() -> list[Any]:
        def late(work: Any) -> float:
            return 30.0 if isinstance(work, Batch) and "late" in words_of(work.entries[0]) else RUN_S

        lane = lane_of(BatchLimits(64, 1, engine_timeout_s=2.0), seconds=late)
        found = await answers([put(lane, "late"), put(lane, "waiting")])
        states = [lane.worker.is_fit]
        with pytest.raises(ModelNotReady) as refused:
            put(lane, "refused")
        assert refused.value.retry_after_s
        await elapse(60)
        states.append(lane.worker.is_fit)
        found += await answers([put(lane, "again")])
        await lane.worker.stop()
        return [*found, *states]

    assert run_virtually(scenario()) == [ModelNotReady, ModelNotReady, [5.0], False, True]


def test_nothing_enters_an_engine_that_a_run_hangs_in_but_another_engine_may_be_installed() -> None:
    async def scenario() -> tuple[list[Any], list[str]]:
        lane = lane_of(BatchLimits(64, 1, engine_timeout_s=2.0), seconds=hanging)
        entered: list[str] = []
        tickets = [put(lane, "hang"), put(lane, "waiting")]
        called = asyncio.ensure_future(lane.worker.call(lambda: entered.append("golden rows")))
        found = await answers(tickets)
        with pytest.raises(ModelNotReady):
            await called
        with pytest.raises(ModelNotReady):
            await lane.worker.call(lambda: entered.append("golden rows"))
        entered += [text for batch in lane.seen for text in batch]
        await lane.worker.exchange(lambda: entered.append("another engine"))
        await lane.worker.stop()
        return found, entered

    assert run_virtually(scenario()) == ([ModelNotReady, ModelNotReady], ["another engine"])


def test_a_slow_run_that_was_predicted_to_be_slow_is_not_given_up() -> None:
    async def scenario() -> list[Any]:
        lane = lane_of(BatchLimits(64, 1, engine_timeout_s=0.2), seconds=lambda work: 5 * RUN_S)
        found = await answers([put(lane, "slow")])
        await lane.worker.stop()
        return found

    assert run_virtually(scenario()) == [[4.0]]


def test_an_engine_that_fails_every_row_of_three_batches_is_reported_and_serves_again_once_it_passes_a_check() -> None:
    async def scenario() -> tuple[list[Any], list[str], list[bool]]:
        lane = lane_of()
        reasons: list[str] = []
        lane.worker.supervisor.on_engine_failed = reasons.append
        lane.is_broken = True
        found = []
        for _ in range(3):
            found += await answers([put(lane, "a"), put(lane, "b")])
        await elapse(2)
        states = [lane.worker.is_fit]
        with pytest.raises(ModelNotReady):
            put(lane, "refused")
        lane.is_broken = False
        await elapse(10)
        states.append(lane.worker.is_fit)
        found += await answers([put(lane, "c")])
        await lane.worker.stop()
        return found, reasons, states

    found, reasons, states = run_virtually(scenario())
    assert found == [InferenceFailed] * 6 + [[1.0]]
    assert len(reasons) == 1 and "3 batches" in reasons[0]
    assert states == [False, True]


def test_bad_inputs_alone_keep_a_sound_engine_from_serving_nobody() -> None:
    async def scenario() -> tuple[list[Any], list[str]]:
        lane = lane_of(BatchLimits(64, 1))
        reasons: list[str] = []
        lane.worker.supervisor.on_engine_failed = reasons.append
        found = await answers([put(lane, text) for text in (POISON, POISON, POISON, "waits", POISON)])
        await lane.worker.stop()
        return found, reasons

    found, reasons = run_virtually(scenario())
    assert found == [InferenceFailed] * 3 + [[5.0], InferenceFailed]
    assert reasons == []


def test_while_a_suspected_engine_is_checked_nobody_is_refused() -> None:
    async def scenario() -> list[Any]:
        lane = lane_of(BatchLimits(64, 1))
        found = await answers([put(lane, POISON) for _ in range(3)])
        assert lane.worker.is_fit
        found += await answers([put(lane, "good")])
        await lane.worker.stop()
        return found

    assert run_virtually(scenario()) == [InferenceFailed] * 3 + [[4.0]]


def test_a_good_batch_in_between_and_the_count_starts_anew() -> None:
    async def scenario() -> list[str]:
        lane = lane_of()
        reasons: list[str] = []
        lane.worker.supervisor.on_engine_failed = reasons.append
        for text in (POISON, POISON, "good", POISON, POISON):
            await answers([put(lane, text)])
        await lane.worker.stop()
        return reasons

    assert run_virtually(scenario()) == []


def test_a_hook_that_fails_itself_changes_nothing() -> None:
    async def scenario() -> bool:
        lane = lane_of()

        def broken(reason: str) -> None:
            raise RuntimeError(reason)

        lane.worker.supervisor.on_engine_failed = broken
        for _ in range(3):
            await answers([put(lane, POISON)])
        await elapse(1)
        alive = lane.worker.is_fit
        await lane.worker.stop()
        return alive

    assert run_virtually(scenario())


def test_a_bug_in_the_queue_fails_those_who_wait_and_a_fresh_thread_goes_on() -> None:
    async def scenario() -> tuple[list[Any], float]:
        lane = lane_of()
        tickets = [put(lane, "a")]
        await answers(tickets)
        form = lane.worker._queue.next

        def explode(now: float) -> Any:
            lane.worker._queue.next = form  # type: ignore[method-assign]
            raise RuntimeError("a bug")

        lane.worker._queue.next = explode  # type: ignore[method-assign]
        found = await answers([put(lane, "b"), put(lane, "c")])
        assert not lane.worker.is_fit
        await elapse(1)
        found += await answers([put(lane, "d")])
        restarts = value(lane, "worker_restarts_total")
        await lane.worker.stop()
        return found, restarts

    found, restarts = run_virtually(scenario())
    assert found == [ModelNotReady, ModelNotReady, [1.0]]
    assert restarts == 1


def test_results_that_cannot_be_delivered_end_their_requests_all_the_same() -> None:
    async def scenario() -> list[Any]:
        lane = lane_of()

        def explode(*_: Any, **__: Any) -> None:
            raise RuntimeError("a bug")

        lane.worker._observe = explode  # type: ignore[method-assign]
        tickets = [put(lane, "a"), put(lane, "b " * 3)]
        tickets[1].entries[0].is_ended = True  # `end` will refuse
        found = await answers(tickets[:1])
        await lane.worker.stop()
        return found

    assert run_virtually(scenario()) == [[1.0]]


# With real threads


def test_results_come_back_from_a_real_thread_and_a_hung_one_is_left_behind() -> None:
    gate = threading.Event()

    class Blocking(WordLane):
        def compute(self, entries: Any) -> Any:
            if entries[0].work.text == "hang":
                gate.wait(20)
            return super().compute(entries)

    async def scenario() -> list[Any]:
        lane = Blocking(BatchLimits(64, 4, engine_timeout_s=0.1))
        lane.worker.start()
        found = await answers([put_now(lane, text) for text in ("a", "bb", "ccc")])
        lane.worker.supervisor.on_engine_failed = lambda reason: lane.worker.supervisor.resume()
        found += await answers([put_now(lane, "hang")])
        found += await answers([put_now(lane, "later")])
        gate.set()
        await lane.worker.stop()
        return found

    assert asyncio.run(scenario()) == [[1.0], [2.0], [3.0], ModelNotReady, [5.0]]


def put_now(lane: WordLane, text: str) -> Ticket:
    ticket = ticket_for(WordModel(lane), [text], deadline=time.monotonic() + 60)
    ticket.fill(lane.preprocess([text], truncate=True, max_length=None))
    lane.worker.put([ticket])
    return ticket


class CountingLane(WordLane):
    """Its thread releases `computed` once per batch."""

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(limits)
        self.computed = threading.Semaphore(0)

    def compute(self, entries: Sequence[QueueEntry]) -> Outputs:
        try:
            return super().compute(entries)
        finally:
            self.computed.release()


def test_under_load_the_engine_takes_its_next_batch_without_the_event_loop() -> None:
    """The loop is blocked, and still every batch that waits is computed."""

    async def scenario() -> None:
        lane = CountingLane(BatchLimits(64, 1))
        lane.worker.start()
        tickets = [put_now(lane, str(number)) for number in range(20)]
        for _ in tickets:
            assert lane.computed.acquire(timeout=10)
        await answers(tickets)
        await lane.worker.stop()

    asyncio.run(scenario())


# The log


def test_the_log_holds_what_a_replay_needs(tmp_path: Path) -> None:
    async def scenario() -> None:
        with closing(BatchLog(tmp_path / "logs" / "batches.jsonl")) as log:
            lane = lane_of(BatchLimits(64, 8, max_delay_s=0.01), record=log)
            await settled(1)
            adapted = WordModel(lane)
            adapted.adapter_key = "default/m/1"
            await answers([put(lane, "w w"), put(lane, "w w w", model=adapted)])
            await lane.worker.stop()

    run_virtually(scenario())
    (line,) = (tmp_path / "logs" / "batches.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "backbone": "tiny",
        "engine": "fake/fp32",
        "width": 3,
        "seconds": RUN_S,
        "lengths": [2, 3],
        "adapters": [None, "default/m/1"],
    }
