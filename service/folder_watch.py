"""Whether the data directory is there: looked at every second for the probes, and before whatever would write to it."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from model_registry.data_folder import DataFolder
from model_registry.errors import StoreUnavailable

_log = logging.getLogger("service.folder_watch")
_EVERY_S, _PATIENCE_S = 1.0, 3.0


class FolderWatch:
    """A look can hang with its volume, so one thread has all of them and nothing else."""

    def __init__(self, folder: DataFolder, *, patience_s: float = _PATIENCE_S) -> None:
        self._folder, self._patience_s = folder, patience_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data-folder")
        self._look: asyncio.Future[None] | None = None
        self.reason: str | None = None
        """Why it cannot be used; None while it can."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_EVERY_S)

    async def require(self) -> None:
        """Raises `StoreUnavailable` unless the directory is there now."""
        await self.look()
        if self.reason is not None:
            raise StoreUnavailable(self.reason)

    async def look(self) -> None:
        """Brings `reason` up to date. Callers who come during a look share its outcome."""
        if self._look is None:
            self._look = asyncio.get_running_loop().run_in_executor(self._thread, self._folder.check)
            self._look.add_done_callback(self._ended)
        done, _ = await asyncio.wait({self._look}, timeout=self._patience_s)
        if not done:
            self._show("the data directory does not answer")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ended(self, look: asyncio.Future[None]) -> None:
        self._look = None
        error = None if look.cancelled() else look.exception()
        if error is not None and not isinstance(error, StoreUnavailable):
            _log.error("the data directory could not be looked at", exc_info=error)
        self._show(None if error is None else str(error))

    def _show(self, reason: str | None) -> None:
        if reason == self.reason:
            return
        self.reason = reason
        if reason is None:
            _log.info("the data directory is back", extra={"action": "data_folder_back"})
        else:
            _log.error(f"{reason}: no uploads and no jobs until it is back", extra={"action": "data_folder_gone"})
