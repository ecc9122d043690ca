"""The stage before the queue: inputs to rows, off the event loop, a whole burst of requests in one go.

A free thread takes all that has arrived; only what the engine could not begin for long waits a moment for others. While
every thread is busy requests gather, so the busier it is the fewer changes of thread it costs each of them. A call that
does not return is given up: its requests fail, another thread takes its place, and its lane takes no more meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from modeling.errors import ModelingError, PreprocessorFailed
from service.inference.engine_worker import Runtime
from service.inference.errors import InferenceError, InferenceFailed, ModelNotReady
from service.inference.lanes import Lane
from service.inference.queue import Ticket, Work

_log = logging.getLogger("service.preprocessing")
# So much at once by `Modality.size`, some 20 ms for characters: long inputs hold up those behind them no longer.
_MAX_SIZE = 200_000
# Changes of thread cost more than what they are for where each request comes alone.
_PATIENT_S, _GATHER_S = 0.2, 0.02

# A text of the largest body takes a second or two. No thread can be stopped, so few are given up.
_HUNG_S, _MOST_HUNG = 10.0, 8

Asked = tuple[Lane, Ticket]
Prepared = tuple[Lane, Ticket, Sequence[Sequence[Work]] | Exception]


@dataclass(slots=True, eq=False)
class Call:
    """A burst on its thread, the lane that is being prepared there, and the one that it was given up for."""

    burst: Sequence[Asked]
    lane: Lane
    given_up_for: Lane | None = None


class PreprocessorStage:
    """Its own threads in front of all lanes; what they have done is put into the lane's queue."""

    def __init__(self, threads: int, runtime: Runtime) -> None:
        self._executor, self._clock = runtime.preprocessor_threads(threads + _MOST_HUNG), runtime.clock
        self._free = threads
        self._hung: Counter[Lane] = Counter()
        self._waiting: deque[Asked] = deque()
        self._flushing: asyncio.Handle | None = None
        self._is_patient = False

    def close(self) -> None:
        self._executor.shutdown(wait=not self._hung, cancel_futures=True)

    def submit(self, lane: Lane, ticket: Ticket) -> None:
        """Later, the ticket has its entries or its error. Those submitted in one turn of the loop go together; those
        that will wait long for the engine gather for a moment."""
        self._waiting.append((lane, ticket))
        is_patient = ticket.forecast_s > _PATIENT_S
        if self._flushing is not None and self._is_patient and not is_patient:
            self._flushing.cancel()
            self._flushing = None
        if self._free and self._flushing is None:
            loop, self._is_patient = asyncio.get_running_loop(), is_patient
            self._flushing = loop.call_later(_GATHER_S, self._flush) if is_patient else loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        loop = asyncio.get_running_loop()
        while self._free and (burst := self._next_burst()):
            call = Call(burst, burst[0][0])
            try:
                preparing = loop.run_in_executor(self._executor, _prepare, call)
            except RuntimeError:  # closed
                _fail(burst, ModelNotReady("the service is shutting down", retry_after_s=1.0))
                continue
            self._free -= 1
            overdue = loop.call_later(_HUNG_S, self._give_up, call)
            preparing.add_done_callback(partial(self._prepared, call, overdue))

    def _next_burst(self) -> list[Asked]:
        burst, size = [], 0
        while self._waiting and size < _MAX_SIZE:
            lane, ticket = self._waiting.popleft()
            if lane in self._hung:
                ticket.fail(ModelNotReady("its preprocessor is busy with an input for too long", retry_after_s=_HUNG_S))
            if not ticket.is_over:
                burst.append((lane, ticket))
                size += sum(map(lane.cost_estimate.size, ticket.inputs))
        return burst

    def _give_up(self, call: Call) -> None:
        """What hangs fails; what was only beside it starts anew."""
        if self._hung.total() >= _MOST_HUNG:
            return  # their deadlines end them
        lane = call.given_up_for = call.lane
        self._hung[lane] += 1
        _log.error(f"an input holds a preprocessor up for {_HUNG_S:g} s", extra={"action": "preprocessor_hung"})
        error = PreprocessorFailed(f"the model's preprocessor took more than {_HUNG_S:g} s for this request")
        _fail([(own, ticket) for own, ticket in call.burst if own is lane], error)
        self._waiting.extendleft((own, ticket) for own, ticket in reversed(call.burst) if own is not lane)
        self._free += 1
        self._flush()

    def _prepared(self, call: Call, overdue: asyncio.TimerHandle, done: asyncio.Future[list[Prepared]]) -> None:
        overdue.cancel()
        if call.given_up_for is not None:
            self._hung = self._hung - Counter([call.given_up_for])
            return
        self._free += 1
        self._flush()
        if done.cancelled():  # closed
            _fail(call.burst, ModelNotReady("the service is shutting down", retry_after_s=1.0))
            return
        now = self._clock()
        by_lane: dict[Lane, list[Ticket]] = {}
        for lane, ticket, works in done.result():
            ticket.preprocessed_at = now
            if isinstance(works, Exception):
                ticket.fail(works)
            elif not ticket.is_over:
                entries = ticket.fill(works)
                lane.cost_estimate.observe(ticket.inputs[0], entries[0].length, ticket.max_length)
                by_lane.setdefault(lane, []).append(ticket)
        for lane, tickets in by_lane.items():
            try:
                lane.worker.put(tickets)
            except ModelNotReady as error:
                for ticket in tickets:
                    ticket.fail(error)


def _prepare(call: Call) -> list[Prepared]:
    """On a preprocessor thread: one call for all requests that share a lane and their limits."""
    groups: dict[tuple[Lane, bool, int, bool], list[Ticket]] = {}
    for lane, ticket in call.burst:
        how = (lane, ticket.truncate, ticket.max_length, ticket.model.task.reads_windows)
        groups.setdefault(how, []).append(ticket)
    prepared = []
    for (lane, *_), tickets in groups.items():
        if call.given_up_for is None:
            call.lane = lane
            prepared += _prepare_alike(lane, tickets)
    return prepared


def _prepare_alike(lane: Lane, tickets: Sequence[Ticket]) -> list[Prepared]:
    first = tickets[0]
    inputs = [item for ticket in tickets for item in ticket.inputs]
    try:
        works = lane.preprocess(
            inputs,
            truncate=first.truncate,
            max_length=first.max_length,
            in_windows=first.model.task.reads_windows,
        )
    except BaseException as error:  # a panic of native code is no `Exception`, and would end no ticket
        if len(tickets) > 1:  # whose fault it is shows when each is alone
            return [prepared for ticket in tickets for prepared in _prepare_alike(lane, [ticket])]
        return [(lane, first, _told(error))]
    prepared: list[Prepared] = []
    start = 0
    for ticket in tickets:
        prepared.append((lane, ticket, works[start : start + len(ticket.inputs)]))
        start += len(ticket.inputs)
    return prepared


def _told(error: BaseException) -> Exception:
    if isinstance(error, ModelingError | InferenceError) and not isinstance(error, PreprocessorFailed):
        return error
    _log.error("preprocessing failed", exc_info=error, extra={"action": "preprocessing_failed"})
    return error if isinstance(error, PreprocessorFailed) else InferenceFailed("the input could not be preprocessed")


def _fail(burst: Sequence[Asked], error: Exception) -> None:
    for _, ticket in burst:
        ticket.fail(error)
