"""An engine at work: its thread takes batches from the queue, computes them and posts the results to the event loop.

Work-conserving: whenever the engine is free and anything waits, a batch runs. A batch that fails is halved until only
the culprit fails. A thread that hangs or dies is replaced. Every entry ends exactly once, with a result or an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from modeling.errors import EngineFailed, NonFiniteOutput
from modeling.weights import FloatArray
from service.inference.capacity import CostModel, Forecast, LoadModel
from service.inference.errors import InferenceFailed, ModelNotReady
from service.inference.queue import Batch, EntryQueue, Outcome, QueueEntry, Ticket
from service.inference.supervision import EngineSupervisor
from service.metrics import ServingMetrics

_log = logging.getLogger("service.engine_worker")
_LEAD_S, _LEAD_SHARE = 0.002, 0.1  # how long before the end of a run the next batch is chosen
_HUNG_FACTOR = 10  # a run is given up after this many times its prediction, and no sooner than the limit
_CALL_FACTOR = 10  # calls load and warm up: their limit is this many times that of a run
_RETRY_S = 5.0
_DEMAND_S = 1.0
_RESTART_S, _STOP_S = 0.5, 10.0

Result = TypeVar("Result")
Argument = TypeVar("Argument")


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`max_tokens` counts padding. A run that takes longer than `engine_timeout_s` is taken for hung."""

    max_tokens: int
    max_rows: int
    max_delay_s: float = 0.0
    engine_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Outputs:
    """Vectors float32[rows, width]; for each row whose model has a head scores float32[outputs], or float32[positions,
    outputs] if the model's task goes by states; and which rows are finite."""

    vectors: FloatArray
    scores: Sequence[FloatArray | None]
    is_finite: Sequence[bool]


class Computing(Protocol):
    """What batches are computed by. Both methods block and are called on the engine's thread."""

    @property
    def engine_name(self) -> str: ...

    def compute(self, entries: Sequence[QueueEntry]) -> Outputs: ...

    def check(self) -> None:
        """Computes something known to be good. Raises if the engine is not fit to serve."""


@dataclass(slots=True, eq=False)
class Call:
    """A function to run between batches. `error` is what it raised."""

    function: Callable[[], object]
    future: asyncio.Future[None]
    started_at: float = 0.0
    error: Exception | None = None


Work = Batch | Call
Record = Callable[[tuple[str, str], Batch], None]


class EngineThread:
    """Executes what `next_work` gives; sleeps until `wake` if that is nothing.

    An exception ends the thread and is reported by `on_crash`, on the thread. A thread that hangs cannot be stopped: it
    is retired, and ends if what it hangs in ever returns. It is a daemon, so it holds up no exit.
    """

    def __init__(
        self,
        name: str,
        next_work: Callable[[EngineThread], Work | None],
        execute: Callable[[Work], None],
        on_crash: Callable[[EngineThread], None],
    ) -> None:
        self._next_work, self._execute, self._on_crash = next_work, execute, on_crash
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self.is_retired = False

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._woken.set()

    def retire(self) -> None:
        """It takes no more work."""
        self.is_retired = True
        self._woken.set()

    async def ended(self, timeout_s: float) -> None:
        """Returns once the run in progress and with it the thread has ended, or the time is over."""
        if self.is_alive:
            await asyncio.to_thread(self._thread.join, timeout_s)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _main(self) -> None:
        try:
            while True:
                work = self._next_work(self)
                if work is not None:
                    self._execute(work)
                elif self.is_retired:
                    return
                else:
                    self._woken.wait()
                    self._woken.clear()
        except BaseException:
            self._on_crash(self)


def _preprocessor_threads(count: int) -> Executor:
    return ThreadPoolExecutor(count, thread_name_prefix="preprocessor")


def _loader_thread() -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="model-loader")


@dataclass(frozen=True, slots=True)
class Runtime:
    """Time and threads, as the hot path sees them: a simulation brings its own. `clock` counts as `time.monotonic`."""

    clock: Callable[[], float] = time.monotonic
    engine_thread: Callable[..., EngineThread] = EngineThread
    preprocessor_threads: Callable[[int], Executor] = _preprocessor_threads
    loader_thread: Callable[[], Executor] = _loader_thread


class EngineWorker:
    """One engine, its queue and its thread. All public methods are for the event loop.

    `name` is the backbone's label and the engine's name. What the engine's thread shares with the loop is guarded by
    `_lock`: the queue, the calls, and which work is in progress.
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
        self.load = LoadModel(CostModel(), limits.max_tokens)
        self._computing, self._limits, self._padded_width, self._record = computing, limits, padded_width, record
        self._clock, self._new_thread = runtime.clock, runtime.engine_thread
        self._queue = EntryQueue(self.load, max_rows=limits.max_rows)
        self._calls: deque[Call] = deque()
        self._lock = threading.Lock()
        self._current: Work | None = None
        self._is_idle = False
        self._given_up: set[Work] = set()
        self._thread = self._fresh_thread()
        self._is_closed = False
        self._watch: asyncio.Task[None] | None = None
        self._ahead: asyncio.TimerHandle | None = None
        self._delay: asyncio.TimerHandle | None = None
        self._batch_ended_at = -math.inf
        self.supervisor = EngineSupervisor(
            check=lambda: self._between_batches(computing.check),
            on_unfit=lambda: self._fail_waiting(self._unfit()),
            on_fit=self._wake,
            clock=runtime.clock,
        )
        self._metrics = metrics
        self._series = metrics.start_engine(*name)
        self._show_queue()

    # Life

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watch = asyncio.create_task(self._watch_over(), name=self.name[0])

    async def stop(self) -> None:
        """Fails what still waits, lets the run in progress end, then stops the thread."""
        self._is_closed = True
        await self.supervisor.stop()
        self._fail_waiting(self._unfit())
        for timer in (self._ahead, self._delay):
            if timer is not None:
                timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        self._thread.retire()
        await self._thread.ended(_STOP_S)
        left: list[Work] = [*self._calls] if self._current is None else [self._current, *self._calls]
        for work in left:
            self._give_up(work, self._unfit())
        self._metrics.stop_engine(*self.name)

    # For requests

    def forecast(self, tokens: int = 0) -> Forecast:
        """When `tokens` more would start and be done, by all that runs, waits or is being preprocessed, and by how much
        such forecasts have lately been wrong."""
        now = self._clock()
        return self.load.forecast(tokens, self._queue.tokens_ahead, running_s=self._running_s(now), now=now)

    def announce(self, ticket: Ticket) -> None:
        """Counts a request's estimated tokens until it is put or withdrawn. Raises `ModelNotReady` if the engine is
        stopped or unfit."""
        self._refuse_if_unfit()
        ticket.admitted_at = now = self._clock()
        ticket.forecast_s = self.load.start(self._queue.tokens_ahead, running_s=self._running_s(now)).latest_s
        self._queue.announce(ticket)

    def put(self, tickets: Sequence[Ticket]) -> None:
        """Queues the entries of preprocessed requests. Raises `ModelNotReady` if the engine is stopped or unfit."""
        self._refuse_if_unfit()
        queue, now = self._queue, self._clock()
        due_at = now + self.load.start(queue.tokens_ahead, running_s=self._running_s(now)).wait_s + self.load.window_s
        with self._lock:
            for ticket in tickets:
                queue.retract(ticket)
                ticket.enqueued_at = now
                for entry in ticket.entries:
                    entry.width, entry.due_at = self._padded_width(entry.length), due_at
                queue.add(ticket.entries)
        if self._limits.max_delay_s and self._is_idle and not queue.is_full:
            self._delay = self._delay or self._loop.call_later(self._limits.max_delay_s, self._wake)
        else:
            self._wake()

    def withdraw(self, ticket: Ticket) -> None:
        """Takes out what is left of a request that has ended or was abandoned: what has not begun is not computed."""
        self._queue.retract(ticket)
        if not ticket.missing:
            return
        with self._lock:
            left = [entry for entry in ticket.entries if self._queue.discard(entry)]
        for entry in left:
            entry.end()
        ticket.missing -= len(left)
        ticket.series.cancelled_queued.inc(len(left))

    # For the lane

    def calibrate(self, cost: CostModel, max_tokens: int) -> None:
        """From now on a batch costs `cost` and holds `max_tokens`, at most the limit that was set."""
        self.load.calibrate(cost, min(max_tokens, self._limits.max_tokens), now=self._clock())
        self._series.tokens_limit.set(self.load.max_tokens)

    async def call(self, function: Callable[[], Result]) -> Result:
        """Runs `function` on the engine's thread, before the next batch. Raises `ModelNotReady` if the engine is
        stopped or unfit."""
        results: list[Result] = []

        def run() -> None:
            if self.supervisor.failure is not None:  # a hung run may still be inside of the engine
                raise self._unfit()
            results.append(function())

        await self._between_batches(run)
        return results[0]

    async def exchange(self, install: Callable[[], None]) -> None:
        """Runs `install`, which brings in another engine and enters none, between batches, fit or unfit. The engine's
        series go on under the new name."""
        await self._between_batches(install)
        before, self.name = self.name, (self.name[0], self._computing.engine_name)
        self._series = self._metrics.change_engine(self.name[0], before[1], self.name[1])
        self._show_queue()
        self.supervisor.resume()

    @property
    def is_in_demand(self) -> bool:
        """Whether it has lately computed a batch."""
        return self._clock() - self._batch_ended_at < _DEMAND_S

    # For probes

    def busy_for_s(self) -> float:
        """How long the run in progress has taken; 0 while idle."""
        current = self._current
        return self._clock() - current.started_at if isinstance(current, Batch) else 0.0

    @property
    def is_alive(self) -> bool:
        """Whether its thread lives."""
        return self._watch is not None and not self._watch.done() and self._thread.is_alive

    @property
    def is_fit(self) -> bool:
        """Whether its thread lives and its engine is fit to serve."""
        return self.is_alive and self.supervisor.failure is None

    # On the engine's thread

    def _next_work(self, thread: EngineThread) -> Work | None:
        with self._lock:
            if thread is self._thread:
                self._current = None
            if thread.is_retired:
                return None
            work: Work | None = None
            if self._calls:
                work = self._calls.popleft()
            elif self.supervisor.failure is None:
                work = self._queue.next(self._clock())
            if work is not None:
                work.started_at = self._clock()
            self._current, self._is_idle = work, work is None
            return work

    def _execute(self, work: Work) -> None:
        if isinstance(work, Batch):
            work.engine = self._computing.engine_name
            work.outcomes = compute_or_halve(self._computing.compute, work.entries)
            work.seconds = self._clock() - work.started_at
        else:
            try:
                work.function()
            except Exception as error:
                work.error = error
        self._post(self._ended, work)

    def _crashed(self, thread: EngineThread) -> None:
        # A bug in here must not leave callers waiting for ever (infinity#242).
        _log.exception("an engine's thread failed, restarting", extra={"action": "worker_restart"})
        self._post(self._restart, thread)

    def _post(self, callback: Callable[[Argument], None], argument: Argument) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: no caller is left
            self._loop.call_soon_threadsafe(callback, argument)

    # On the event loop: work that has ended

    def _ended(self, work: Work) -> None:
        if work in self._given_up:
            self._given_up.discard(work)
            self.supervisor.returned(work)
        elif isinstance(work, Call):
            if work.error is not None:
                self._fail(work, work.error)
            elif not work.future.done():
                work.future.set_result(None)
        else:
            try:
                self._deliver(work)
            except Exception:
                _log.exception("results could not be delivered", extra={"action": "delivery_failed"})
                self._fail(work, ModelNotReady("the results were lost", retry_after_s=1.0))

    def _deliver(self, batch: Batch) -> None:
        rows, failed = len(batch.entries), 0
        for entry, outcome in zip(batch.entries, batch.outcomes, strict=True):
            entry.end()
            ticket = entry.ticket
            ticket.missing -= 1
            if isinstance(outcome, Exception):
                failed += 1
                ticket.fail(_named(entry, outcome))
                self.withdraw(ticket)
            elif ticket.is_over:
                ticket.series.cancelled_running.inc()
            else:
                entry.vector, entry.scores = outcome
                ticket.started_at, ticket.engine = batch.started_at, batch.engine
                ticket.inference_s = max(ticket.inference_s, batch.seconds)
                ticket.batch_rows = max(ticket.batch_rows, rows)
                if not ticket.missing:
                    ticket.future.set_result(None)
        self._batch_ended_at = self._clock()
        self._observe(batch, is_clean=not failed)
        if failed == rows:
            self.supervisor.batch_failed()
        else:
            self.supervisor.failed_in_a_row = 0
        if self._ahead is not None:  # it went by the run that has ended
            self._ahead.cancel()
            self._ahead = None
        self._choose_ahead()

    def _observe(self, batch: Batch, *, is_clean: bool) -> None:
        useful = sum([entry.length for entry in batch.entries])
        if is_clean:  # halving a batch makes it slow
            tickets, long_s = [entry.ticket for entry in batch.entries], self.load.long_wait_s
            self.load.observe(
                useful=useful,
                padded=batch.tokens,
                seconds=batch.seconds,
                is_saturated=batch.is_saturated,
                waits=[(batch.started_at - t.admitted_at, t.forecast_s) for t in tickets if t.forecast_s > long_s],
                now=self._batch_ended_at,
            )
        self._series.observe(
            rows=len(batch.entries),
            useful=useful,
            padded=batch.tokens,
            seconds=batch.seconds,
            waits_s=[batch.started_at - entry.ticket.enqueued_at for entry in batch.entries],
        )
        if self._record is not None:
            self._record(self.name, batch)

    def _fail(self, work: Work, error: Exception) -> None:
        if isinstance(work, Call):
            if not work.future.done():
                work.future.set_exception(error)
        else:
            _fail_entries(work.entries, error)

    def _fail_waiting(self, error: Exception) -> None:
        with self._lock:
            entries = self._queue.clear()
        _fail_entries(entries, error)

    # On the event loop: what the thread does next

    async def _between_batches(self, function: Callable[[], object]) -> None:
        """Runs `function` on the engine's thread. Raises `ModelNotReady` if the engine is stopped."""
        if self._is_closed:
            raise self._unfit()
        call = Call(function, self._loop.create_future())
        with self._lock:
            self._calls.append(call)
            self._wake_thread()
        await call.future

    def _wake(self) -> None:
        if self._delay is not None:
            self._delay.cancel()
            self._delay = None
        with self._lock:
            self._wake_thread()
        self._choose_ahead()

    def _wake_thread(self) -> None:
        """There is work. Under the lock."""
        if self._is_idle:
            self._is_idle = False
            self._thread.wake()

    def _choose_ahead(self) -> None:
        """Has a full batch chosen shortly before the run in progress ends.

        No sooner, because the more there is to choose from the less padding. A batch that would not be full is left to
        the thread, which forms it the moment it is free, so that requests can join until then.
        """
        current = self._current
        if self._ahead is None and isinstance(current, Batch) and not self._queue.is_chosen and self._queue.is_full:
            left_s = current.started_at + (1 - _LEAD_SHARE) * current.predicted_s - _LEAD_S - self._clock()
            self._ahead = self._loop.call_later(max(0.0, left_s), self._choose)

    def _choose(self) -> None:
        self._ahead = None
        with self._lock:
            if self._current is not None:
                self._queue.choose_ahead(self._clock())

    # On the event loop: a thread that hangs or dies

    async def _watch_over(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._limits.engine_timeout_s / 4))
            work = self._current
            if work is None or self._clock() - work.started_at <= self._allowed_s(work):
                continue
            with self._lock:
                if self._current is not work:
                    continue
                self._current = None
                self._thread.retire()
            self._series.restarts.inc()
            self.supervisor.hangs(work, f"a run has not ended for {self._clock() - work.started_at:.0f} s")
            self._give_up(work, self._unfit())
            self._replace_thread()

    def _allowed_s(self, work: Work) -> float:
        timeout_s = self._limits.engine_timeout_s
        return max(timeout_s, _HUNG_FACTOR * work.predicted_s) if isinstance(work, Batch) else _CALL_FACTOR * timeout_s

    def _give_up(self, work: Work, error: Exception) -> None:
        self._given_up.add(work)
        self._fail(work, error)

    def _restart(self, thread: EngineThread) -> None:
        if thread is not self._thread:
            return
        with self._lock:
            work, self._current = self._current, None
        error = ModelNotReady("the engine's queue failed and restarts", retry_after_s=1.0)
        if work is not None:
            self._give_up(work, error)
        self._series.restarts.inc()
        self._fail_waiting(error)
        self._loop.call_later(_RESTART_S, self._replace_thread)

    def _replace_thread(self) -> None:
        if not self._is_closed:
            self._thread = self._fresh_thread()
            self._thread.start()

    def _fresh_thread(self) -> EngineThread:
        return self._new_thread(f"engine-{self.name[0]}", self._next_work, self._execute, self._crashed)

    # Small things

    def _running_s(self, now: float) -> float:
        """How much longer the batch in progress should take."""
        current = self._current
        return max(0.0, current.started_at + current.predicted_s - now) if isinstance(current, Batch) else 0.0

    def _refuse_if_unfit(self) -> None:
        if self._is_closed or self.supervisor.failure is not None:
            raise self._unfit()

    def _unfit(self) -> ModelNotReady:
        if self._is_closed:
            return ModelNotReady("the engine is shutting down", retry_after_s=1.0)
        return ModelNotReady(
            f"the engine of {self.name[0]!r} is unhealthy and being checked; retry later", retry_after_s=_RETRY_S
        )

    def _show_queue(self) -> None:
        self._series.follow_queue(self._queue.__len__, lambda: self._queue.tokens)
        self._series.tokens_limit.set(self.load.max_tokens)


def compute_or_halve(
    compute: Callable[[Sequence[QueueEntry]], Outputs], entries: Sequence[QueueEntry]
) -> list[Outcome]:
    """One outcome per entry. A batch that fails is halved until only the culprit fails."""
    try:
        outputs = compute(entries)
    except Exception as error:
        if len(entries) > 1:
            middle = len(entries) // 2
            return compute_or_halve(compute, entries[:middle]) + compute_or_halve(compute, entries[middle:])
        if not isinstance(error, EngineFailed):
            _log.exception("inference failed", extra={"action": "inference_failed"})
        return [InferenceFailed("the engine failed for this input")]
    return [
        (vector, scores)
        if is_finite
        else InferenceFailed(str(NonFiniteOutput("the model gave values that are not finite for this input")))
        for vector, scores, is_finite in zip(outputs.vectors, outputs.scores, outputs.is_finite, strict=True)
    ]


def _fail_entries(entries: Sequence[QueueEntry], error: Exception) -> None:
    for entry in entries:
        if not entry.is_ended:
            entry.end()
            entry.ticket.missing -= 1
            entry.ticket.fail(error)


def _named(entry: QueueEntry, error: InferenceFailed) -> InferenceFailed:
    """Of several inputs, which one it was."""
    return error if len(entry.ticket.inputs) == 1 else InferenceFailed(f"input {entry.place}: {error}")
