"""The queue in front of an engine: one owner (the event loop), one engine thread, one answer per entry.

Work-conserving: a batch is formed whenever the engine is free and anything waits. Every entry ends
exactly once, with a result or an error; a failing batch is split until only the culprit fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from modeling.errors import EngineFailed, NonFiniteOutput
from modeling.weights import FloatArray
from service.inference.errors import DeadlineExceeded, InferenceFailed, ModelNotReady
from service.metrics import ServingMetrics

_log = logging.getLogger("service.batching")
_WINDOW = 512
_RESTART_S = 0.5


class Work(Protocol):
    """What a queue needs to know of an input: its cost in tokens."""

    @property
    def length(self) -> int: ...


@dataclass(slots=True, eq=False)
class QueueEntry:
    """One input on its way. `deadline` is in `time.monotonic` seconds."""

    work: Any
    model: Any
    deadline: float
    future: asyncio.Future[EntryResult]
    enqueued_at: float = field(default_factory=time.monotonic)

    @property
    def length(self) -> int:
        return int(self.work.length)


@dataclass(frozen=True, slots=True)
class EntryResult:
    """`vector` is the engine's output row float32[width], `logits` the head's, if the model has one."""

    vector: FloatArray
    logits: FloatArray | None
    batch_rows: int
    queue_s: float
    inference_s: float
    engine: str


# Vectors float32[rows, width], logits per row where the model has a head, and the engine that ran each row.
Compute = Callable[[Sequence[QueueEntry]], tuple[FloatArray, list[FloatArray | None], list[str]]]


def pack(lengths: Sequence[int], *, max_tokens: int, max_rows: int) -> list[int]:
    """Positions of the entries for the next batch: the oldest (position 0) and those nearest to it in length.

    Padded tokens (longest × rows) stay within `max_tokens`, but for a single entry that exceeds it
    alone. The oldest is always in, so sorting by length starves nobody.
    """
    oldest = lengths[0]
    chosen, longest = [0], oldest
    for position in sorted(range(1, len(lengths)), key=lambda position: (abs(lengths[position] - oldest), position)):
        widest = max(longest, lengths[position])
        if len(chosen) >= max_rows:
            break
        if widest * (len(chosen) + 1) > max_tokens:
            continue
        chosen.append(position)
        longest = widest
    return sorted(chosen)


class DynamicBatcher:
    """Queue and thread of one engine. All methods are called on the event loop."""

    def __init__(
        self, name: tuple[str, str], compute: Compute, metrics: ServingMetrics, *, max_tokens: int, max_rows: int,
        max_delay_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.name = name
        self._compute = compute
        self._metrics = metrics
        self._max_tokens, self._max_rows, self._max_delay_s = max_tokens, max_rows, max_delay_s
        self._queue: list[QueueEntry] = []
        self._queued_tokens = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{name[0]}")
        self._seconds_per_token = 0.0
        self._running_since: float | None = None
        self._running_tokens = 0
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        metrics.start_engine(*name)

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name=f"batcher-{self.name[0]}")

    async def stop(self) -> None:
        """Fails what still waits, lets the run in progress end, then stops the thread."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail_waiting(ModelNotReady("the engine is shutting down", retry_after_s=1.0))
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        self._metrics.stop_engine(*self.name)

    def put(self, entry: QueueEntry) -> None:
        """Queues an entry; its future will be resolved. Raises `ModelNotReady` once stopped."""
        if self._is_closed:
            raise ModelNotReady("the engine is shutting down", retry_after_s=1.0)
        self._queue.append(entry)
        self._queued_tokens += entry.length
        self._show_queue()
        self._arrived.set()

    def predicted_wait_s(self) -> float:
        """How long a new entry would wait for the engine, by the tokens queued and the speed seen so far."""
        # The batch in progress counts as it is: taken for a full one, it would refuse small requests that wait 20 ms.
        left_s = max(0.0, self._running_tokens * self._seconds_per_token - self.busy_for_s())
        return self._queued_tokens * self._seconds_per_token + (left_s if self._queue else 0.0)

    def busy_for_s(self) -> float:
        """How long the run in progress has taken; 0 while idle. Health looks at it."""
        return 0.0 if self._running_since is None else time.monotonic() - self._running_since

    @property
    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on the engine's thread, between batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    # The loop

    async def _supervise(self) -> None:
        while True:
            try:
                await self._run()
            except Exception:
                # A bug in here must not leave callers waiting for ever (infinity#242).
                _log.exception("batcher failed, restarting", extra={"action": "batcher_restart"})
                self._fail_waiting(ModelNotReady("the engine's queue failed and restarts", retry_after_s=1.0))
                self._metrics.worker_restarts_total.labels(*self.name).inc()
                await asyncio.sleep(_RESTART_S)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            if self._max_delay_s and len(self._queue) < self._max_rows:
                await asyncio.sleep(self._max_delay_s)
            batch = self._take()
            if batch:
                await self._work_on(batch)

    def _take(self) -> list[QueueEntry]:
        """Drops what nobody waits for any more, then takes the next batch off the queue."""
        now = time.monotonic()
        alive = []
        for entry in self._queue:
            if entry.future.done():
                self._metrics.cancelled_total.labels(*entry.model.metric_labels, "queued").inc()
            elif entry.deadline <= now:
                entry.future.set_exception(DeadlineExceeded("the deadline passed while the request was queued"))
            else:
                alive.append(entry)
        positions = set()
        if alive:
            window = [entry.length for entry in alive[:_WINDOW]]
            positions = set(pack(window, max_tokens=self._max_tokens, max_rows=self._max_rows))
        self._queue = [entry for position, entry in enumerate(alive) if position not in positions]
        self._queued_tokens = sum(entry.length for entry in self._queue)
        self._show_queue()
        if not self._queue:
            self._arrived.clear()
        return [entry for position, entry in enumerate(alive) if position in positions]

    async def _work_on(self, batch: list[QueueEntry]) -> None:
        started = self._running_since = time.monotonic()
        self._running_tokens = sum(entry.length for entry in batch)
        loop = asyncio.get_running_loop()
        try:
            outcomes = await loop.run_in_executor(self._thread, self._compute_isolated, batch)
        except BaseException:
            for entry in batch:
                _fail(entry, ModelNotReady("the engine stopped", retry_after_s=1.0))
            raise
        finally:
            self._running_since, self._running_tokens = None, 0
        elapsed = time.monotonic() - started
        self._observe(batch, started, elapsed)
        for entry, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                _fail(entry, outcome)
                continue
            vector, logits, engine = outcome
            if entry.future.done():
                self._metrics.cancelled_total.labels(*entry.model.metric_labels, "running").inc()
            else:
                queued = started - entry.enqueued_at
                entry.future.set_result(EntryResult(vector, logits, len(batch), queued, elapsed, engine))

    def _compute_isolated(self, batch: Sequence[QueueEntry]) -> list[Any]:
        """On the engine's thread: one outcome per entry, `(vector, logits, engine)` or the error that it alone met."""
        try:
            vectors, logits, engines = self._compute(batch)
        except Exception as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                return self._compute_isolated(batch[:middle]) + self._compute_isolated(batch[middle:])
            if not isinstance(error, EngineFailed):
                _log.exception("inference failed", extra={"action": "inference_failed", "engine": self.name[1]})
            return [InferenceFailed("the engine failed for this input")]
        return [
            (vector, row_logits, engine)
            if np.isfinite(vector).all() and (row_logits is None or np.isfinite(row_logits).all())
            else InferenceFailed(str(NonFiniteOutput("the model gave values that are not finite for this input")))
            for vector, row_logits, engine in zip(vectors, logits, engines, strict=True)
        ]

    # Figures

    def _observe(self, batch: Sequence[QueueEntry], started: float, elapsed: float) -> None:
        tokens = sum(entry.length for entry in batch)
        padded = max(entry.length for entry in batch) * len(batch)
        per_token = elapsed / max(1, tokens)
        # Smoothed by tokens, so that a small or a cold batch, slow per token, does not pass for the engine's speed.
        share = min(0.5, tokens / (4 * self._max_tokens)) if self._seconds_per_token else 0.5
        self._seconds_per_token += share * (per_token - self._seconds_per_token)
        metrics, name = self._metrics, self.name
        metrics.batch_size.labels(*name).observe(len(batch))
        metrics.batch_tokens.labels(*name).observe(tokens)
        metrics.batch_padding_ratio.labels(*name).observe(1 - tokens / max(1, padded))
        metrics.inference_duration_seconds.labels(*name).observe(elapsed)
        for entry in batch:
            metrics.queue_duration_seconds.labels(*name).observe(started - entry.enqueued_at)

    def _show_queue(self) -> None:
        self._metrics.queue_requests.labels(*self.name).set(len(self._queue))
        self._metrics.queue_tokens.labels(*self.name).set(self._queued_tokens)

    def _fail_waiting(self, error: Exception) -> None:
        for entry in self._queue:
            _fail(entry, error)
        self._queue.clear()
        self._queued_tokens = 0
        self._show_queue()


def _fail(entry: QueueEntry, error: Exception) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
