"""Shows the pool the registry: whenever its epoch has moved, or when a request names what the pool does not know.

A database that is away changes nothing. What could not be loaded is the pool's to repeat, whatever the epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from model_registry.errors import DatabaseUnavailable
from model_registry.registry import Registry
from service.inference.model_pool import ModelPool

_log = logging.getLogger("service.registry_watcher")
_MAX_BACKOFF_S = 5.0
Seen = TypeVar("Seen")


class RegistryWatcher:
    def __init__(self, registry: Registry, pool: ModelPool, *, poll_s: float) -> None:
        self._registry, self._pool, self._poll_s = registry, pool, poll_s
        self._epoch = -1
        self._lock = asyncio.Lock()
        self._next_look: asyncio.Task[None] | None = None
        self._looked_at = -poll_s
        self.is_database_away = False  # at the last look

    async def refresh(self) -> None:
        """Shows the registry's present state before it returns. Raises `DatabaseUnavailable`."""
        async with self._lock:
            snapshot = await self._asked(self._registry.snapshot)
            self._pool.follow(snapshot)
            self._epoch = snapshot.epoch

    async def look(self) -> None:
        """Shows what changed until now, if the database can be read. All callers together look once in `poll_s`."""
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._look())
        await asyncio.shield(self._next_look)

    async def follow(self) -> None:
        """Polls until cancelled."""
        pause_s = self._poll_s
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._refresh_if_moved()
                pause_s = self._poll_s
            except DatabaseUnavailable as error:
                pause_s = min(_MAX_BACKOFF_S, pause_s * 2)
                _log.warning(f"registry unreachable: {error}", extra={"action": "registry_unreachable"})
            except Exception:
                pause_s = min(_MAX_BACKOFF_S, pause_s * 2)
                _log.exception("following the registry failed", extra={"action": "watcher_failed"})

    async def _look(self) -> None:
        await asyncio.sleep(self._looked_at + self._poll_s - time.monotonic())
        self._looked_at = time.monotonic()
        self._next_look = None  # who comes from here on may know of something newer than is read now
        with contextlib.suppress(DatabaseUnavailable):
            await self._refresh_if_moved()

    async def _refresh_if_moved(self) -> None:
        if await self._asked(self._registry.epoch) != self._epoch:
            await self.refresh()

    async def _asked(self, look: Callable[[], Seen]) -> Seen:
        """Raises `DatabaseUnavailable`, and remembers it for the probes."""
        try:
            seen = await asyncio.to_thread(look)
        except DatabaseUnavailable:
            self.is_database_away = True
            raise
        self.is_database_away = False
        return seen
