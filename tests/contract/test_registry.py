"""The registry over SQLite and PostgreSQL: versions, aliases by compare-and-swap, append-only history."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from model_registry.db import Database
from model_registry.errors import (
    AliasConflict,
    DatabaseUnavailable,
    InvalidReference,
    ModelNotFound,
    VersionNotServable,
)
from model_registry.manifest import ModelManifest
from model_registry.migrations import migrate
from model_registry.refs import ModelRef
from model_registry.registry import Promotion, Registry
from model_registry.tables import alias_history, metadata


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)


def publish(
    registry: Registry, name: str = "m", *, tenant: str = "default", promote: bool = False, job_id: str | None = None
) -> int:
    standing = registry.champion(tenant, name)
    over = None if standing is None else standing.version
    promotion = Promotion(is_wanted=True, over=over, reason="promoted at registration") if promote else None
    with registry.transaction() as connection:
        version = registry.reserve(
            connection,
            tenant=tenant,
            name=name,
            task="text-classification",
            kind="head",
            method="linear_probe",
            job_id=job_id,
        )
        manifest = ModelManifest(
            tenant=tenant,
            name=name,
            version=version,
            kind="head",
            method="linear_probe",
            labels=("a", "b"),
            created_at=0.0,
            job_id=job_id,
            files=(),
        )
        registry.publish(connection, manifest, actor="test", promotion=promotion)
    return version


def test_a_name_stands_for_one_task_once_a_version_is_ready(registry: Registry) -> None:
    def reserve(task: str) -> int:
        with registry.transaction() as connection:
            return registry.reserve(
                connection, tenant="default", name="m", task=task, kind="head", method="x", job_id=None
            )

    def publish_as(version: int, task: str) -> None:
        manifest = ModelManifest(
            tenant="default",
            name="m",
            version=version,
            kind="head",
            task=task,
            method="x",
            labels=() if task == "text-regression" else ("a",),
            created_at=0.0,
            files=(),
        )
        with registry.transaction() as connection:
            registry.publish(connection, manifest, actor="test")

    first, second, third = reserve("text-multi-label"), reserve("text-regression"), reserve("text-regression")
    registry.check_task(tenant="default", name="m", task="text-classification")  # nothing is ready yet
    publish_as(second, "text-regression")
    assert registry.model("default", "m").task == "text-regression"
    for refused in (lambda: reserve("text-multi-label"), lambda: publish_as(first, "text-multi-label")):
        with pytest.raises(InvalidReference, match="text-regression"):
            refused()
    with pytest.raises(InvalidReference, match="another name"):
        registry.check_task(tenant="default", name="m", task="text-classification")
    publish_as(third, "text-regression")
    versions = registry.snapshot().versions
    assert {key[2]: found.task for key, found in versions.items()} == dict.fromkeys((second, third), "text-regression")
    assert registry.resolve("default", ModelRef("m")).task == "text-regression"


def test_the_first_version_that_is_ready_says_the_task(registry: Registry) -> None:
    with registry.transaction() as connection:
        take = {"tenant": "default", "name": "m", "kind": "head", "method": "x", "job_id": None}
        version = registry.reserve(connection, task="text-multi-label", **take)  # type: ignore[arg-type]
        registry.reserve(connection, task="text-regression", **take)  # type: ignore[arg-type]
        manifest = ModelManifest(
            tenant="default",
            name="m",
            version=version,
            kind="head",
            task="text-multi-label",
            method="x",
            labels=("a",),
            created_at=0.0,
            files=(),
        )
        registry.publish(connection, manifest, actor="test")
    assert registry.model("default", "m").task == "text-multi-label"


def champion(registry: Registry, name: str = "m", tenant: str = "default") -> int:
    return registry.resolve(tenant, ModelRef(name)).version


def move(registry: Registry, version: int, expected: int | None, alias: str = "champion") -> Any:
    return registry.set_alias(
        tenant="default", name="m", alias=alias, version=version, expected_version=expected, actor="ann", reason="why"
    )


def test_migrations_give_the_declared_tables(database: Database) -> None:
    migrate(database)  # a second time changes nothing
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_the_first_version_is_champion_and_later_ones_wait(registry: Registry) -> None:
    assert [publish(registry), publish(registry)] == [1, 2]
    assert champion(registry) == 1
    publish(registry, promote=True)
    assert champion(registry) == 3


def test_a_reserved_version_is_not_served(registry: Registry) -> None:
    publish(registry)
    with registry.transaction() as connection:
        version = registry.reserve(
            connection,
            tenant="default",
            name="m",
            task="text-classification",
            kind="head",
            method="lora",
            job_id="ft_1",
        )
    with pytest.raises(VersionNotServable):
        registry.resolve("default", ModelRef("m", alias=None, version=version))
    with pytest.raises(VersionNotServable):
        move(registry, version, 1)
    assert ("default", "m", version) not in registry.snapshot().versions


def test_a_job_has_at_most_one_ready_version(registry: Registry) -> None:
    publish(registry, job_id="ft_1")
    with pytest.raises(sa.exc.IntegrityError):
        publish(registry, job_id="ft_1")


def test_an_abandoned_reservation_can_never_be_published(registry: Registry) -> None:
    reserve = {"tenant": "default", "name": "m", "task": "text-classification", "kind": "head", "method": "lora"}
    with registry.transaction() as connection:
        first = registry.reserve(connection, **reserve, job_id="ft_1")
        registry.reserve(connection, **reserve, job_id="ft_1")
    manifest = ModelManifest(
        tenant="default", name="m", version=first, kind="head", method="lora", labels=("a",), created_at=0.0, files=()
    )
    with pytest.raises(VersionNotServable), registry.transaction() as connection:
        registry.publish(connection, manifest, actor="zombie")


def test_an_alias_moves_only_from_where_the_caller_saw_it(registry: Registry) -> None:
    publish(registry)
    publish(registry)
    assert (move(registry, 2, 1).from_version, champion(registry)) == (1, 2)
    with pytest.raises(AliasConflict) as conflict:
        move(registry, 1, 1)
    assert conflict.value.current_version == 2
    assert champion(registry) == 2
    move(registry, 1, None, alias="canary")
    with pytest.raises(AliasConflict):
        move(registry, 2, None, alias="canary")


def test_of_two_moves_at_once_exactly_one_wins(registry: Registry) -> None:
    for _ in range(3):
        publish(registry)
    outcomes: list[str] = []
    gate = threading.Barrier(2)

    def race(version: int) -> None:
        gate.wait()
        try:
            move(registry, version, 1)
            outcomes.append("won")
        except AliasConflict:
            outcomes.append("lost")

    threads = [threading.Thread(target=race, args=(version,)) for version in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost", "won"]


@pytest.mark.parametrize("alias", ["latest", "Up", "a b", "", "x" * 65, "../x"])
def test_aliases_must_be_well_formed_and_latest_is_not_one(registry: Registry, alias: str) -> None:
    publish(registry)
    with pytest.raises(InvalidReference):
        move(registry, 1, None, alias=alias)


def test_rollbacks_go_back_step_by_step(registry: Registry) -> None:
    for _ in range(3):
        publish(registry)
    move(registry, 2, 1)
    move(registry, 3, 2)

    def back() -> int | None:
        return registry.rollback(tenant="default", name="m", alias="champion", actor="ann", reason="bad").to_version

    assert [back(), back()] == [2, 1]
    with pytest.raises(ModelNotFound):
        back()
    move(registry, 3, 1)
    assert back() == 1


def test_history_tells_every_move_and_cannot_be_changed(registry: Registry, database: Database) -> None:
    publish(registry)
    publish(registry)
    move(registry, 2, 1)
    history = registry.history(tenant="default", name="m")
    assert [(change.from_version, change.to_version, change.action, change.actor) for change in history] == [
        (1, 2, "set", "ann"),
        (None, 1, "publish", "test"),
    ]
    for statement in (alias_history.update().values(reason="forged"), alias_history.delete()):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), database.write() as connection:
            connection.execute(statement)
    assert registry.history(tenant="default", name="m") == history


def test_the_epoch_grows_with_every_change_a_server_must_see(registry: Registry) -> None:
    epochs = [registry.epoch()]
    for change in (lambda: publish(registry), lambda: publish(registry), lambda: move(registry, 2, 1)):
        change()
        epochs.append(registry.epoch())
    assert epochs == sorted(set(epochs))
    snapshot = registry.snapshot()
    assert snapshot.epoch == epochs[-1]
    assert snapshot.aliases == {("default", "m", "champion"): 2}


def test_models_are_listed_as_of_one_moment(registry: Registry, database: Database) -> None:
    """Another process registers a name between two of the statements that the list is made of."""
    publish(registry)
    others: list[threading.Thread] = []

    def after(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "FROM models" in statement and not others:
            others.append(threading.Thread(target=publish, args=(registry, "new")))
            others[0].start()
            others[0].join(3)  # SQLite's writer may wait for this reader to end

    sa.event.listen(database.engine, "after_cursor_execute", after)
    try:
        found = registry.models("default")
    finally:
        sa.event.remove(database.engine, "after_cursor_execute", after)
    others[0].join()
    assert [model.name for model in found] == ["m"]
    assert [model.name for model in registry.models("default")] == ["m", "new"]


def test_what_reads_cannot_write_on_postgres(registry: Registry, database: Database) -> None:
    if database.is_sqlite:
        pytest.skip("SQLite has no read-only transactions")
    with pytest.raises(sa.exc.DBAPIError, match="read-only"), database.read() as connection:
        connection.execute(alias_history.insert().values(tenant="t"))


def test_tenants_do_not_see_each_other(registry: Registry) -> None:
    publish(registry, tenant="acme")
    with pytest.raises(ModelNotFound):
        registry.resolve("default", ModelRef("m"))
    assert registry.models("default") == []
    assert publish(registry) == 1


def test_a_locked_sqlite_file_is_reported_as_unavailable(tmp_path: Any) -> None:
    database = Database(f"sqlite:///{tmp_path / 'x.db'}", busy_timeout_s=0.05)
    migrate(database)
    with sqlite3.connect(tmp_path / "x.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable):
            publish(Registry(database))
        assert Registry(database).epoch() == 0, "reading goes on while another writes"
        other.execute("ROLLBACK")
    other.close()
    assert publish(Registry(database)) == 1
    database.dispose()


def test_a_database_that_is_gone_is_reported_without_its_address() -> None:
    database = Database("postgresql+psycopg://user:secret@127.0.0.1:1/none", busy_timeout_s=0.2)
    with pytest.raises(DatabaseUnavailable) as refused:
        Registry(database).epoch()
    assert "127.0.0.1" not in str(refused.value) and "secret" not in str(refused.value)
    database.dispose()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("m", ModelRef("m")),
        ("m@canary", ModelRef("m", "canary")),
        ("m:7", ModelRef("m", None, 7)),
        ("a.b-c_1", ModelRef("a.b-c_1")),
    ],
)
def test_references_are_read(text: str, expected: ModelRef) -> None:
    assert ModelRef.parse(text) == expected


@pytest.mark.parametrize("text", ["", "M", "m:", "m:0", "m:-1", "m:x", "m@", "m@A", "../m", "m/1", "m:1@x", "é", "m\0"])
def test_malformed_references_are_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        ModelRef.parse(text)


def test_jobs_that_finish_the_first_version_of_a_name_at_once_get_a_number_each(registry: Registry) -> None:
    gate, taken = threading.Barrier(8), []

    def reserve(number: int) -> None:
        gate.wait()
        with registry.transaction() as connection:
            taken.append(
                registry.reserve(
                    connection,
                    tenant="default",
                    name="new",
                    task="text-classification",
                    kind="head",
                    method="x",
                    job_id=f"ft_{number}",
                )
            )

    threads = [threading.Thread(target=reserve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 9))


def test_a_name_that_comes_while_models_are_listed_does_no_harm(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each list is of one moment: a version of a name that its own select did not see would have no place."""
    publish(registry, "old")
    read = registry._database.read
    arrived: list[bool] = []

    @contextmanager
    def interrupted() -> Iterator[sa.Connection]:
        with read() as connection:
            execute = connection.execute

            def then_publish(*arguments: Any, **options: Any) -> Any:
                result = execute(*arguments, **options)
                if not arrived:
                    arrived.append(True)
                    publish(registry, "new")
                return result

            monkeypatch.setattr(connection, "execute", then_publish)
            yield connection

    monkeypatch.setattr(registry._database, "read", interrupted)
    assert [model.name for model in registry.models("default")] == ["old"]
