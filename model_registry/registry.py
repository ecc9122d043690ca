"""Models, versions and aliases in the metadata database.

Knows states and who points where; opens no model. Methods that take a `connection` join their
caller's write transaction; the others open their own. Every change that a server must see bumps
the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from model_registry.db import Database
from model_registry.errors import AliasConflict, InvalidReference, ModelNotFound, VersionNotServable
from model_registry.manifest import ModelManifest, sha256_hex
from model_registry.refs import CHAMPION, ModelRef, check_name
from model_registry.tables import alias_history, aliases, model_versions, models, registry_state

DELETED = "deleted"
"""A version that is gone for everyone; its row goes when its files have."""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One row of `model_versions`."""

    tenant: str
    name: str
    version: int
    status: str
    kind: str
    method: str
    backbone: str | None
    backbone_digest: str | None
    job_id: str | None
    manifest_sha256: str | None
    labels: list[str] | None
    metrics: dict[str, float] | None
    bytes: int | None
    created_at: float
    ready_at: float | None
    task: str  # that of its name: all versions of a name have one


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    tenant: str
    name: str
    task: str
    created_at: float
    aliases: dict[str, int]
    versions: list[ModelVersion]


@dataclass(frozen=True, slots=True)
class AliasChange:
    """One row of the append-only history."""

    id: int
    name: str
    alias: str
    from_version: int | None
    to_version: int | None  # None: the alias was deleted
    action: str
    actor: str
    reason: str
    epoch: int
    created_at: float


@dataclass(frozen=True, slots=True)
class Promotion:
    """Whether a version becomes champion when it is registered: only in the place of `over`, the champion that it was
    compared with (None: there was none)."""

    is_wanted: bool
    over: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """What a server needs to know, as of one epoch."""

    epoch: int
    aliases: dict[tuple[str, str, str], int]  # (tenant, name, alias) -> version
    versions: dict[tuple[str, str, int], ModelVersion]  # ready versions only


class Registry:
    def __init__(self, database: Database) -> None:
        self._database = database

    def transaction(self) -> AbstractContextManager[sa.Connection]:
        """A write transaction for `reserve` and `publish`, where the caller has none of its own."""
        return self._database.write()

    # Writing a version

    def reserve(
        self,
        connection: sa.Connection,
        *,
        tenant: str,
        name: str,
        task: str,
        kind: str,
        method: str,
        job_id: str | None,
    ) -> int:
        """Takes the next version number of `name`. Earlier reservations of the same job are abandoned.

        Raises `InvalidReference` where the name's versions are for another task.
        """
        now = self._database.now(connection)
        check_name(name)
        row = self._model_to_fill(connection, tenant, name, task, now)
        version = int(row.last_version) + 1
        if row.task != task:
            self._take_task(connection, tenant, name, task)
        # A deleted name begins anew, and goes on counting: no number ever means two versions.
        reborn = {} if row.deleted_at is None else {"deleted_at": None, "created_at": now}
        connection.execute(of_model(models.update(), models, tenant, name).values(last_version=version, **reborn))
        if job_id is not None:
            self.abandon(connection, job_id=job_id)
        connection.execute(
            model_versions.insert().values(
                tenant=tenant,
                name=name,
                version=version,
                status="reserved",
                kind=kind,
                method=method,
                job_id=job_id,
                created_at=now,
            )
        )
        return version

    def _model_to_fill(self, connection: sa.Connection, tenant: str, name: str, task: str, now: float) -> sa.Row[Any]:
        """The model's row, locked; made if there is none, be it by another job at this very moment."""
        query = of_model(sa.select(models), models, tenant, name).with_for_update()
        row = connection.execute(query).first()
        if row is not None:
            return row
        values = {"tenant": tenant, "name": name, "task": task, "last_version": 0, "created_at": now}
        with suppress(sa.exc.IntegrityError), connection.begin_nested():
            connection.execute(models.insert().values(**values))
        return connection.execute(query).one()

    def abandon(self, connection: sa.Connection, *, job_id: str) -> None:
        """Gives up the numbers that a job has reserved and not filled."""
        mine = (model_versions.c.job_id == job_id) & (model_versions.c.status == "reserved")
        connection.execute(model_versions.update().where(mine).values(status="abandoned"))

    def abandon_version(self, *, tenant: str, name: str, version: int) -> None:
        """Gives up a reserved number that nothing will fill."""
        with self._database.write() as connection:
            mine = of_version(model_versions.update(), tenant, name, version)
            connection.execute(mine.where(model_versions.c.status == "reserved").values(status="abandoned"))

    def publish(
        self, connection: sa.Connection, manifest: ModelManifest, *, actor: str, promotion: Promotion | None = None
    ) -> bool:
        """Turns a reserved version `ready`; True if it became champion.

        Without a `promotion` the first version of a name does. The caller has stored the manifest already.
        Raises `VersionNotServable` where the version is not reserved, `InvalidReference` where the name's versions are
        for another task.
        """
        # The lock under which aliases move: what is read of them below stays true until the commit.
        self.lock(connection, manifest.tenant, manifest.name)
        row = self._row(connection, manifest.tenant, manifest.name, manifest.version)
        if row is None or row.status != "reserved":
            raise VersionNotServable(f"{manifest.name}:{manifest.version} is not reserved")
        if row.task != manifest.task:  # since it was reserved, another job took the name for its own
            self._take_task(connection, manifest.tenant, manifest.name, manifest.task)
        now = self._database.now(connection)
        connection.execute(
            of_version(model_versions.update(), manifest.tenant, manifest.name, manifest.version).values(
                status="ready",
                backbone=manifest.base.name if manifest.base else None,
                backbone_digest=manifest.base.digest if manifest.base else None,
                manifest_sha256=sha256_hex(manifest.to_bytes()),
                labels=list(manifest.labels),
                metrics=dict(manifest.metrics),
                bytes=sum(entry.size for entry in manifest.files),
                ready_at=now,
            )
        )
        epoch = self.bump(connection)
        champion = self._alias(connection, manifest.tenant, manifest.name, CHAMPION)
        wanted = promotion or Promotion(is_wanted=champion is None, over=None, reason="first version")
        is_promoted = wanted.is_wanted and wanted.over == champion
        if is_promoted:
            self.point(
                connection,
                manifest.tenant,
                manifest.name,
                CHAMPION,
                champion,
                manifest.version,
                action="publish",
                actor=actor,
                reason=wanted.reason,
                epoch=epoch,
                now=now,
            )
        return is_promoted

    def champion(self, tenant: str, name: str) -> ModelVersion | None:
        """The version that the alias `champion` points at now; None for a name without one."""
        with self._database.read() as connection:
            version = self._alias(connection, tenant, name, CHAMPION)
            return None if version is None else self._require_ready(connection, tenant, name, version)

    # Aliases

    def set_alias(
        self, *, tenant: str, name: str, alias: str, version: int, expected_version: int | None, actor: str, reason: str
    ) -> AliasChange:
        """Moves an alias if it still points at `expected_version` (None: it must not exist yet).

        Raises `AliasConflict`, `ModelNotFound`, `VersionNotServable`, `InvalidReference`.
        """
        check_alias(alias)
        with self._database.write() as connection:
            return self._move(
                connection, tenant, name, alias, version, expected_version, action="set", actor=actor, reason=reason
            )

    def rollback(self, *, tenant: str, name: str, alias: str, actor: str, reason: str) -> AliasChange:
        """Points the alias back to where it was before its last move that still holds.

        A rollback undoes one forward move; two in a row go two moves back, they do not swap to and fro.
        Raises `ModelNotFound` where there is nothing to go back to.
        """
        with self._database.write() as connection:
            trail = self.trail(connection, tenant, name, alias)
            if len(trail) < 2:
                raise ModelNotFound(f"{name}@{alias} has no earlier version to go back to")
            current, target = trail[-1], trail[-2]
            if self._row(connection, tenant, name, target) is None:
                raise ModelNotFound(
                    f"{name}@{alias} pointed at version {target} before, which was deleted; set the alias to another"
                )
            return self._move(
                connection, tenant, name, alias, target, current, action="rollback", actor=actor, reason=reason
            )

    def history(self, *, tenant: str, name: str, alias: str | None = None, limit: int = 100) -> list[AliasChange]:
        """Alias moves, newest first, of a deleted model too. Raises `ModelNotFound`."""
        with self._database.read() as connection:
            self._require_model(connection, tenant, name, may_be_deleted=True)
            query = of_model(sa.select(alias_history), alias_history, tenant, name)
            if alias is not None:
                query = query.where(alias_history.c.alias == alias)
            rows = connection.execute(query.order_by(alias_history.c.id.desc()).limit(limit))
            return [_change(row) for row in rows]

    # Looking up

    def check_task(self, *, tenant: str, name: str, task: str) -> None:
        """A name means one task, so that every request to it gets the same kind of answer. Raises
        `InvalidReference` where `name` has a version for another one."""
        with self._database.read() as connection:
            self._require_task(connection, tenant, name, task)

    def epoch(self) -> int:
        with self._database.read() as connection:
            return int(connection.execute(sa.select(registry_state.c.epoch)).scalar_one())

    def snapshot(self) -> RegistrySnapshot:
        """Aliases and ready versions of every tenant, in one consistent read."""
        with self._database.read() as connection:
            epoch = int(connection.execute(sa.select(registry_state.c.epoch)).scalar_one())
            pointers = connection.execute(sa.select(aliases)).all()
            ready = connection.execute(_with_task().where(model_versions.c.status == "ready")).all()
        return RegistrySnapshot(
            epoch=epoch,
            aliases={(row.tenant, row.name, row.alias): row.version for row in pointers},
            versions={(row.tenant, row.name, row.version): _version(row) for row in ready},
        )

    def resolve(self, tenant: str, ref: ModelRef) -> ModelVersion:
        """The ready version that `ref` means now. Raises `ModelNotFound`, `VersionNotServable`."""
        with self._database.read() as connection:
            self._require_model(connection, tenant, ref.name)
            version = ref.version
            if version is None:
                assert ref.alias is not None
                version = self._alias(connection, tenant, ref.name, ref.alias)
                if version is None:
                    raise ModelNotFound(f"{ref.name} has no alias {ref.alias!r}")
            return self._require_ready(connection, tenant, ref.name, version)

    def model(self, tenant: str, name: str) -> RegisteredModel:
        """Raises `ModelNotFound`."""
        found = self.models(tenant, name=name)
        if not found:
            raise ModelNotFound(f"there is no model {name!r}")
        return found[0]

    def models(self, tenant: str, *, name: str | None = None) -> list[RegisteredModel]:
        """All models of a tenant by name, each with its aliases and its versions, newest first."""
        with self._database.read() as connection:
            queries = ((sa.select(models), models), (sa.select(aliases), aliases), (_with_task(), model_versions))
            mine = [of_model(query, table, tenant, name) for query, table in queries]
            model_rows, alias_rows, version_rows = (connection.execute(query).all() for query in mine)
        model_rows = [row for row in model_rows if row.deleted_at is None]
        pointers: dict[str, dict[str, int]] = {row.name: {} for row in model_rows}
        versions: dict[str, list[ModelVersion]] = {row.name: [] for row in model_rows}
        for row in alias_rows:
            pointers[row.name][row.alias] = row.version
        for row in sorted(version_rows, key=lambda row: -row.version):
            if row.status != DELETED:
                versions[row.name].append(_version(row))
        return [
            RegisteredModel(tenant, row.name, row.task, row.created_at, pointers[row.name], versions[row.name])
            for row in sorted(model_rows, key=lambda row: row.name)
        ]

    # Inside a transaction

    def _move(
        self,
        connection: sa.Connection,
        tenant: str,
        name: str,
        alias: str,
        version: int,
        expected: int | None,
        *,
        action: str,
        actor: str,
        reason: str,
    ) -> AliasChange:
        # The model's row is the lock under which its aliases move.
        self.lock(connection, tenant, name)
        self._require_ready(connection, tenant, name, version)
        current = self._alias(connection, tenant, name, alias)
        self.require_at(name, alias, current, expected)
        now = self._database.now(connection)
        epoch = self.bump(connection)
        return self.point(
            connection,
            tenant,
            name,
            alias,
            current,
            version,
            action=action,
            actor=actor,
            reason=reason,
            epoch=epoch,
            now=now,
        )

    def require_at(self, name: str, alias: str, current: int | None, expected: int | None) -> None:
        """Raises `AliasConflict` if the alias points elsewhere than expected."""
        if current == expected:
            return
        state = "does not exist" if current is None else f"points at version {current}"
        raise AliasConflict(
            f"{name}@{alias} {state}, not at {expected}; read it again and repeat with expected_version={current}",
            current_version=current,
        )

    def point(
        self,
        connection: sa.Connection,
        tenant: str,
        name: str,
        alias: str,
        current: int | None,
        version: int | None,
        *,
        action: str,
        actor: str,
        reason: str,
        epoch: int,
        now: float,
    ) -> AliasChange:
        """Points the alias at `version`, or deletes it (None), and writes the move into the history."""
        values = {"version": version, "updated_at": now}
        if version is None:
            connection.execute(of_model(aliases.delete(), aliases, tenant, name).where(aliases.c.alias == alias))
        elif current is None:
            connection.execute(aliases.insert().values(tenant=tenant, name=name, alias=alias, **values))
        else:
            connection.execute(
                of_model(aliases.update(), aliases, tenant, name).where(aliases.c.alias == alias).values(**values)
            )
        row = connection.execute(
            alias_history.insert()
            .values(
                tenant=tenant,
                name=name,
                alias=alias,
                from_version=current,
                to_version=version,
                action=action,
                actor=actor[:128],
                reason=reason[:1024],
                epoch=epoch,
                created_at=now,
            )
            .returning(alias_history)
        ).one()
        return _change(row)

    def trail(self, connection: sa.Connection, tenant: str, name: str, alias: str) -> list[int]:
        """The versions an alias went through, oldest first, with rolled-back steps taken off again."""
        self.lock(connection, tenant, name)
        query = of_model(sa.select(alias_history), alias_history, tenant, name)
        rows = connection.execute(query.where(alias_history.c.alias == alias).order_by(alias_history.c.id)).all()
        trail: list[int] = []
        for row in rows:
            if row.action == "delete":
                trail.clear()
            elif row.action == "rollback":
                trail.pop()
            else:
                trail.append(row.to_version)
        return trail

    def bump(self, connection: sa.Connection) -> int:
        """Raises the epoch: every server looks again."""
        bumped = registry_state.update().values(epoch=registry_state.c.epoch + 1).returning(registry_state.c.epoch)
        return int(connection.execute(bumped).scalar_one())

    def ready(self, connection: sa.Connection, tenant: str, name: str) -> list[ModelVersion]:
        """A model's ready versions."""
        query = of_model(_with_task(), model_versions, tenant, name).where(model_versions.c.status == "ready")
        return [_version(row) for row in connection.execute(query)]

    def _alias(self, connection: sa.Connection, tenant: str, name: str, alias: str) -> int | None:
        query = of_model(sa.select(aliases.c.version), aliases, tenant, name).where(aliases.c.alias == alias)
        return connection.execute(query).scalar_one_or_none()

    def _row(self, connection: sa.Connection, tenant: str, name: str, version: int) -> sa.Row[Any] | None:
        """None for a version that is deleted, its files gone or not."""
        query = of_version(_with_task(), tenant, name, version).where(model_versions.c.status != DELETED)
        return connection.execute(query).first()

    def lock(self, connection: sa.Connection, tenant: str, name: str, *, may_be_deleted: bool = False) -> sa.Row[Any]:
        """The model's row, under whose lock its aliases move and its versions come and go. Raises `ModelNotFound`."""
        row = connection.execute(of_model(sa.select(models), models, tenant, name).with_for_update()).first()
        return _existing(row, name, may_be_deleted=may_be_deleted)

    def _require_model(
        self, connection: sa.Connection, tenant: str, name: str, *, may_be_deleted: bool = False
    ) -> None:
        row = connection.execute(of_model(sa.select(models), models, tenant, name)).first()
        _existing(row, name, may_be_deleted=may_be_deleted)

    def _require_task(self, connection: sa.Connection, tenant: str, name: str, task: str) -> None:
        query = of_model(_with_task(), model_versions, tenant, name)
        row = connection.execute(query.where(model_versions.c.status == "ready").limit(1)).first()
        if row is not None and row.task != task:
            raise InvalidReference(f"the versions of {name} are for {row.task}; register {task} under another name")

    def _take_task(self, connection: sa.Connection, tenant: str, name: str, task: str) -> None:
        """The name means `task` from now on, as long as no version of it is ready. Under the model's row lock."""
        self._require_task(connection, tenant, name, task)
        connection.execute(of_model(models.update(), models, tenant, name).values(task=task))

    def _require_ready(self, connection: sa.Connection, tenant: str, name: str, version: int) -> ModelVersion:
        row = self._row(connection, tenant, name, version)
        if row is None:
            raise ModelNotFound(f"{name} has no version {version}")
        if row.status != "ready":
            raise VersionNotServable(f"{name}:{version} is {row.status}, only a ready version can be served")
        return _version(row)


def _existing(row: sa.Row[Any] | None, name: str, *, may_be_deleted: bool) -> sa.Row[Any]:
    """Raises `ModelNotFound`. The row of a deleted model stays: it keeps the numbers that were given."""
    if row is None or not (may_be_deleted or row.deleted_at is None):
        raise ModelNotFound(f"there is no model {name[:70]!r}")
    return row


def check_alias(alias: str) -> str:
    """Raises `InvalidReference`: `latest` would change its meaning with every registration, so it is never stored."""
    if alias == "latest":
        raise InvalidReference("'latest' is not an alias that can be set; use champion or a name of your own")
    return check_name(alias, what="alias")


def of_model(query: Any, table: sa.Table, tenant: str, name: str | None) -> Any:
    """Rows of one model, or of all of the tenant's without a `name`."""
    query = query.where(table.c.tenant == tenant)
    return query if name is None else query.where(table.c.name == name)


def of_version(query: Any, tenant: str, name: str, version: int) -> Any:
    return of_model(query, model_versions, tenant, name).where(model_versions.c.version == version)


def _with_task() -> sa.Select[Any]:
    """Rows of `model_versions` with the task of their name."""
    is_same = sa.and_(models.c.tenant == model_versions.c.tenant, models.c.name == model_versions.c.name)
    return sa.select(model_versions, models.c.task).join(models, is_same)


def _version(row: Any) -> ModelVersion:
    return ModelVersion(**row._mapping)


def _change(row: Any) -> AliasChange:
    values: dict[str, Any] = dict(row._mapping)
    values.pop("tenant")
    return AliasChange(**values)


__all__: Sequence[str] = (
    "AliasChange",
    "ModelVersion",
    "Promotion",
    "RegisteredModel",
    "Registry",
    "RegistrySnapshot",
    "check_alias",
)
