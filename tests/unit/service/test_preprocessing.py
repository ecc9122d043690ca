"""The stage before the queue: bursts go together, and a bad request spoils only itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from modeling.errors import InputTooLong, PreprocessorFailed
from service.inference.engine_worker import BatchLimits, Runtime
from service.inference.errors import InferenceFailed, ModelNotReady
from service.inference.preprocessing import PreprocessorStage
from service.inference.queue import Ticket
from tests.support.lanes import WordLane, WordModel, Words, ticket_for
from tests.support.turns import settled
from tests.support.virtual import elapse, run_virtually, virtual_runtime


class Panic(BaseException):
    """As pyo3 raises one: no `Exception`."""


class Recording(WordLane):
    """Keeps what every call to `preprocess` got."""

    def __init__(self, **options: Any) -> None:
        super().__init__(BatchLimits(1000, 100), **options)
        self.calls: list[list[str]] = []

    def preprocess(
        self, inputs: Sequence[str], *, truncate: bool, max_length: int | None, in_windows: bool = False
    ) -> list[list[Words]]:
        self.calls.append(list(inputs))
        if "surrogate" in inputs:
            raise UnicodeError("a lone surrogate")
        if "panic" in inputs:
            raise Panic("a native library gave up")
        return super().preprocess(inputs, truncate=truncate, max_length=max_length)


def ticket(lane: WordLane, *texts: str, max_length: int = 100, truncate: bool = True) -> Ticket:
    return ticket_for(WordModel(lane), texts, deadline=1e9, max_length=max_length, truncate=truncate)


def lengths(answered: Ticket) -> list[int]:
    return [entry.length for entry in answered.entries]


async def outcomes(tickets: Sequence[Ticket]) -> list[Any]:
    found = await asyncio.gather(*(ticket.future for ticket in tickets), return_exceptions=True)
    return [type(outcome) if isinstance(outcome, Exception) else outcome for outcome in found]


def stage(
    lane_type: type[Recording] = Recording, *, threads: int = 2, seconds: float = 0.0
) -> tuple[Recording, PreprocessorStage]:
    runtime = virtual_runtime(preprocessor_s=lambda burst: seconds)
    lane = lane_type(runtime=runtime)
    lane.worker.start()
    return lane, PreprocessorStage(threads, runtime)


def test_what_arrives_together_is_preprocessed_in_one_call() -> None:
    async def scenario() -> list[list[str]]:
        lane, preprocessors = stage()
        tickets = [ticket(lane, "a", "b c"), ticket(lane, "d"), ticket(lane, "e f g")]
        for item in tickets:
            preprocessors.submit(lane, item)
        assert await outcomes(tickets) == [None] * 3
        assert [lengths(item) for item in tickets] == [[1, 2], [1], [3]]
        await lane.worker.stop()
        return lane.calls

    assert run_virtually(scenario()) == [["a", "b c", "d", "e f g"]]


def test_requests_that_wait_long_anyway_gather_and_hold_up_nobody_else() -> None:
    async def scenario() -> tuple[list[list[str]], float]:
        lane, preprocessors = stage()
        patient = [ticket(lane, text) for text in "abcd"]
        for item in patient:
            item.forecast_s = 1.0
        for item in patient[:3]:
            preprocessors.submit(lane, item)
            await elapse(0.001)
        assert lane.calls == []
        await outcomes(patient[:3])
        preprocessors.submit(lane, patient[3])
        urgent, started = ticket(lane, "now"), asyncio.get_running_loop().time()
        preprocessors.submit(lane, urgent)
        await outcomes([urgent])
        took = asyncio.get_running_loop().time() - started
        preprocessors.close()
        await lane.worker.stop()
        return lane.calls, took

    calls, took = run_virtually(scenario())
    assert calls == [["a", "b", "c"], ["d", "now"]]
    assert took < 0.01


def test_while_the_threads_are_busy_requests_gather() -> None:
    async def scenario() -> list[list[str]]:
        lane, preprocessors = stage(threads=1, seconds=0.01)
        tickets = [ticket(lane, str(number)) for number in range(5)]
        for item in tickets:
            preprocessors.submit(lane, item)
            await elapse(0.001)
        await outcomes(tickets)
        await lane.worker.stop()
        return lane.calls

    assert run_virtually(scenario()) == [["0"], ["1", "2", "3", "4"]]


def test_a_bad_request_fails_alone() -> None:
    async def scenario() -> list[Any]:
        lane, preprocessors = stage()
        tickets = [
            ticket(lane, "a"),
            ticket(lane, "b", "c c c", truncate=False, max_length=2),
            ticket(lane, "d", truncate=False, max_length=2),
            ticket(lane, "surrogate"),
            ticket(lane, "e"),
        ]
        for item in tickets:
            preprocessors.submit(lane, item)
        found = await outcomes(tickets)
        error = tickets[1].future.exception()
        assert isinstance(error, InputTooLong) and error.index == 1  # as counted in its own request
        await lane.worker.stop()
        return found

    assert run_virtually(scenario()) == [None, InputTooLong, None, InferenceFailed, None]


def test_every_request_keeps_its_own_limit() -> None:
    async def scenario() -> list[list[int]]:
        lane, preprocessors = stage()
        tickets = [ticket(lane, "w " * 9, max_length=limit) for limit in (3, 5, 3, 20)]
        for item in tickets:
            preprocessors.submit(lane, item)
        await outcomes(tickets)
        await lane.worker.stop()
        return [lengths(item) for item in tickets]

    assert run_virtually(scenario()) == [[3], [5], [3], [9]]


def test_nothing_is_spent_on_a_request_whose_client_has_left() -> None:
    async def scenario() -> list[list[str]]:
        lane, preprocessors = stage(threads=1, seconds=0.01)
        first, gone, last = ticket(lane, "a"), ticket(lane, "gone"), ticket(lane, "b")
        preprocessors.submit(lane, first)
        await settled(1)
        for item in (gone, last):
            preprocessors.submit(lane, item)
        gone.future.cancel()
        await outcomes([first, last])
        await lane.worker.stop()
        return lane.calls

    assert run_virtually(scenario()) == [["a"], ["b"]]


def test_a_long_burst_is_split_so_that_those_behind_it_need_not_wait_for_all_of_it() -> None:
    async def scenario() -> list[int]:
        lane, preprocessors = stage()
        tickets = [ticket(lane, "w " * 75_000) for _ in range(4)]
        for item in tickets:
            preprocessors.submit(lane, item)
        await outcomes(tickets)
        await lane.worker.stop()
        return [len(call) for call in lane.calls]

    assert run_virtually(scenario()) == [2, 2]


def test_where_the_queue_is_closed_the_requests_fail() -> None:
    async def scenario() -> list[Any]:
        lane, preprocessors = stage()
        await lane.worker.stop()
        tickets = [ticket(lane, "a")]
        preprocessors.submit(lane, tickets[0])
        return await outcomes(tickets)

    assert run_virtually(scenario()) == [ModelNotReady]


def test_a_closed_stage_fails_what_comes() -> None:
    async def scenario() -> list[Any]:
        lane, preprocessors = Recording(), PreprocessorStage(1, Runtime())
        preprocessors.close()
        tickets = [ticket(lane, "a")]
        preprocessors.submit(lane, tickets[0])
        return await outcomes(tickets)

    assert asyncio.run(scenario()) == [ModelNotReady]


def test_a_panic_fails_the_request_that_caused_it_and_no_other() -> None:
    async def scenario() -> list[Any]:
        lane, preprocessors = stage(threads=1)
        tickets = [ticket(lane, text) for text in ("a", "panic", "b")]
        for item in tickets:
            preprocessors.submit(lane, item)
        found = await outcomes(tickets)
        tickets.append(ticket(lane, "c"))
        preprocessors.submit(lane, tickets[-1])
        found += await outcomes(tickets[-1:])
        await lane.worker.stop()
        return found

    assert run_virtually(scenario()) == [None, InferenceFailed, None, None]


def test_a_call_that_does_not_return_is_given_up_and_holds_up_no_other_model() -> None:
    async def scenario() -> list[Any]:
        runtime = virtual_runtime(preprocessor_s=lambda call: 1e3 if call.burst[0][1].inputs == ["hang"] else 0.0)
        hanging, other = Recording(runtime=runtime), Recording(runtime=runtime)
        for lane in (hanging, other):
            lane.worker.start()
        preprocessors = PreprocessorStage(1, runtime)
        asked = [(hanging, ticket(hanging, "hang")), (other, ticket(other, "a")), (hanging, ticket(hanging, "b"))]
        for lane, item in asked:
            preprocessors.submit(lane, item)
        found = await outcomes([item for _, item in asked])
        assert asyncio.get_running_loop().time() == pytest.approx(10.0)
        refused, fine = ticket(hanging, "c"), ticket(other, "d")
        preprocessors.submit(hanging, refused)
        preprocessors.submit(other, fine)
        found += await outcomes([refused, fine])
        await elapse(1e3)  # in the end it returns
        again = ticket(hanging, "e")
        preprocessors.submit(hanging, again)
        found += await outcomes([again])
        for lane in (hanging, other):
            await lane.worker.stop()
        return found

    failed = PreprocessorFailed
    assert run_virtually(scenario()) == [failed, None, failed, ModelNotReady, None, None]


def test_only_so_many_calls_are_given_up() -> None:
    async def scenario() -> list[Any]:
        runtime = virtual_runtime(preprocessor_s=lambda call: 1e3)
        lanes = [Recording(runtime=runtime) for _ in range(12)]
        for lane in lanes:
            lane.worker.start()
        preprocessors = PreprocessorStage(1, runtime)
        tickets = [ticket(lane, "hang") for lane in lanes]
        for lane, item in zip(lanes, tickets, strict=True):
            preprocessors.submit(lane, item)
            await elapse(20.0)
        given_up = [item.is_over for item in tickets]
        for item in tickets:
            item.expire()
        await outcomes(tickets)
        for lane in lanes:
            await lane.worker.stop()
        return given_up

    assert run_virtually(scenario()) == [True] * 8 + [False] * 4
