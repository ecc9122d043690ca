"""Loads each version once, however many ask for it, and a version that failed not before its back-off is over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from model_registry.errors import ArtifactError, RegistryError
from model_registry.registry import ModelVersion
from modeling.errors import EngineFailed, ModelingError
from service.inference.aliases import Key
from service.inference.errors import InferenceError, MemoryBudgetExceeded, ModelNotReady

_log = logging.getLogger("service.loader")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the last of `attempts` loads in a row failed; from `retry_at`, by the loader's clock, the next may start."""

    error: Exception
    attempts: int
    retry_at: float

    @property
    def reason(self) -> str:
        return str(self.error)[:500]

    @property
    def is_lasting(self) -> bool:
        """Whether the version itself is the cause, so that only a change of its files or of settings can help."""
        cause = self.error.__cause__
        is_unread = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
        if is_unread or isinstance(self.error, EngineFailed):
            return False
        return isinstance(self.error, ArtifactError | ModelingError | MemoryBudgetExceeded)


class Loader:
    """On the event loop. `load` makes a version serve or raises; `on_end` is called after either."""

    def __init__(
        self,
        load: Callable[[Key, ModelVersion], Awaitable[None]],
        on_end: Callable[[], None],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._load, self._on_end, self._clock = load, on_end, clock
        self._loads: dict[Key, asyncio.Task[None]] = {}
        self._failures: dict[Key, Failure] = {}

    def start(self, key: Key, version: ModelVersion) -> asyncio.Task[None] | None:
        """The load of `key`, new or in progress, which never raises; None while the back-off is not over."""
        task = self._loads.get(key)
        if task is None and self.pause_s(key) <= 0:
            task = self._loads[key] = asyncio.create_task(self._run(key, version), name=f"load {key[1]}:{key[2]}")
        return task

    def failure(self, key: Key) -> Failure | None:
        return self._failures.get(key)

    def forget(self, key: Key) -> None:
        """The version is gone: why it could not be loaded no longer matters."""
        self._failures.pop(key, None)

    def is_loading(self, key: Key) -> bool:
        return key in self._loads

    def pause_s(self, key: Key) -> float:
        """Seconds until another load may start; 0 or less: now."""
        failure = self._failures.get(key)
        return 0.0 if failure is None else failure.retry_at - self._clock()

    def next_retry_s(self, keys: Collection[Key]) -> float | None:
        """Seconds until the first of those `keys` that wait for their back-off may be loaded."""
        return min(
            (self.pause_s(key) for key in keys if key in self._failures and key not in self._loads), default=None
        )

    async def idle(self) -> None:
        """Returns once no load is in progress."""
        while self._loads:
            await asyncio.wait(list(self._loads.values()))

    async def stop(self) -> None:
        for task in self._loads.values():
            task.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)

    async def _run(self, key: Key, version: ModelVersion) -> None:
        try:
            await self._load(key, version)
            self._failures.pop(key, None)
        except Exception as error:
            self._failures[key] = failure = self._failed(key, error)
            _log.warning(
                f"{key[1]}:{key[2]} could not be loaded, attempt {failure.attempts}: {failure.reason}",
                extra={"action": "load_failed"},
                exc_info=None if failure.error is error else error,
            )
        finally:
            del self._loads[key]
        self._on_end()

    def _failed(self, key: Key, error: Exception) -> Failure:
        before = self._failures.get(key)
        attempts = 1 if before is None else before.attempts + 1
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempts - 1, 16))
        if isinstance(error, ModelNotReady) and error.retry_after_s is not None:
            pause_s = error.retry_after_s  # an engine that is out of order says how soon to come back
        elif not isinstance(error, RegistryError | ModelingError | InferenceError):
            error = ModelNotReady(type(error).__name__, retry_after_s=pause_s)  # its text may hold paths of this host
        return Failure(error, attempts, self._clock() + pause_s)
