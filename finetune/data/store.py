"""Dataset records in the metadata database. Knows the table `datasets`, not the files behind it."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa

from finetune.data.errors import DatasetInUse, DatasetNotFound
from finetune.data.records import ColumnReport, DatasetRecord, DatasetReport, DatasetStatus, FileFormat
from model_registry.db import Database, ids_among
from model_registry.removal import record
from model_registry.tables import datasets

_ID_ALPHABET = string.ascii_lowercase + string.digits
_UNFINISHED = (DatasetStatus.UPLOADED, DatasetStatus.VALIDATING)
_FILENAME_CHARACTERS = 255


def new_dataset_id() -> str:
    """`ds_` and 22 random characters (113 bits). Drawn before the upload, whose files go by it."""
    return "ds_" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(22))


class DatasetStore:
    """Creates, finds, moves through their states and deletes dataset records.

    A record deleted or of another tenant is as good as absent: `DatasetNotFound`. Every method may
    raise `model_registry.errors.DatabaseUnavailable`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant: str,
        *,
        filename: str,
        file_format: FileFormat,
        sha256: str,
        size_bytes: int,
        dataset_id: str | None = None,
    ) -> DatasetRecord:
        """A new record in state `uploaded`, for a file that is in the object store already."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            values = {
                "id": dataset_id or new_dataset_id(),
                "tenant": tenant,
                "filename": _storable(filename),
                "format": file_format,
                "status": DatasetStatus.UPLOADED.value,
                "sha256": sha256,
                "bytes": size_bytes,
                "created_at": now,
                "updated_at": now,
            }
            connection.execute(datasets.insert().values(values))
            return _found(connection, datasets.c.id == values["id"])

    def get(self, tenant: str, dataset_id: str) -> DatasetRecord:
        with self._database.read() as connection:
            return _found(connection, _of_tenant(tenant, dataset_id))

    def list(self, tenant: str, *, after: str | None = None, limit: int = 20) -> Sequence[DatasetRecord]:
        """Newest first, those behind the dataset `after`. Raises `DatasetNotFound` for an unknown `after`."""
        with self._database.read() as connection:
            query = datasets.select().where(datasets.c.tenant == tenant, datasets.c.deleted_at.is_(None))
            if after is not None:
                query = query.where(_behind(connection, tenant, after))
            query = query.order_by(datasets.c.created_at.desc(), datasets.c.id.desc()).limit(limit)
            return [_record(row) for row in connection.execute(query)]

    def set_validating(self, dataset_id: str) -> bool:
        """Marks the start of a check, the first or a repeated one. False: finished or deleted meanwhile."""
        return self._move(dataset_id, {"status": DatasetStatus.VALIDATING.value})

    def finish(self, dataset_id: str, report: DatasetReport, status: DatasetStatus) -> bool:
        """Stores the outcome of a check. False, and nothing is stored: finished or deleted meanwhile."""
        content = report.model_dump(mode="json")
        values = {"status": status.value, "rows": report.rows, "columns": content["columns"], "report": content}
        return self._move(dataset_id, values)

    def _move(self, dataset_id: str, values: dict[str, Any]) -> bool:
        with self._database.write() as connection:
            changed = connection.execute(
                datasets.update()
                .where(datasets.c.id == dataset_id, *_is_unfinished())
                .values(**values, updated_at=self._database.now(connection))
            )
            return changed.rowcount == 1

    def delete(
        self,
        tenant: str,
        dataset_id: str,
        *,
        needed_by: Callable[[sa.Connection, str], Sequence[str]] = lambda connection, dataset_id: (),
        actor: str = "",
        reason: str = "",
    ) -> None:
        """Hides the record and forgets what it says of the data; its id and its place in paging stay. A repeat is no
        error.

        `needed_by` names the jobs that need it; none can begin to meanwhile. Raises `DatasetNotFound`, `DatasetInUse`.
        """
        with self._database.write() as connection:
            condition = sa.and_(datasets.c.id == dataset_id, datasets.c.tenant == tenant)
            row = connection.execute(datasets.select().where(condition).with_for_update()).one_or_none()
            if row is None:
                raise DatasetNotFound(f"there is no dataset {dataset_id!r}")
            if row.deleted_at is not None:
                return
            if jobs := needed_by(connection, dataset_id):
                raise DatasetInUse(
                    f"{dataset_id} is needed by {', '.join(jobs)}; cancel them, or delete it when they have ended"
                )
            now = self._database.now(connection)
            values = {"deleted_at": now, "updated_at": now, "report": None, "columns": None, "filename": ""}
            connection.execute(datasets.update().where(condition).values(values))
            record(connection, tenant, "dataset", dataset_id, actor=actor, reason=reason, now=now)

    def unknown(self, dataset_ids: Collection[str]) -> set[str]:
        """Those of the given ids, of any tenant, that no dataset has which exists."""
        exists = sa.select(datasets.c.id).where(datasets.c.deleted_at.is_(None))
        with self._database.read() as connection:
            return set(dataset_ids) - ids_among(connection, exists, datasets.c.id, dataset_ids)

    def stale(self, older_than_s: float) -> Sequence[DatasetRecord]:
        """Records of all tenants whose check did not start or end in time, the oldest first."""
        with self._database.read() as connection:
            latest = self._database.now(connection) - older_than_s
            query = datasets.select().where(*_is_unfinished(), datasets.c.updated_at < latest)
            return [_record(row) for row in connection.execute(query.order_by(datasets.c.updated_at, datasets.c.id))]


def _of_tenant(tenant: str, dataset_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(datasets.c.id == dataset_id, datasets.c.tenant == tenant, datasets.c.deleted_at.is_(None))


def _is_unfinished() -> tuple[sa.ColumnElement[bool], ...]:
    return datasets.c.status.in_([status.value for status in _UNFINISHED]), datasets.c.deleted_at.is_(None)


def _behind(connection: sa.Connection, tenant: str, after: str) -> sa.ColumnElement[bool]:
    # A deleted record still marks its place, or deleting while paging would lose the page.
    query = sa.select(datasets.c.created_at).where(datasets.c.id == after, datasets.c.tenant == tenant)
    created_at = connection.execute(query).scalar_one_or_none()
    if created_at is None:
        raise DatasetNotFound(f"there is no dataset {after!r} to continue after")
    return sa.or_(
        datasets.c.created_at < created_at, sa.and_(datasets.c.created_at == created_at, datasets.c.id < after)
    )


def _found(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> DatasetRecord:
    row = connection.execute(datasets.select().where(condition)).one_or_none()
    if row is None:
        raise DatasetNotFound("there is no such dataset")
    return _record(row)


def _record(row: sa.Row[Any]) -> DatasetRecord:
    return DatasetRecord(
        id=row.id,
        tenant=row.tenant,
        filename=row.filename,
        format=row.format,
        status=DatasetStatus(row.status),
        sha256=row.sha256,
        bytes=row.bytes,
        rows=row.rows,
        columns=None if row.columns is None else [ColumnReport.model_validate(column) for column in row.columns],
        report=None if row.report is None else DatasetReport.model_validate(row.report),
        created_at=row.created_at,
        updated_at=row.updated_at,
        deleted_at=row.deleted_at,
    )


def _storable(filename: str) -> str:
    """The name without control characters, its end kept where it is too long, for the suffix is there."""
    printable = "".join(character if character.isprintable() else "?" for character in filename)
    return printable[-_FILENAME_CHARACTERS:]
