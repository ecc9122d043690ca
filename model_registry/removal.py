"""How versions, models and aliases are deleted, on request or by a rule of retention.

In two steps, so that a crash in between loses nothing and leaves nothing that serves. One transaction hides a version
from everyone and writes down who deleted it; then its files go, and its row last. What a crash leaves of the second
step, `sweep` does again. Numbers are never given twice: the row of a model stays and goes on counting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from model_registry.db import Database
from model_registry.errors import ModelInUse, ModelNotFound, RegistryError, VersionInUse
from model_registry.manifest import MANIFEST_NAME, version_prefix
from model_registry.registry import DELETED, ModelVersion, Registry, of_model, of_version
from model_registry.store import ArtifactStore
from model_registry.tables import alias_history, aliases, chores, deletions, model_versions, models

_log = logging.getLogger("model_registry.removal")
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Deletion:
    """One row of the append-only record of what was deleted."""

    id: int
    kind: str  # model | version | job | dataset
    name: str
    version: int | None
    actor: str
    reason: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Keep:
    """Which ready versions a model keeps: those that either rule keeps; all of them without a rule."""

    versions: int | None = None
    """How many of the newest."""
    days: float | None = None
    """Those registered within this number of days."""

    def outdated(self, versions: Sequence[ModelVersion], *, needed: Collection[int], now: float) -> list[ModelVersion]:
        """Those of a model's ready `versions` that no rule keeps and that are not `needed`, the oldest first."""
        if self.versions is None and self.days is None:
            return []
        newest_first = sorted(versions, key=lambda version: -version.version)
        newest = {version.version for version in newest_first[: self.versions or 0]}
        oldest_kept = now - self.days * _DAY_S if self.days is not None else float("inf")
        return [
            version
            for version in reversed(newest_first)
            if version.version not in newest
            and version.version not in needed
            and (version.ready_at or version.created_at) < oldest_kept
        ]


class Removal:
    def __init__(self, database: Database, registry: Registry, store: ArtifactStore) -> None:
        self._database, self._registry, self._store = database, registry, store

    # On request. What was deleted before is no error; what never existed is.

    def delete_version(self, *, tenant: str, name: str, version: int, actor: str, reason: str) -> None:
        """Raises `ModelNotFound`, `VersionInUse`."""
        with self._database.write() as connection:
            model = self._registry.lock(connection, tenant, name, may_be_deleted=True)
            row = connection.execute(of_version(sa.select(model_versions), tenant, name, version)).first()
            if row is None or row.status == DELETED:
                if version > model.last_version:
                    raise ModelNotFound(f"{name} has no version {version}")
            else:
                needed_by = self._needs(connection, tenant, name, version)
                if needed_by:
                    fix = "Point the alias at another version or delete it, or wait for the job to end"
                    raise VersionInUse(f"{name}:{version}", needed_by, fix=fix)
                self._hide(connection, tenant, name, [version], actor=actor, reason=reason)
        self._clear([(tenant, name, version)])

    def delete_alias(
        self, *, tenant: str, name: str, alias: str, expected_version: int | None, actor: str, reason: str
    ) -> None:
        """`expected_version`, if given, is where the alias must point. Raises `ModelNotFound`, `AliasConflict`."""
        with self._database.write() as connection:
            self._registry.lock(connection, tenant, name, may_be_deleted=True)
            pointers = self._pointers(connection, tenant, name)
            if alias in pointers:
                if expected_version is not None:
                    self._registry.require_at(name, alias, pointers[alias], expected_version)
                self._drop_alias(connection, tenant, name, alias, pointers[alias], actor=actor, reason=reason)
                return
            known = of_model(sa.select(sa.func.count()), alias_history, tenant, name).where(
                alias_history.c.alias == alias
            )
            if not connection.execute(known).scalar_one():
                raise ModelNotFound(f"{name} has no alias {alias!r}")

    def delete_model(self, *, tenant: str, name: str, is_forced: bool, actor: str, reason: str) -> None:
        """All its versions and, if `is_forced`, its aliases. Raises `ModelNotFound`, `ModelInUse`."""
        with self._database.write() as connection:
            model = self._registry.lock(connection, tenant, name, may_be_deleted=True)
            if model.deleted_at is None:
                self._delete_model(connection, tenant, name, is_forced=is_forced, actor=actor, reason=reason)
            gone = connection.execute(of_model(_hidden(), model_versions, tenant, name)).all()
        self._clear([(row.tenant, row.name, row.version) for row in gone])

    def deletions(self, *, tenant: str, name: str, limit: int = 100) -> list[Deletion]:
        """What was deleted of a model, itself included, newest first."""
        columns = [column for column in deletions.c if column is not deletions.c.tenant]
        query = of_model(sa.select(*columns), deletions, tenant, name).where(deletions.c.kind.in_(["model", "version"]))
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(deletions.c.id.desc()).limit(limit))
            return [Deletion(**row._mapping) for row in rows]

    # By a rule, by one process at a time

    def take_turn(self, chore: str, *, every_s: float) -> bool:
        """Whether a chore of all processes is due, and this process's to do: one of them is told so in `every_s`."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            due = chores.update().where(chores.c.name == chore, chores.c.due_at <= now)
            return connection.execute(due.values(due_at=now + every_s)).rowcount == 1

    def retain(self, rule_of: Callable[[str, str], Keep], *, is_dry: bool = False) -> list[ModelVersion]:
        """Deletes what the rules do not keep, and returns it; `is_dry`: only says what that would be.

        What an alias points at, and what it would be rolled back to, is always kept.
        """
        with self._database.read() as connection:
            alive = sa.select(models.c.tenant, models.c.name).where(models.c.deleted_at.is_(None))
            names = connection.execute(alive).all()
        outdated = [
            version
            for tenant, name in names
            if (rule := rule_of(tenant, name)) != Keep()
            for version in self._retain(tenant, name, rule, is_dry=is_dry)
        ]
        if not is_dry:
            self._clear([(version.tenant, version.name, version.version) for version in outdated])
        return outdated

    def sweep(self, unfinished: Callable[[Collection[str]], Collection[str]]) -> None:
        """Removes files of versions that are deleted, or that were begun and can never become ready.

        `unfinished` tells which of some jobs may still register what they reserved.
        """
        self._abandon(unfinished)
        with self._database.read() as connection:
            gone = connection.execute(_hidden()).all()
        self._clear([(row.tenant, row.name, row.version) for row in gone])

    # Inside a transaction, under the model's lock

    def _delete_model(
        self, connection: sa.Connection, tenant: str, name: str, *, is_forced: bool, actor: str, reason: str
    ) -> None:
        pointers = self._pointers(connection, tenant, name)
        rows = connection.execute(of_model(sa.select(model_versions), model_versions, tenant, name)).all()
        needed_by = [] if is_forced else [_points(alias, version) for alias, version in sorted(pointers.items())]
        needed_by += [_registers(row) for row in rows if row.status == "reserved"]
        if needed_by:
            fix = "Repeat with force=true to delete its aliases too; what is being registered has to end first"
            raise ModelInUse(name, needed_by, fix=fix)
        for alias, version in pointers.items():
            self._drop_alias(connection, tenant, name, alias, version, actor=actor, reason=reason)
        left = [row.version for row in rows if row.status != DELETED]
        self._hide(connection, tenant, name, left, actor=actor, reason=reason)
        now = self._database.now(connection)
        connection.execute(of_model(models.update(), models, tenant, name).values(deleted_at=now))
        record(connection, tenant, "model", name, actor=actor, reason=reason, now=now)
        self._registry.bump(connection)

    def _retain(self, tenant: str, name: str, rule: Keep, *, is_dry: bool) -> list[ModelVersion]:
        with self._database.write() as connection:
            try:
                self._registry.lock(connection, tenant, name)
            except ModelNotFound:
                return []  # deleted meanwhile
            pointers = self._pointers(connection, tenant, name)
            trails = [self._registry.trail(connection, tenant, name, alias) for alias in pointers]
            needed = set(pointers.values()).union(*(trail[-2:] for trail in trails))
            ready = self._registry.ready(connection, tenant, name)
            outdated = rule.outdated(ready, needed=needed, now=self._database.now(connection))
            if outdated and not is_dry:
                kept = f"keep_versions={rule.versions}, keep_days={rule.days}"
                numbers = [version.version for version in outdated]
                self._hide(connection, tenant, name, numbers, actor="retention", reason=kept)
            return outdated

    def _needs(self, connection: sa.Connection, tenant: str, name: str, version: int) -> list[tuple[str, str]]:
        pointers = self._pointers(connection, tenant, name)
        needed_by = [_points(alias, number) for alias, number in sorted(pointers.items()) if number == version]
        row = connection.execute(of_version(sa.select(model_versions), tenant, name, version)).one()
        return [*needed_by, *([_registers(row)] if row.status == "reserved" else [])]

    def _pointers(self, connection: sa.Connection, tenant: str, name: str) -> dict[str, int]:
        return {
            row.alias: row.version for row in connection.execute(of_model(sa.select(aliases), aliases, tenant, name))
        }

    def _drop_alias(
        self, connection: sa.Connection, tenant: str, name: str, alias: str, version: int, *, actor: str, reason: str
    ) -> None:
        self._registry.point(
            connection,
            tenant,
            name,
            alias,
            version,
            None,
            action="delete",
            actor=actor,
            reason=reason,
            epoch=self._registry.bump(connection),
            now=self._database.now(connection),
        )

    def _hide(
        self, connection: sa.Connection, tenant: str, name: str, versions: Collection[int], *, actor: str, reason: str
    ) -> None:
        """From the commit on the versions are gone for everyone; their files are no one's."""
        hidden = of_model(model_versions.update(), model_versions, tenant, name)
        connection.execute(hidden.where(model_versions.c.version.in_(versions)).values(status=DELETED))
        now = self._database.now(connection)
        for version in versions:
            record(connection, tenant, "version", name, version=version, actor=actor, reason=reason, now=now)
        self._registry.bump(connection)

    def _abandon(self, unfinished: Callable[[Collection[str]], Collection[str]]) -> None:
        """Versions that were reserved and cannot become ready are abandoned at once, and hidden after a day: until then
        a run that lost its lease may still be writing files."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(model_versions).where(model_versions.c.status == "reserved")).all()
        alive = set(unfinished([row.job_id for row in rows if row.job_id is not None]))
        with self._database.write() as connection:
            before = self._database.now(connection) - _DAY_S
            for row in rows:
                if row.job_id not in alive if row.job_id is not None else row.created_at < before:
                    mine = of_version(model_versions.update(), row.tenant, row.name, row.version)
                    connection.execute(mine.where(model_versions.c.status == "reserved").values(status="abandoned"))
            old = (model_versions.c.status == "abandoned") & (model_versions.c.created_at < before)
            connection.execute(model_versions.update().where(old).values(status=DELETED))

    # Files

    def _clear(self, versions: Sequence[tuple[str, str, int]]) -> None:
        """Removes the files of hidden versions, then their rows. What cannot be removed now is the sweep's."""
        for tenant, name, version in versions:
            prefix = version_prefix(tenant, name, version)
            try:
                self._store.delete_tree(f"{prefix}/{MANIFEST_NAME}")  # what is left of a version is none
                self._store.delete_tree(prefix)
            except (OSError, RegistryError) as error:
                _log.warning(
                    f"files of {name}:{version} could not be removed, the sweep tries again: {type(error).__name__}",
                    extra={"action": "removal_put_off", "tenant": tenant},
                )
                continue
            hidden = of_version(model_versions.delete(), tenant, name, version)
            with self._database.write() as connection:
                connection.execute(hidden.where(model_versions.c.status == DELETED))
            _log.info(f"{name}:{version} is deleted", extra={"action": "version_deleted", "tenant": tenant})


def record(
    connection: sa.Connection,
    tenant: str,
    kind: str,
    name: str,
    *,
    actor: str,
    now: float,
    version: int | None = None,
    reason: str = "",
) -> None:
    """Writes down, in its transaction, that something was deleted and by whom."""
    row = {"tenant": tenant, "kind": kind, "name": name, "version": version, "created_at": now}
    connection.execute(deletions.insert().values(**row, actor=actor[:128], reason=reason[:1024]))


def was_deleted(connection: sa.Connection, tenant: str, kind: str, name: str) -> bool:
    """Whether there was such a thing once: a repeated delete is no error."""
    query = of_model(sa.select(deletions.c.id), deletions, tenant, name).where(deletions.c.kind == kind)
    return connection.execute(query.limit(1)).first() is not None


def _hidden() -> sa.Select[tuple[str, str, int]]:
    columns = model_versions.c
    return sa.select(columns.tenant, columns.name, columns.version).where(columns.status == DELETED)


def _points(alias: str, version: int) -> tuple[str, str]:
    return f"aliases.{alias}", f"the alias {alias} points at version {version}"


def _registers(row: sa.Row[tuple[object, ...]]) -> tuple[str, str]:
    what = "an import" if row.job_id is None else f"the job {row.job_id}"
    return f"versions.{row.version}", f"{what} is registering version {row.version}"
