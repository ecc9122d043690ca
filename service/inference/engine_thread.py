"""The thread that an engine runs on. It takes its work by itself, so that between two runs it waits for nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any


class EngineThread:
    """Does what `next_work` gives by `execute`; where that is nothing, sleeps until `wake`.

    What these raise ends the thread, and `on_crash` hears of it there. A thread that hangs cannot be stopped: it is
    retired, and ends on its own if what it hangs in ever returns. It is a daemon, so it holds up no exit.
    """

    def __init__(
        self,
        name: str,
        next_work: Callable[[EngineThread], Any],
        execute: Callable[[Any], None],
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
