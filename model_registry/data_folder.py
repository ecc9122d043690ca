"""The data directory, and whether it is still the one that the process began with.

A volume that is not mounted leaves an empty directory behind, and what is written there is gone when the volume comes
back. So the directory has an id in a marker file, which the database remembers: a directory without it is refused at
start, and what would be written is refused while it is away.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from pathlib import Path

import sqlalchemy as sa

from model_registry.db import Database
from model_registry.errors import StoreUnavailable
from model_registry.manifest import MANIFEST_NAME, version_prefix
from model_registry.store import sync_folder
from model_registry.tables import datasets, model_versions, registry_state

MARKER = "polyhead.id"
_ID = re.compile(r"[0-9a-f]{32}")
_LOOKED_AT = 20  # versions and datasets, the newest, of which one at least must be there


class DataFolder:
    def __init__(self, root: Path, id_: str) -> None:
        self.root, self._id = root, id_

    @classmethod
    def open(cls, root: Path, database: Database) -> DataFolder:
        """The directory that belongs to `database`; one that has no id yet gets one, and its folders, if it is new or
        holds what the database knows of. Several processes may do so at once.

        Raises `StoreUnavailable` that says how to proceed.
        """
        with database.write() as connection:
            query = sa.select(registry_state.c.data_id).with_for_update()
            remembered = connection.execute(query).scalar_one()
            marker = _read(root)
            if marker is None:
                _refuse_foreign(root, connection, remembered)
                marker = remembered or secrets.token_hex(16)
                root.mkdir(parents=True, exist_ok=True)
                _write(root, marker)
            if remembered is None:
                connection.execute(registry_state.update().values(data_id=marker))
            elif remembered != marker:
                raise StoreUnavailable(
                    f"the data directory {root} belongs to another database: its {MARKER} says {marker}, this database "
                    f"remembers {remembered}. Set data_dir and database_url to a pair; or, if these two are to belong "
                    f"together from now on, run: echo {remembered} > {root / MARKER}"
                )
        for name in ("store", "datasets"):
            (root / name).mkdir(exist_ok=True)
        return cls(root, marker)

    def check(self) -> None:
        """Raises `StoreUnavailable` if the directory is gone or is not the one that was opened."""
        try:
            found = _read(self.root)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, type(error).__name__)
            raise StoreUnavailable(f"the data directory cannot be read ({name})") from error
        if found is None:
            raise StoreUnavailable("the data directory is missing, or its volume is not mounted")
        if found != self._id:
            raise StoreUnavailable("the data directory is not the one that this process began with")


def _read(root: Path) -> str | None:
    """The id in the marker; None without one."""
    try:
        text = (root / MARKER).read_text("ascii", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not _ID.fullmatch(text):
        raise StoreUnavailable(f"{MARKER} of the data directory holds no id of 32 hex digits; restore it from a backup")
    return text


def _write(root: Path, id_: str) -> None:
    temporary = root / f".{MARKER}.{secrets.token_hex(6)}.tmp"
    try:
        with temporary.open("x") as file:
            file.write(f"{id_}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(root / MARKER)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(root)


def _refuse_foreign(root: Path, connection: sa.Connection, remembered: str | None) -> None:
    """A directory without a marker is new, was made by an earlier release, or came from a backup; unless the database
    knows of things and none of them is there."""
    versions = sa.select(model_versions).where(model_versions.c.status == "ready")
    newest = connection.execute(versions.order_by(model_versions.c.ready_at.desc()).limit(_LOOKED_AT)).all()
    uploads = sa.select(datasets.c.tenant, datasets.c.id).where(datasets.c.deleted_at.is_(None))
    latest = connection.execute(uploads.order_by(datasets.c.created_at.desc()).limit(_LOOKED_AT)).all()
    expected = [root / "store" / version_prefix(row.tenant, row.name, row.version) / MANIFEST_NAME for row in newest]
    expected += [root / "datasets" / row.tenant / row.id for row in latest]
    if not expected or any(path.exists() for path in expected):
        return
    id_ = remembered or secrets.token_hex(16)
    raise StoreUnavailable(
        f"the data directory {root} is not the one that belongs to the database: it has no {MARKER}, and none of the "
        f"{len(newest)} newest versions and {len(latest)} newest datasets. Mount its volume, or set data_dir. To give "
        f"up all that was stored and go on with this directory, run: mkdir -p {root}; echo {id_} > {root / MARKER}"
    )
