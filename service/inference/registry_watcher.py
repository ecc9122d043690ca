"""Follows the registry: when its epoch moves, the pool gets a new snapshot. A database that is away changes nothing."""

from __future__ import annotations

import asyncio
import logging

from model_registry.errors import DatabaseUnavailable
from model_registry.registry import Registry
from service.inference.model_pool import ModelPool

_log = logging.getLogger("service.registry_watcher")
_MAX_BACKOFF_S = 5.0


class RegistryWatcher:
    def __init__(self, registry: Registry, pool: ModelPool, *, poll_s: float) -> None:
        self._registry, self._pool, self._poll_s = registry, pool, poll_s
        self._epoch = -1
        self._lock = asyncio.Lock()

    async def refresh(self) -> None:
        """Applies the registry's present state before it returns. Raises `DatabaseUnavailable`."""
        async with self._lock:
            snapshot = await asyncio.to_thread(self._registry.snapshot)
            await self._pool.apply(snapshot)
            self._epoch = snapshot.epoch

    async def follow(self) -> None:
        """Polls until cancelled."""
        pause_s = self._poll_s
        while True:
            await asyncio.sleep(pause_s)
            try:
                if await asyncio.to_thread(self._registry.epoch) != self._epoch:
                    await self.refresh()
                pause_s = self._poll_s
            except DatabaseUnavailable as error:
                pause_s = min(_MAX_BACKOFF_S, pause_s * 2)
                _log.warning(f"registry unreachable: {error}", extra={"action": "registry_unreachable"})
            except Exception:
                pause_s = min(_MAX_BACKOFF_S, pause_s * 2)
                _log.exception("following the registry failed", extra={"action": "watcher_failed"})
