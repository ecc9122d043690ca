"""Shows the pool the registry: whenever its epoch has moved, or when a request names what the pool does not know.

A database that is away changes nothing. What could not be loaded is the pool's to repeat, whatever the epoch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from model_registry.errors import DatabaseUnavailable
from model_registry.registry import Registry
from service.inference.model_pool import ModelPool
from service.threads import on_database

_log = logging.getLogger("service.registry_watcher")
_MAX_BACKOFF_S = 5.0
Seen = TypeVar("Seen")
_LOOK_EVERY_S = 0.25


class RegistryWatcher:
    def __init__(self, registry: Registry, pool: ModelPool, *, poll_s: float) -> None:
        self._registry, self._pool, self._poll_s = registry, pool, poll_s
        self._epoch = -1
        self._lock = asyncio.Lock()
        self._next_look: asyncio.Task[bool] | None = None
        self._looked_at = -poll_s
        self.is_database_away = False  # at the last look

    async def refresh(self) -> None:
        """Shows the registry's present state before it returns. Raises `DatabaseUnavailable`."""
        async with self._lock:
            snapshot = await self._asked(self._registry.snapshot)
            self._pool.follow(snapshot)
            self._epoch = snapshot.epoch

    async def look(self) -> bool:
        """Shows what changed until now; False if the database cannot be read. All callers together look once in
        `poll_s`, or in a quarter of a second if that is sooner."""
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._look())
        return await asyncio.shield(self._next_look)

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

    async def _look(self) -> bool:
        await asyncio.sleep(self._looked_at + min(self._poll_s, _LOOK_EVERY_S) - time.monotonic())
        self._looked_at = time.monotonic()
        self._next_look = None  # who comes from here on may know of something newer than is read now
        try:
            await self._refresh_if_moved()
        except DatabaseUnavailable:
            return False
        return True

    async def _refresh_if_moved(self) -> None:
        if await self._asked(self._registry.epoch) != self._epoch:
            await self.refresh()

    async def _asked(self, look: Callable[[], Seen]) -> Seen:
        """Raises `DatabaseUnavailable`, and remembers it for the probes."""
        try:
            seen = await on_database(look)
        except DatabaseUnavailable:
            self.is_database_away = True
            raise
        self.is_database_away = False
        return seen
