"""Keeps an engine's thread at work, sees when a run hangs or the thread dies, and then brings in a fresh one.

Knows neither queue nor batch: work is whatever `take` gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from service.inference.engine_thread import EngineThread
from service.inference.errors import ModelNotReady
from service.inference.runtime import Runtime

_log = logging.getLogger("service.engine_worker")
_RESTART_S, _STOP_S = 0.5, 10.0
_CALL_FACTOR = 10  # calls load and warm up, so they get so many times the limit of a run


class Work(Protocol):
    """Something to run. It hangs when it takes longer than both `allowed_s` and the worker's limit."""

    started_at: float

    @property
    def allowed_s(self) -> float: ...

    def run(self) -> None:
        """On the engine's thread."""

    def deliver(self) -> None:
        """On the event loop, once it has run."""

    def fail(self, error: Exception) -> None:
        """On the event loop, instead of `deliver`: it was given up."""


class Takes(Protocol):
    """Where work comes from and who hears of faults."""

    def take(self) -> Work | None:
        """The next work. On the engine's thread, under the lock."""

    def hangs(self, work: Work, reason: str) -> Exception:
        """`work` was given up while it ran; a fresh thread comes next, and takes nothing that must not enter the engine
        meanwhile. What `work` fails with."""

    def returned(self, work: Work) -> None:
        """`work` that had been given up has come back."""

    def restarts(self, error: Exception) -> None:
        """The thread died by a fault of ours, and those who wait shall not."""


class EngineWorker:
    """One engine's thread. `lock` guards what `take` reads; all but `take` happens on the event loop."""

    def __init__(self, name: str, source: Takes, *, timeout_s: float, runtime: Runtime) -> None:
        self.name = name
        self._source, self._timeout_s = source, timeout_s
        self._clock, self._new_thread = runtime.clock, runtime.engine_thread
        self.lock = threading.Lock()
        self.current: Work | None = None
        self.is_idle = False
        self.is_closed = False
        self._calls: deque[_Call] = deque()
        self._given_up: set[Work] = set()
        self._watch: asyncio.Task[None] | None = None
        self._thread = self._fresh_thread()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watch = asyncio.create_task(self._watch_over(), name=self.name)

    async def stop(self) -> None:
        """Lets the run in progress end, then stops the thread. The owner has failed what waits."""
        self.is_closed = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        self._thread.retire()
        await self._thread.ended(_STOP_S)
        error = ModelNotReady("the engine is shutting down", retry_after_s=1.0)
        left = [*self._calls] if self.current is None else [self.current, *self._calls]
        for work in left:
            self._give_up(work, error)

    def wake(self) -> None:
        """There is something to take. Under the lock."""
        if self.is_idle:
            self.is_idle = False
            self._thread.wake()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on the engine's thread, before whatever else waits. Raises `ModelNotReady` once stopped."""
        if self.is_closed:
            raise ModelNotReady("the engine is shutting down", retry_after_s=1.0)
        call = _Call(function, self._loop.create_future(), _CALL_FACTOR * self._timeout_s)
        with self.lock:
            self._calls.append(call)
            self.wake()
        return await call.future

    @property
    def is_alive(self) -> bool:
        return self._watch is not None and not self._watch.done() and self._thread.is_alive

    # On the engine's thread

    def _next_work(self, thread: EngineThread) -> Work | None:
        with self.lock:
            if thread is self._thread:
                self.current = None
            if thread.is_retired:
                return None
            work: Work | None = self._calls.popleft() if self._calls else self._source.take()
            if work is not None:
                work.started_at = self._clock()
            self.current, self.is_idle = work, work is None
            return work

    def _execute(self, work: Work) -> None:
        work.run()
        self._post(self._ended, work)

    def _crashed(self, thread: EngineThread) -> None:
        # A bug in here must not leave callers waiting for ever (infinity#242).
        _log.exception("an engine's thread failed, restarting", extra={"action": "batcher_restart"})
        self._post(self._restart, thread)

    def _post(self, callback: Callable[[Any], None], argument: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback, argument)

    # On the event loop

    def _ended(self, work: Work) -> None:
        if work in self._given_up:
            self._given_up.discard(work)
            self._source.returned(work)
            return
        try:
            work.deliver()
        except Exception:
            _log.exception("results could not be delivered", extra={"action": "delivery_failed"})
            work.fail(ModelNotReady("the results were lost", retry_after_s=1.0))

    async def _watch_over(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
            work = self.current
            if work is None or self._clock() - work.started_at <= max(self._timeout_s, work.allowed_s):
                continue
            with self.lock:
                if self.current is not work:
                    continue
                self.current = None
                self._thread.retire()
            seconds = self._clock() - work.started_at
            self._give_up(work, self._source.hangs(work, f"a run has not ended for {seconds:.0f} s"))
            self._replace_thread()

    def _give_up(self, work: Work, error: Exception) -> None:
        self._given_up.add(work)
        work.fail(error)

    def _restart(self, thread: EngineThread) -> None:
        if thread is not self._thread:
            return
        with self.lock:
            work, self.current = self.current, None
        error = ModelNotReady("the engine's queue failed and restarts", retry_after_s=1.0)
        if work is not None:
            self._give_up(work, error)
        self._source.restarts(error)
        self._loop.call_later(_RESTART_S, self._replace_thread)

    def _replace_thread(self) -> None:
        if not self.is_closed:
            self._thread = self._fresh_thread()
            self._thread.start()

    def _fresh_thread(self) -> EngineThread:
        return self._new_thread(f"engine-{self.name}", self._next_work, self._execute, self._crashed)


@dataclass(slots=True, eq=False)
class _Call:
    """A function to run between batches."""

    function: Callable[[], Any]
    future: asyncio.Future[Any]
    allowed_s: float
    started_at: float = 0.0
    result: Any = None
    error: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self.function()
        except Exception as error:
            self.error = error

    def deliver(self) -> None:
        if self.error is not None:
            self.fail(self.error)
        elif not self.future.done():
            self.future.set_result(self.result)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
