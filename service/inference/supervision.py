"""Whether an engine is fit to serve, and how it becomes so again. On the event loop; knows no queue and no thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

_log = logging.getLogger("service.supervision")
_FAILED_BATCHES = 3
_MAX_PAUSE_S = 30.0


class EngineSupervisor:
    """`failure` says why the engine is unfit; None while it serves.

    When every row of several batches in a row has failed, `check` decides while the engine serves on: where it passes,
    the inputs were bad. Where it does not, or a run hangs inside the engine so that no check can enter, the engine is
    unfit, and `on_engine_failed` hears the reason; it may bring in another engine and call `resume`, at once or later.
    Until then `on_unfit` sends away those who wait, and the check is repeated now and then.
    """

    def __init__(
        self,
        *,
        check: Callable[[], Awaitable[None]],
        on_unfit: Callable[[], None],
        on_fit: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._check, self._on_unfit, self._on_fit, self._clock = check, on_unfit, on_fit, clock
        self.on_engine_failed: Callable[[str], None] = lambda reason: None
        self.failure: str | None = None
        self._failed_at = 0.0
        self.failed_in_a_row = 0
        self._blocking: set[object] = set()  # runs that hang inside the engine which is to serve
        self._suspicion: asyncio.Task[None] | None = None
        self._recovery: asyncio.Task[None] | None = None

    def unfit_for_s(self) -> float:
        """0 while it serves."""
        return 0.0 if self.failure is None else self._clock() - self._failed_at

    def batch_failed(self) -> None:
        """No row of a batch has a result. The worker sets `failed_in_a_row` back when one has."""
        self.failed_in_a_row += 1
        is_known = self.failure is not None or (self._suspicion is not None and not self._suspicion.done())
        if self.failed_in_a_row >= _FAILED_BATCHES and not is_known:
            reason = f"every row of {self.failed_in_a_row} batches in a row failed"
            self._suspicion = asyncio.create_task(self._look_into(reason))

    def hangs(self, work: object, reason: str) -> None:
        """`work` was given up while it ran; `returned` says should it come back after all."""
        self._blocking.add(work)
        self._fail(reason)

    def returned(self, work: object) -> None:
        """`work`, which had been given up, has come back."""
        self._blocking.discard(work)

    def resume(self) -> None:
        """Another engine has taken over, or this one has proven fit."""
        self.failed_in_a_row = 0
        if self.failure is None:
            return
        _log.info("the engine serves again", extra={"action": "engine_resumed"})
        self.failure = None
        self._blocking.clear()
        if self._recovery is not None and self._recovery is not asyncio.current_task():
            self._recovery.cancel()
            self._recovery = None
        self._on_fit()

    async def stop(self) -> None:
        tasks = [task for task in (self._suspicion, self._recovery) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_into(self, reason: str) -> None:
        """Others wait in the same queue as the bad inputs: until the check has failed, no request is sent away."""
        if await self._passes():
            self.failed_in_a_row = 0
        elif self.failure is None:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        _log.error(f"the engine is unfit: {reason}", extra={"action": "engine_unfit"})
        if self.failure is None:
            self._failed_at = self._clock()
        self.failure, self.failed_in_a_row = reason, 0
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        pause_s, is_told = 1.0, False
        while self.failure is not None:
            # While a hung run is still inside the engine, a second thread must not enter it.
            if not self._blocking and await self._passes():
                self.resume()
                return
            if not is_told:
                is_told = True
                self._tell(self.failure)
                if self.failure is None:
                    return
            self._on_unfit()
            await asyncio.sleep(pause_s)
            pause_s = min(_MAX_PAUSE_S, 2 * pause_s)

    def _tell(self, reason: str) -> None:
        try:
            self.on_engine_failed(reason)
        except Exception:
            _log.exception("the hook for a failed engine failed itself", extra={"action": "engine_unfit"})

    async def _passes(self) -> bool:
        try:
            await self._check()
        except Exception as error:
            _log.warning(f"the engine is unfit: {error}", extra={"action": "engine_unfit"})
            return False
        return True
