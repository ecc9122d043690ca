"""Time that passes only when everybody waits: an event loop, an engine's thread and a preprocessor pool on one clock.

What takes an hour there takes a second here, and comes out the same every time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any

from service.inference.engine_worker import Runtime


class _Selector(selectors.DefaultSelector):
    """Instead of waiting, moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everybody waits for something that never comes")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class VirtualThread:
    """An engine's thread that takes `seconds(work)` of the loop's time for each piece of work."""

    seconds: Callable[[Any], float] = staticmethod(lambda work: 0.0)

    def __init__(
        self,
        name: str,
        next_work: Callable[[Any], Any],
        execute: Callable[[Any], None],
        on_crash: Callable[[Any], None],
    ) -> None:
        self._next_work, self._execute, self._on_crash = next_work, execute, on_crash
        self.is_retired = False
        self.is_alive = False
        self._is_busy = False

    def start(self) -> None:
        self.is_alive = True
        self.wake()

    def wake(self) -> None:
        asyncio.get_running_loop().call_soon(self._step)

    def retire(self) -> None:
        self.is_retired = True
        self.wake()

    async def ended(self, timeout_s: float) -> None:
        until = asyncio.get_running_loop().time() + timeout_s
        while self._is_busy and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.001)

    def _step(self) -> None:
        if self._is_busy or not self.is_alive:
            return
        try:
            work = self._next_work(self)
        except Exception:
            self.is_alive = False
            self._on_crash(self)
            return
        if work is None:
            self.is_alive = not self.is_retired
            return
        self._is_busy = True
        asyncio.get_running_loop().call_later(self.seconds(work), self._end, work)

    def _end(self, work: Any) -> None:
        self._is_busy = False
        self._execute(work)
        self._step()


class VirtualPool(Executor):
    """Runs what is submitted, after `seconds(arguments)` of the loop's time; any number at once."""

    def __init__(self, seconds: Callable[..., float]) -> None:
        self._seconds = seconds

    def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)

        asyncio.get_running_loop().call_later(self._seconds(*arguments), run)
        return future


def virtual_runtime(
    engine_s: Callable[[Any], float] = lambda work: 0.0,
    preprocessor_s: Callable[..., float] = lambda *_: 0.0,
    loader_s: Callable[..., float] = lambda *_: 0.0,
) -> Runtime:
    """For use inside of `run_virtually`."""
    thread = type("Thread", (VirtualThread,), {"seconds": staticmethod(engine_s)})
    return Runtime(
        clock=asyncio.get_running_loop().time,
        engine_thread=thread,
        preprocessor_threads=lambda _: VirtualPool(preprocessor_s),
        loader_thread=lambda: VirtualPool(loader_s),
    )


async def elapse(seconds: float) -> None:
    """Lets virtual time pass. A real loop is refused, as this would wait."""
    assert isinstance(asyncio.get_running_loop(), VirtualLoop)
    await asyncio.sleep(seconds)


def run_virtually(scenario: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(scenario)
