"""From uploaded bytes to a checked dataset: file, record, check in a child process, report."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa

from finetune.data.check import check_upload
from finetune.data.errors import CheckGaveUp, DatasetCheckFailed, DatasetUnreadable
from finetune.data.readers import detect_format, unrecognised
from finetune.data.records import DatasetRecord, DatasetReport, DatasetStatus
from finetune.data.store import DatasetStore, new_dataset_id
from model_registry.errors import DatabaseUnavailable, StoreUnavailable
from model_registry.store import space_errors
from service.threads import on_database, on_disk, on_process

_log = logging.getLogger("service.dataset_intake")
RAW_FILE = "raw"
_INCOMING = ".incoming-"
_SWEEP_S = 60.0
_SMALL_BYTES, _SMALL_AT_ONCE = 8 << 20, 3
_SMALL_MEMORY_BYTES, _SMALL_TIMEOUT_S = 1 << 30, 60.0
_ABANDONED_S = 3600.0  # since the last byte of an upload arrived; servers that share the folder may be receiving


class DatasetIntake:
    """`root/<tenant>/<id>/` holds the upload as received (`raw`) and what the check made of it."""

    def __init__(self, store: DatasetStore, root: Path, *, timeout_s: float, memory_bytes: int) -> None:
        self._store, self._root = store, root
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._small, self._large = Turns(_SMALL_AT_ONCE), Turns(1)

    def staging(self) -> Path:
        """A fresh folder to receive an upload in, beside the datasets so that moving it is a rename. Raises
        `StoreUnavailable`, `StoreFull`."""
        folder = self._root / f"{_INCOMING}{secrets.token_hex(8)}"
        with space_errors("the upload"):
            folder.mkdir()  # never its parents: they are gone if the volume is
        return folder

    async def accept(self, tenant: str, staging: Path, *, filename: str, sha256: str, size_bytes: int) -> DatasetRecord:
        """Takes a received file over and begins its check. Raises `DatasetUnreadable` for an unknown format."""
        raw = staging / RAW_FILE
        file_format = detect_format(filename, await on_disk(_head, raw))
        if file_format is None:
            finding = unrecognised(filename, await on_disk(_head, raw))
            raise DatasetUnreadable(f"{finding.message}; {finding.fix}", findings=[finding])
        dataset_id = new_dataset_id()
        folder = self.folder(tenant, dataset_id)
        await on_disk(_take_over, staging, folder)
        try:
            record = await on_database(
                lambda: self._store.create(
                    tenant,
                    filename=filename,
                    file_format=file_format,
                    sha256=sha256,
                    size_bytes=size_bytes,
                    dataset_id=dataset_id,
                )
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._begin(record)
        return record

    async def settled(self, record: DatasetRecord, *, within_s: float) -> DatasetRecord:
        """The record once its check has ended, or as it is after `within_s`."""
        task = self._checks.get(record.id)
        if task is not None:
            await asyncio.wait({task}, timeout=within_s)
        return await on_database(self._store.get, record.tenant, record.id)

    def folder(self, tenant: str, dataset_id: str) -> Path:
        return self._root / tenant / dataset_id

    @contextlib.contextmanager
    def reading(self, tenant: str, dataset_ids: Collection[str]) -> Iterator[None]:
        """Files of these datasets are read. Raises `DatasetNotFound` if one was deleted meanwhile, `StoreUnavailable`
        if its files are gone otherwise."""
        try:
            yield
        except FileNotFoundError as error:
            for id_ in dataset_ids:
                self._store.get(tenant, id_)
            raise StoreUnavailable(f"rows of {', '.join(dataset_ids)} are not in the data directory") from error

    async def delete(
        self,
        tenant: str,
        dataset_id: str,
        *,
        needed_by: Callable[[sa.Connection, str], Sequence[str]],
        actor: str,
        reason: str,
    ) -> None:
        """The record first, then the files; the sweep removes what is left of them. Raises `DatasetNotFound`,
        `DatasetInUse`."""
        await on_database(
            lambda: self._store.delete(tenant, dataset_id, needed_by=needed_by, actor=actor, reason=reason)
        )
        await on_disk(shutil.rmtree, self.folder(tenant, dataset_id), True)

    async def sweep(self) -> None:
        """Until cancelled: begins the check again of datasets whose server died during it, and clears up after it."""
        while True:
            try:
                await on_disk(_remove_abandoned, self._root, older_than_s=_ABANDONED_S)
                await on_disk(_remove_unknown, self._root, self._store.unknown, older_than_s=_ABANDONED_S)
                for record in await on_database(self._store.stale, self._timeout_s + 30.0):
                    self._begin(record)
            except Exception as error:  # whatever it is, the next sweep may find it gone
                _log.warning(f"sweep put off: {error}", extra={"action": "sweep_failed"})
            await asyncio.sleep(_SWEEP_S)

    async def stop(self) -> None:
        for task in self._checks.values():
            task.cancel()
        await asyncio.gather(*self._checks.values(), return_exceptions=True)

    def _begin(self, record: DatasetRecord) -> None:
        if record.id not in self._checks:
            task = asyncio.create_task(self._check(record), name=f"check-{record.id}")
            self._checks[record.id] = task
            task.add_done_callback(lambda _: self._checks.pop(record.id, None))

    async def _check(self, record: DatasetRecord) -> None:
        try:
            report = await self._report(record)
            if report is not None:
                status = DatasetStatus.READY if report.is_valid else DatasetStatus.INVALID
                await on_database(self._store.finish, record.id, report, status)
        except (DatasetCheckFailed, DatabaseUnavailable) as error:
            # The machine's fault, not the file's: it stays `validating`, and the sweep tries again.
            _log.error(f"check of {record.id} failed: {error}", extra={"action": "check_failed"})
        except Exception:
            _log.exception(f"check of {record.id} failed", extra={"action": "check_failed"})

    async def _report(self, record: DatasetRecord) -> DatasetReport | None:
        """What the check finds, None if the record is gone. Small files do not wait for large ones; one that turns out
        to need more than a small one may take waits with those."""
        if record.bytes <= _SMALL_BYTES:
            with contextlib.suppress(CheckGaveUp):
                async with self._small.turn(record.bytes):
                    return await self._run_check(
                        record,
                        timeout_s=min(_SMALL_TIMEOUT_S, self._timeout_s),
                        memory_bytes=min(_SMALL_MEMORY_BYTES, self._memory_bytes),
                        is_last=False,
                    )
        async with self._large.turn(record.bytes):
            return await self._run_check(record, timeout_s=self._timeout_s, memory_bytes=self._memory_bytes)

    async def _run_check(
        self, record: DatasetRecord, *, timeout_s: float, memory_bytes: int, is_last: bool = True
    ) -> DatasetReport | None:
        if not await on_database(self._store.set_validating, record.id):
            return None
        folder = self.folder(record.tenant, record.id)
        return await on_process(
            lambda: check_upload(
                folder / RAW_FILE,
                record.format,
                folder,
                timeout_s=timeout_s,
                memory_bytes=memory_bytes,
                is_last=is_last,
            )
        )


class Turns:
    """Let a number of checks through at once; of those that wait the smallest is next."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def turn(self, size: int) -> AsyncIterator[None]:
        await self._take(size)
        try:
            yield
        finally:
            self._give()

    async def _take(self, size: int) -> None:
        if self._free:
            self._free -= 1
            return
        mine = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (size, next(self._numbers), mine))
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._give()  # it was given in the same moment
            raise

    def _give(self) -> None:
        while self._waiting:
            *_, following = heapq.heappop(self._waiting)
            if not following.done():
                return following.set_result(None)
        self._free += 1


def _head(path: Path) -> bytes:
    with space_errors("the upload"), path.open("rb") as file:
        return file.read(4096)


def _remove_abandoned(root: Path, *, older_than_s: float) -> None:
    """Removes uploads whose server died while it received them."""
    latest = time.time() - older_than_s
    for folder in root.glob(f"{_INCOMING}*"):
        # Either may vanish meanwhile: its upload has ended.
        with contextlib.suppress(FileNotFoundError):
            if max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < latest:
                shutil.rmtree(folder, ignore_errors=True)


def _remove_unknown(root: Path, unknown: Callable[[Collection[str]], set[str]], *, older_than_s: float) -> None:
    """Removes what a crash, or a check that still ran, left of deleted datasets. An upload that is being taken over has
    no record yet, so young folders stay."""
    latest = time.time() - older_than_s
    for tenant in root.iterdir() if root.is_dir() else ():
        if not tenant.is_dir() or tenant.name.startswith(_INCOMING):
            continue
        for dataset_id in unknown([folder.name for folder in tenant.iterdir()]):
            with contextlib.suppress(FileNotFoundError):
                if (tenant / dataset_id).stat().st_mtime < latest:
                    shutil.rmtree(tenant / dataset_id, ignore_errors=True)


def _take_over(staging: Path, folder: Path) -> None:
    with space_errors("the upload"):
        with (staging / RAW_FILE).open("rb") as file:
            os.fsync(file.fileno())
        folder.parent.mkdir(exist_ok=True)
        staging.rename(folder)
