"""Deleting over SQLite and PostgreSQL: what is needed stays, what goes leaves its history and its number, and a crash
between rows and files leaves nothing that serves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from model_registry.db import Database
from model_registry.errors import AliasConflict, ModelInUse, ModelNotFound, RegistryError, VersionInUse
from model_registry.manifest import MANIFEST_NAME, ModelManifest
from model_registry.refs import ModelRef
from model_registry.registry import ModelVersion, Promotion, Registry
from model_registry.removal import Keep, Removal
from model_registry.store import FileStore
from model_registry.tables import deletions, model_versions

DAY_S = 86400.0
T = "default"


class Clock:
    def __init__(self) -> None:
        self.time = 1e6

    def __call__(self) -> float:
        return self.time


class BrokenStore(FileStore):
    """Removes nothing while `is_broken`, as a network filesystem that is busy."""

    is_broken = False

    def delete_tree(self, prefix: str) -> None:
        if self.is_broken:
            raise OSError(16, "device or resource busy")
        super().delete_tree(prefix)


class Place:
    """A registry with files."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.clock = Clock()
        database._clock = self.clock
        self.database, self.registry = database, Registry(database)
        self.store = BrokenStore(folder / "store")
        self.removal = Removal(database, self.registry, self.store)

    def reserve(self, name: str = "m", *, tenant: str = T, job_id: str | None = None) -> int:
        with self.registry.transaction() as connection:
            return self.registry.reserve(
                connection, tenant=tenant, name=name, task="text-classification", kind="head", method="x", job_id=job_id
            )

    def write(self, version: int, name: str = "m", *, tenant: str = T) -> ModelManifest:
        manifest = ModelManifest(
            tenant=tenant,
            name=name,
            version=version,
            kind="head",
            method="x",
            labels=("a", "b"),
            created_at=0.0,
            files=(),
        )
        self.store.put_bytes(f"{manifest.prefix}/{MANIFEST_NAME}", manifest.to_bytes(), create_only=True)
        return manifest

    def publish(self, name: str = "m", *, tenant: str = T, promote: bool = False) -> int:
        champion = self.registry.champion(tenant, name)
        over = None if champion is None else champion.version
        version = self.reserve(name, tenant=tenant)
        manifest = self.write(version, name, tenant=tenant)
        promotion = Promotion(is_wanted=True, over=over, reason="better") if promote else None
        with self.registry.transaction() as connection:
            self.registry.publish(connection, manifest, actor="test", promotion=promotion)
        return version

    def point(self, version: int, expected: int | None, alias: str = "champion", name: str = "m") -> None:
        self.registry.set_alias(
            tenant=T, name=name, alias=alias, version=version, expected_version=expected, actor="ann", reason=""
        )

    def delete(self, version: int, name: str = "m", *, tenant: str = T) -> None:
        self.removal.delete_version(tenant=tenant, name=name, version=version, actor="ann", reason="old")

    def delete_alias(self, alias: str, expected: int | None = None) -> None:
        self.removal.delete_alias(
            tenant=T, name="m", alias=alias, expected_version=expected, actor="ann", reason="unused"
        )

    def delete_model(self, name: str = "m", *, tenant: str = T, force: bool = False) -> None:
        self.removal.delete_model(tenant=tenant, name=name, is_forced=force, actor="ann", reason="gone")

    def versions(self, name: str = "m", *, tenant: str = T) -> list[int]:
        return [version.version for version in self.registry.model(tenant, name).versions]

    def has_files(self, version: int, name: str = "m", *, tenant: str = T) -> bool:
        return self.store.exists(f"models/{tenant}/{name}/{version}")

    def rows(self) -> list[tuple[int, str]]:
        with self.database.read() as connection:
            query = sa.select(model_versions.c.version, model_versions.c.status).order_by(model_versions.c.version)
            return [(row.version, row.status) for row in connection.execute(query)]


@pytest.fixture
def place(database: Database, tmp_path: Path) -> Place:
    return Place(database, tmp_path)


# Versions


def test_a_version_that_nothing_needs_goes_with_its_files_and_its_row(place: Place) -> None:
    for _ in range(3):
        place.publish()
    before = place.registry.epoch()
    place.delete(2)
    assert place.versions() == [3, 1] and place.rows() == [(1, "ready"), (3, "ready")]
    assert [place.has_files(version) for version in (1, 2, 3)] == [True, False, True]
    assert place.registry.epoch() > before, "servers look again"
    assert (T, "m", 2) not in place.registry.snapshot().versions
    with pytest.raises(ModelNotFound):
        place.registry.resolve(T, ModelRef("m", None, 2))
    with pytest.raises(ModelNotFound):
        place.point(2, 1)


def test_deleting_twice_is_no_error_and_deleting_what_never_was_is(place: Place) -> None:
    place.publish()
    place.publish()
    place.delete(2)
    place.delete(2)
    assert [deletion.version for deletion in place.removal.deletions(tenant=T, name="m")] == [2]
    for version, name, tenant in ((3, "m", T), (1, "other", T), (1, "m", "acme")):
        with pytest.raises(ModelNotFound):
            place.delete(version, name, tenant=tenant)


def test_a_version_is_refused_as_long_as_an_alias_points_at_it_and_the_refusal_names_each(place: Place) -> None:
    place.publish()
    place.publish()
    place.point(1, None, "canary")
    with pytest.raises(
        VersionInUse, match=r"canary points at version 1; the alias champion points at version 1"
    ) as refused:
        place.delete(1)
    assert [error["loc"] for error in refused.value.errors] == [["aliases", "canary"], ["aliases", "champion"]]
    place.point(2, 1)
    place.point(2, 1, "canary")
    place.delete(1)
    assert place.versions() == [2]


def test_a_version_that_is_being_registered_is_not_deleted(place: Place) -> None:
    place.publish()
    mine = place.reserve(job_id="ft_1")
    with pytest.raises(VersionInUse, match="ft_1 is registering version 2"):
        place.delete(mine)
    other = place.reserve()
    with pytest.raises(VersionInUse, match="an import is registering version 3"):
        place.delete(other)


def test_numbers_are_never_given_twice(place: Place) -> None:
    place.publish()
    place.publish()
    place.delete(2)
    assert place.publish() == 3
    place.delete_model(force=True)
    assert place.publish() == 4


def test_rolling_back_to_a_deleted_version_says_what_happened(place: Place) -> None:
    place.publish()
    place.publish(promote=True)
    place.delete(1)
    with pytest.raises(ModelNotFound, match="version 1 before, which was deleted"):
        place.registry.rollback(tenant=T, name="m", alias="champion", actor="ann", reason="")
    assert place.registry.model(T, "m").aliases == {"champion": 2}


def test_of_a_promotion_and_a_deletion_at_once_one_wins_and_the_alias_never_points_at_nothing(place: Place) -> None:
    for _ in range(4):
        place.publish()

    def race(version: int, champion: int) -> tuple[bool, bool]:
        gate, failed = threading.Barrier(2), set()

        def attempt(name: str, act: Callable[[], None]) -> None:
            gate.wait()
            try:
                act()
            except RegistryError:
                failed.add(name)

        threads = [
            threading.Thread(target=attempt, args=("promote", lambda: place.point(version, champion))),
            threading.Thread(target=attempt, args=("delete", lambda: place.delete(version))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return "promote" not in failed, "delete" not in failed

    champion = 1
    for version in (2, 3, 4):
        promoted, deleted = race(version, champion)
        assert promoted != deleted
        champion = version if promoted else champion
        assert place.registry.model(T, "m").aliases == {"champion": champion}
        assert place.registry.resolve(T, ModelRef("m")).version == champion and place.has_files(champion)
        assert place.has_files(version) == promoted


# Aliases


def test_a_deleted_alias_leaves_its_version_and_its_history(place: Place) -> None:
    place.publish()
    place.publish(promote=True)
    place.delete_alias("champion")
    assert place.registry.model(T, "m").aliases == {} and place.versions() == [2, 1]
    last = place.registry.history(tenant=T, name="m")[0]
    assert (last.action, last.from_version, last.to_version, last.actor, last.reason) == (
        "delete",
        2,
        None,
        "ann",
        "unused",
    )
    place.delete_alias("champion")
    assert len(place.registry.history(tenant=T, name="m")) == 3, "the repeat is no move"
    with pytest.raises(ModelNotFound, match="no alias 'canary'"):
        place.delete_alias("canary")


def test_an_alias_set_anew_does_not_roll_back_to_what_it_was_before_its_deletion(place: Place) -> None:
    place.publish()
    place.publish(promote=True)
    place.delete_alias("champion")
    place.point(2, None)
    with pytest.raises(ModelNotFound, match="no earlier version"):
        place.registry.rollback(tenant=T, name="m", alias="champion", actor="ann", reason="")


def test_an_alias_is_deleted_only_where_it_is_expected_to_point(place: Place) -> None:
    place.publish()
    with pytest.raises(AliasConflict) as refused:
        place.delete_alias("champion", expected=2)
    assert refused.value.current_version == 1
    place.delete_alias("champion", expected=1)
    assert place.publish() == 2 and place.registry.model(T, "m").aliases == {"champion": 2}, "the next is champion"


# Models


def test_a_model_goes_whole_if_that_is_what_is_asked_for(place: Place) -> None:
    for _ in range(3):
        place.publish()
    place.publish("other")
    with pytest.raises(ModelInUse, match="champion points at version 1"):
        place.delete_model()
    assert place.versions() == [3, 2, 1]
    place.delete_model(force=True)
    with pytest.raises(ModelNotFound):
        place.registry.model(T, "m")
    assert [model.name for model in place.registry.models(T)] == ["other"]
    assert not any(place.has_files(version) for version in (1, 2, 3)) and place.has_files(1, "other")
    assert place.registry.snapshot().aliases == {(T, "other", "champion"): 1}
    place.delete_model()
    place.delete_model(force=True)
    for name, tenant in (("never", T), ("m", "acme")):
        with pytest.raises(ModelNotFound):
            place.delete_model(name, tenant=tenant)


def test_the_history_of_a_deleted_model_can_be_read(place: Place) -> None:
    place.publish()
    place.delete_model(force=True)
    assert [change.action for change in place.registry.history(tenant=T, name="m")] == ["delete", "publish"]
    found = place.removal.deletions(tenant=T, name="m")
    assert [(item.kind, item.version, item.actor, item.reason) for item in found] == [
        ("model", None, "ann", "gone"),
        ("version", 1, "ann", "gone"),
    ]


def test_a_name_begins_anew_with_another_task_and_the_numbers_go_on(place: Place) -> None:
    place.publish()
    place.publish(promote=True)
    place.delete_model(force=True)
    place.clock.time += 100
    with place.registry.transaction() as connection:
        version = place.registry.reserve(
            connection, tenant=T, name="m", task="text-regression", kind="head", method="x", job_id=None
        )
    model = place.registry.model(T, "m")
    assert (version, model.task, model.created_at, model.aliases) == (3, "text-regression", place.clock.time, {})


def test_a_model_of_which_a_version_is_being_registered_stays_even_by_force(place: Place) -> None:
    place.publish()
    place.reserve(job_id="ft_1")
    with pytest.raises(ModelInUse, match="ft_1"):
        place.delete_model(force=True)
    assert place.registry.model(T, "m").aliases == {"champion": 1}


def test_tenants_are_kept_apart(place: Place) -> None:
    place.publish()
    place.publish(tenant="acme")
    place.delete_model(force=True)
    assert place.versions(tenant="acme") == [1] and place.has_files(1, tenant="acme")
    assert place.removal.deletions(tenant="acme", name="m") == []


def test_what_was_deleted_cannot_be_unsaid(place: Place, database: Database) -> None:
    place.publish()
    place.publish()
    place.delete(2)
    for statement in (deletions.update().values(actor="forged"), deletions.delete()):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), database.write() as connection:
            connection.execute(statement)


# Crashes and left-overs


def test_files_that_cannot_be_removed_now_are_the_sweeps(place: Place) -> None:
    place.publish()
    place.publish()
    place.store.is_broken = True
    place.delete(2)
    assert place.versions() == [1] and place.rows() == [(1, "ready"), (2, "deleted")] and place.has_files(2)
    place.removal.sweep(lambda jobs: jobs)
    assert place.has_files(2)
    place.store.is_broken = False
    place.removal.sweep(lambda jobs: jobs)
    assert place.rows() == [(1, "ready")] and not place.has_files(2)
    assert place.has_files(1)


def test_a_hidden_version_can_be_had_by_no_way(place: Place) -> None:
    place.publish()
    place.publish()
    place.store.is_broken = True
    place.delete(2)
    place.delete(2)
    assert (T, "m", 2) not in place.registry.snapshot().versions
    with pytest.raises(ModelNotFound):
        place.point(2, 1)
    with pytest.raises(ModelNotFound):
        place.registry.resolve(T, ModelRef("m", None, 2))
    place.delete_model(force=True)
    assert place.registry.models(T) == []


def test_what_was_reserved_and_can_never_be_ready_is_cleared_after_a_day(place: Place) -> None:
    place.publish()
    dead, alive = place.reserve(job_id="ft_dead"), place.reserve(job_id="ft_alive")
    imported = place.reserve()
    for version in (dead, alive, imported):
        place.write(version)
    place.removal.sweep(lambda jobs: {"ft_alive"} & set(jobs))
    assert place.rows() == [(1, "ready"), (2, "abandoned"), (3, "reserved"), (4, "reserved")]
    assert place.has_files(dead), "a run that lost its lease may still be writing"
    place.clock.time += DAY_S + 1
    place.removal.sweep(lambda jobs: {"ft_alive"} & set(jobs))
    assert place.rows() == [(1, "ready"), (3, "reserved")]
    assert not place.has_files(dead) and not place.has_files(imported) and place.has_files(alive)


# Retention


def ages(place: Place, days: Sequence[float]) -> None:
    """Publishes one version for each entry, so many days before now."""
    now = place.clock.time
    for age in days:
        place.clock.time = now - age * DAY_S
        place.publish()
    place.clock.time = now


def test_retention_keeps_what_either_rule_keeps_and_whatever_is_needed(place: Place) -> None:
    ages(place, [60, 50, 40, 30, 20, 10, 0])  # version 1 is champion
    place.point(3, 1)
    place.point(4, 3)
    place.point(2, None, "canary")
    rule = Keep(versions=2, days=25)
    would = place.removal.retain(lambda tenant, name: rule, is_dry=True)
    assert [version.version for version in would] == [1] and place.versions() == [7, 6, 5, 4, 3, 2, 1]
    gone = place.removal.retain(lambda tenant, name: rule)
    # 7 and 6 are the newest, 5 is young, 4 the champion, 3 what it would be rolled back to, 2 the canary
    assert [version.version for version in gone] == [1] and place.versions() == [7, 6, 5, 4, 3, 2]
    assert not place.has_files(1)
    assert place.removal.deletions(tenant=T, name="m")[0].actor == "retention"
    assert place.removal.retain(lambda tenant, name: rule) == []
    assert place.registry.rollback(tenant=T, name="m", alias="champion", actor="ann", reason="").to_version == 3


def test_retention_goes_by_each_models_rule(place: Place) -> None:
    for name in ("m", "kept"):
        for _ in range(4):
            place.publish(name)
    rules = {"m": Keep(versions=1)}
    place.removal.retain(lambda tenant, name: rules.get(name, Keep()))
    assert place.versions("m") == [4, 1] and place.versions("kept") == [4, 3, 2, 1]


def test_two_processes_retain_at_once_and_nothing_needed_goes(place: Place) -> None:
    for _ in range(8):
        place.publish()
    failures: list[Exception] = []

    def retain() -> None:
        try:
            place.removal.retain(lambda tenant, name: Keep(versions=2))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=retain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and place.versions() == [8, 7, 1]
    assert len(place.removal.deletions(tenant=T, name="m")) == 5, "each is deleted once"


def test_a_chore_is_one_processs_turn_until_it_is_due_again(place: Place) -> None:
    turns: list[bool] = []
    gate = threading.Barrier(6)

    def ask() -> None:
        gate.wait()
        turns.append(place.removal.take_turn("retention", every_s=60))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turns.count(True) == 1
    place.clock.time += 59
    assert not place.removal.take_turn("retention", every_s=60)
    assert place.removal.take_turn("sweep", every_s=60), "each chore by itself"
    place.clock.time += 2
    assert place.removal.take_turn("retention", every_s=60)


def ready(version: int, ready_at: float) -> ModelVersion:
    return ModelVersion(
        tenant=T,
        name="m",
        version=version,
        status="ready",
        kind="head",
        method="x",
        backbone=None,
        backbone_digest=None,
        job_id=None,
        manifest_sha256=None,
        labels=None,
        metrics=None,
        bytes=1,
        created_at=ready_at,
        ready_at=ready_at,
        task="text-classification",
    )


@given(
    ages=st.lists(st.integers(0, 400), max_size=12),
    versions=st.none() | st.integers(1, 10),
    days=st.none() | st.integers(1, 300),
    needed=st.sets(st.integers(1, 12)),
)
def test_what_a_rule_lets_go_is_old_beyond_the_newest_and_not_needed(
    ages: list[int], versions: int | None, days: int | None, needed: set[int]
) -> None:
    now = 1e9
    found = [ready(number + 1, now - age * DAY_S) for number, age in enumerate(ages)]
    gone = {version.version for version in Keep(versions, days).outdated(found, needed=needed, now=now)}
    newest = {version.version for version in found[len(found) - min(len(found), versions or 0) :]}
    young = {version.version for version, age in zip(found, ages, strict=True) if days is not None and age <= days}
    everything = {version.version for version in found}
    expected = set() if versions is None and days is None else everything - newest - young - needed
    assert gone == expected
