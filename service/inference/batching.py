"""The queue in front of an engine: put on the event loop, worked off by the engine's own thread.

Work-conserving: whenever the engine is free and anything waits, a batch runs. The thread takes its next batch by itself
and hands the results of the last one to the loop in one call. Every entry ends exactly once, with a result or an error.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service.inference.cost import CostModel, DrainRate, Forecast, Slippage
from service.inference.engine_worker import EngineWorker, Work
from service.inference.entries import BatchFacts, QueueEntry, Ticket
from service.inference.errors import InferenceFailed, ModelNotReady
from service.inference.isolation import Outcome, Outputs, compute_isolated
from service.inference.queue import WINDOW_BATCHES, EntryQueue
from service.inference.runtime import Runtime
from service.inference.supervision import EngineSupervisor
from service.metrics import ServingMetrics

_LEAD_S, _LEAD_SHARE = 0.002, 0.1  # the next batch stands ready so long before the run in progress should end
_STALE_S = 10.0  # a forecast that no batch has confirmed for so long refuses nobody while the engine is idle
_HUNG_FACTOR = 10  # a run is given up no sooner than after so many times its prediction
_RETRY_S = 5.0
_DEMAND_S = 1.0


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`max_tokens` counts padding. A run that takes longer than `engine_timeout_s` is taken for hung."""

    max_tokens: int
    max_rows: int
    max_delay_s: float = 0.0
    engine_timeout_s: float = 60.0


class Computing(Protocol):
    """What the queue is for. Both methods block and are called on the engine's thread."""

    @property
    def engine_name(self) -> str: ...

    def compute(self, entries: Sequence[QueueEntry]) -> Outputs: ...

    def check(self) -> None:
        """Computes something known to be good. Raises where the engine is not fit to serve."""


Record = Callable[[tuple[str, str], "Batch"], None]


class DynamicBatcher:
    """One engine's queue. All public methods are for the event loop.

    `max_tokens` and `cost` are a limit and a guess until `calibrate` puts what was measured in their place.
    """

    def __init__(
        self,
        name: tuple[str, str],
        computing: Computing,
        metrics: ServingMetrics,
        limits: BatchLimits,
        *,
        padded_width: Callable[[int], int] = lambda longest: longest,
        record: Record | None = None,
        runtime: Runtime = Runtime(),
    ) -> None:
        self.name = name
        self._computing, self._limits, self._padded_width, self._record = computing, limits, padded_width, record
        self._clock = runtime.clock
        self._metrics = metrics
        self._series = metrics.start_engine(*name)
        self._queue = EntryQueue()
        self._ready: list[QueueEntry] = []
        self._announced_tokens = 0
        self._worker = EngineWorker(name[0], self, timeout_s=limits.engine_timeout_s, runtime=runtime)
        self._lock = self._worker.lock
        self.supervisor = EngineSupervisor(
            check=lambda: self._worker.call(computing.check),
            on_unfit=lambda: self._fail_waiting(self._unfit()),
            on_fit=self._wake,
            clock=runtime.clock,
        )
        self._ahead: asyncio.TimerHandle | None = None
        self._delay: asyncio.TimerHandle | None = None
        self._series.follow_queue(self._queue.__len__, lambda: self._queue.tokens)
        self._slippage = Slippage()
        self.calibrate(CostModel(), limits.max_tokens)
        self._confirmed_at = self._batch_ended_at = -math.inf

    # Life

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    async def stop(self) -> None:
        """Fails what still waits, lets the run in progress end, then stops the thread."""
        self._worker.is_closed = True
        await self.supervisor.stop()
        self._fail_waiting(self._unfit())
        for timer in (self._ahead, self._delay):
            if timer is not None:
                timer.cancel()
        await self._worker.stop()
        self._metrics.stop_engine(*self.name)

    # For requests

    def forecast(self, tokens: int = 0) -> Forecast:
        """When `tokens` more would start and be done, by all that runs, waits or is being tokenised, and by how much
        such forecasts have lately been wrong."""
        start = self._forecast()
        if not start.latest_s and self._clock() - self._confirmed_at > _STALE_S:
            return start
        latest_s = start.latest_s * self._slippage.factor
        own_s = self._drain.seconds(tokens, self.cost) + self.cost.fixed_s
        return Forecast(start.wait_s, latest_s, done_s=latest_s + own_s)

    def _forecast(self) -> Forecast:
        """For nothing that would itself have to be computed, and by the cost model alone."""
        current, now = self._worker.current, self._clock()
        ahead = self._queue.tokens + self._announced_tokens + sum(entry.length for entry in self._ready)
        left_s = max(0.0, current.started_at + current.predicted_s - now) if isinstance(current, Batch) else 0.0
        ahead_s = self._drain.seconds(ahead, self.cost)
        latest_s = left_s + ahead_s + min(ahead_s, self._window_s())
        return Forecast(wait_s=left_s + ahead_s, latest_s=latest_s, done_s=latest_s)

    def announce(self, ticket: Ticket) -> None:
        """Counts a request's estimated tokens until it is put or withdrawn. Raises `ModelNotReady` where it cannot."""
        self._refuse_if_unfit()
        ticket.is_announced = True
        ticket.admitted_at, ticket.forecast_s = self._clock(), self._forecast().latest_s
        self._announced_tokens += ticket.tokens

    def put(self, tickets: Sequence[Ticket]) -> None:
        """Queues the entries of tokenised requests. Raises `ModelNotReady` once stopped or unfit."""
        now = self._clock()
        due_at = now + self._forecast().wait_s + self._window_s()
        for ticket in tickets:
            self._retract(ticket)
            ticket.enqueued_at = now
            for entry in ticket.entries:
                entry.width, entry.due_at = self._padded_width(entry.length), due_at
        with self._lock:
            self._refuse_if_unfit()
            for ticket in tickets:
                self._queue.add(ticket.entries)
        if self._limits.max_delay_s and self._worker.is_idle and not self._is_full():
            self._delay = self._delay or self._loop.call_later(self._limits.max_delay_s, self._wake)
        else:
            self._wake()

    def withdraw(self, ticket: Ticket) -> None:
        """Takes out what is left of a request that nobody waits for: what has not begun is not computed."""
        self._retract(ticket)
        if not ticket.missing:
            return
        with self._lock:
            left = [entry for entry in ticket.entries if self._queue.discard(entry) or self._unready(entry)]
        for entry in left:
            entry.end()
        ticket.missing -= len(left)
        self._metrics.of_model(ticket.model.metric_labels).cancelled_queued.inc(len(left))

    # For the lane

    def calibrate(self, cost: CostModel, max_tokens: int) -> None:
        """From now on a batch costs `cost` and holds `max_tokens`, at most the limit that was set."""
        self.cost = cost
        self.max_tokens = min(max_tokens, self._limits.max_tokens)
        self._drain = DrainRate(cost, self.max_tokens)
        self._confirmed_at = self._clock()
        self._series.tokens_limit.set(self.max_tokens)

    def engine_changed(self) -> None:
        """The engine's series go on under its new name."""
        before, self.name = self.name, (self.name[0], self._computing.engine_name)
        self._series = self._metrics.change_engine(self.name[0], before[1], self.name[1])
        self._series.follow_queue(self._queue.__len__, lambda: self._queue.tokens)
        self._series.tokens_limit.set(self.max_tokens)

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on the engine's thread, between batches. Raises `ModelNotReady` once stopped or unfit."""

        def run() -> Any:
            if self.supervisor.failure is not None:  # a hung run may still be inside of the engine
                raise self._unfit()
            return function()

        return await self._worker.call(run)

    async def exchange(self, install: Callable[[], None]) -> None:
        """Runs `install`, which brings in another engine and enters none, between batches, fit or unfit."""
        await self._worker.call(install)

    @property
    def is_in_demand(self) -> bool:
        """Whether it has lately computed a batch for somebody."""
        return self._clock() - self._batch_ended_at < _DEMAND_S

    # For probes

    def busy_for_s(self) -> float:
        """How long the run in progress has taken; 0 while idle."""
        current = self._worker.current
        return self._clock() - current.started_at if isinstance(current, Batch) else 0.0

    @property
    def is_alive(self) -> bool:
        """Whether its thread lives."""
        return self._worker.is_alive

    @property
    def is_fit(self) -> bool:
        """Whether, besides, its engine is fit to serve."""
        return self.is_alive and self.supervisor.failure is None

    # For the worker

    def take(self) -> Work | None:
        if self.supervisor.failure is not None:
            return None
        is_saturated = self._is_full() or bool(self._ready)
        entries, self._ready = self._ready or self._form(), []
        return Batch(self, entries, is_saturated=is_saturated) if entries else None

    def hangs(self, work: Work, reason: str) -> Exception:
        self._series.restarts.inc()
        self.supervisor.hangs(work, reason)
        return self._unfit()

    def returned(self, work: Work) -> None:
        self.supervisor.returned(work)

    def restarts(self, error: Exception) -> None:
        self._series.restarts.inc()
        self._fail_waiting(error)

    # A batch's way

    def compute(self, batch: Batch) -> list[Outcome]:
        """On the engine's thread."""
        batch.engine = self._computing.engine_name
        outcomes = compute_isolated(self._computing.compute, batch.entries)
        batch.seconds = self._clock() - batch.started_at
        return outcomes

    def deliver(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        facts = BatchFacts(len(batch.entries), batch.width, batch.started_at, batch.seconds, batch.engine)
        failed = 0
        for entry, outcome in zip(batch.entries, outcomes, strict=True):
            entry.end()
            ticket = entry.ticket
            ticket.missing -= 1
            if isinstance(outcome, Exception):
                failed += 1
                ticket.fail(_named(entry, outcome))
                self.withdraw(ticket)
            elif ticket.is_over:
                self._metrics.of_model(ticket.model.metric_labels).cancelled_running.inc()
            else:
                entry.vector, entry.scores = outcome
                entry.batch = facts
                if not ticket.missing:
                    ticket.future.set_result(None)
        self._batch_ended_at = self._clock()
        self._observe(batch, is_clean=not failed)
        self.supervisor.batch_ended(has_result=failed < len(outcomes))
        if self._ahead is not None:  # it went by the run that has ended
            self._ahead.cancel()
            self._ahead = None
        self._form_ahead()

    def fail(self, entries: Sequence[QueueEntry], error: Exception) -> None:
        for entry in entries:
            if not entry.is_ended:
                entry.end()
                entry.ticket.missing -= 1
                entry.ticket.fail(error)

    def _form(self) -> list[QueueEntry]:
        return self._queue.take(
            self._clock(),
            max_tokens=self.max_tokens,
            max_rows=self._limits.max_rows,
            fixed_tokens=self.cost.fixed_tokens,
        )

    def _form_ahead(self) -> None:
        """Sees to it that a full batch stands ready shortly before the run in progress ends.

        No sooner, because the more there is to choose from the less padding. A batch that would not be full is left to
        the thread, which forms it the moment it is free, so that whoever comes until then is still in it.
        """
        current = self._worker.current
        if self._ahead is None and isinstance(current, Batch) and not self._ready and self._is_full():
            left_s = current.started_at + (1 - _LEAD_SHARE) * current.predicted_s - _LEAD_S - self._clock()
            self._ahead = self._loop.call_later(max(0.0, left_s), self._prepare)

    def _prepare(self) -> None:
        self._ahead = None
        with self._lock:
            if not self._ready and self._worker.current is not None and self._is_full():
                self._ready = self._form()

    def _window_s(self) -> float:
        """How much later than in order of arrival an entry may start, so that batches fit better."""
        return WINDOW_BATCHES * self.cost.seconds(self.max_tokens)

    def _is_full(self) -> bool:
        """Whether as much waits as one batch holds."""
        return self._queue.tokens >= self.max_tokens or len(self._queue) >= self._limits.max_rows

    def _wake(self) -> None:
        if self._delay is not None:
            self._delay.cancel()
            self._delay = None
        with self._lock:
            self._worker.wake()
        self._form_ahead()

    def _unready(self, entry: QueueEntry) -> bool:
        if entry not in self._ready:
            return False
        self._ready.remove(entry)
        return True

    def _fail_waiting(self, error: Exception) -> None:
        with self._lock:
            entries, self._ready = self._ready + self._queue.clear(), []
        self.fail(entries, error)

    def _retract(self, ticket: Ticket) -> None:
        if ticket.is_announced:
            ticket.is_announced = False
            self._announced_tokens -= ticket.tokens

    def _refuse_if_unfit(self) -> None:
        if self._worker.is_closed or self.supervisor.failure is not None:
            raise self._unfit()

    def _unfit(self) -> ModelNotReady:
        if self._worker.is_closed:
            return ModelNotReady("the engine is shutting down", retry_after_s=1.0)
        return ModelNotReady(f"{self.name[0]} is out of order and being checked", retry_after_s=_RETRY_S)

    def _observe_waits(self, batch: Batch) -> None:
        """Of waits that were to be several batches long; a short one is a matter of chance."""
        floor_s = 4 * self.cost.seconds(self.max_tokens)
        tickets = [entry.ticket for entry in batch.entries if entry.ticket.forecast_s > floor_s]
        if tickets:
            slowest = max(tickets, key=lambda ticket: (batch.started_at - ticket.admitted_at) / ticket.forecast_s)
            self._slippage.observe(batch.started_at - slowest.admitted_at, slowest.forecast_s)

    def _observe(self, batch: Batch, *, is_clean: bool) -> None:
        useful = sum(entry.length for entry in batch.entries)
        if is_clean:  # halving a batch makes it slow
            self.cost.observe(batch.tokens, batch.seconds)
            self._confirmed_at = self._clock()
            self._observe_waits(batch)
            if batch.is_saturated:
                self._drain.observe(useful=useful, padded=batch.tokens, fixed_tokens=self.cost.fixed_tokens)
        self._series.observe(
            rows=len(batch.entries),
            useful=useful,
            padded=batch.tokens,
            seconds=batch.seconds,
            waits_s=[batch.started_at - entry.ticket.enqueued_at for entry in batch.entries],
        )
        if self._record is not None:
            self._record(self.name, batch)


def _named(entry: QueueEntry, error: InferenceFailed) -> InferenceFailed:
    """Of several inputs, which one it was."""
    entries = entry.ticket.entries
    return error if len(entries) == 1 else InferenceFailed(f"input {entries.index(entry)}: {error}")


class Batch:
    """Entries of one engine run, all padded to `width`. `is_saturated`: more waited than it could hold."""

    __slots__ = (
        "_batcher",
        "_outcomes",
        "engine",
        "entries",
        "is_saturated",
        "predicted_s",
        "seconds",
        "started_at",
        "width",
    )

    def __init__(self, batcher: DynamicBatcher, entries: list[QueueEntry], *, is_saturated: bool) -> None:
        self._batcher, self.entries, self.is_saturated = batcher, entries, is_saturated
        self.width = max(entry.width for entry in entries)
        self.predicted_s = batcher.cost.seconds(self.tokens)
        self.started_at = self.seconds = 0.0
        self.engine = ""

    @property
    def tokens(self) -> int:
        """Padding included."""
        return len(self.entries) * self.width

    @property
    def allowed_s(self) -> float:
        return _HUNG_FACTOR * self.predicted_s

    def run(self) -> None:
        self._outcomes = self._batcher.compute(self)

    def deliver(self) -> None:
        self._batcher.deliver(self, self._outcomes)

    def fail(self, error: Exception) -> None:
        self._batcher.fail(self.entries, error)
