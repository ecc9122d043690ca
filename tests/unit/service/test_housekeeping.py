"""Retention by rules, left-overs of jobs, and a data directory that is away: each turn with real stores."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.jobs.records import JobSpec
from finetune.jobs.store import JobStore
from model_registry.data_folder import DataFolder
from model_registry.db import Database
from model_registry.errors import StoreUnavailable
from model_registry.migrations import migrate
from model_registry.removal import Keep, Removal
from model_registry.store import FileStore
from service.housekeeping import Housekeeping, Retention
from tests.support.world import World

TENANT = "default"


@pytest.fixture
def data(world: World, tmp_path: Path) -> Iterator[DataFolder]:
    """A world's files in a data directory."""
    folder = DataFolder.open(tmp_path / "data", world.registry._database)
    world.store = FileStore(folder.root / "store")
    yield folder


def housekeeping(world: World, data: DataFolder, *, is_dry: bool = False, **rules: Keep) -> Housekeeping:
    removal = Removal(world.registry._database, world.registry, world.store)
    retention = Retention(Keep(versions=2), {name.replace("__", "/"): rule for name, rule in rules.items()})
    return Housekeeping(removal, JobStore(world.registry._database), data, retention, is_dry=is_dry)


def versions(world: World, name: str) -> list[int]:
    return [version.version for version in world.registry.model(TENANT, name).versions]


def test_a_model_has_its_own_rule_or_that_of_all() -> None:
    retention = Retention(Keep(versions=9), {"m": Keep(versions=1), "acme/m": Keep(days=1), "acme/n": Keep()})
    assert retention.of("default", "m") == Keep(versions=1)
    assert retention.of("acme", "m") == Keep(days=1)
    assert retention.of("acme", "n") == Keep()
    assert retention.of("other", "m") == retention.of("default", "n") == Keep(versions=9)


def test_retention_deletes_by_rule_and_says_what(
    world: World, data: DataFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("m", "pinned"):
        for seed in range(5):
            world.publish_baseline(name, seed=seed)
    with caplog.at_level(logging.INFO, "service.housekeeping"):
        housekeeping(world, data, is_dry=True, pinned=Keep()).turn()
    assert versions(world, "m") == [5, 4, 3, 2, 1]
    assert [record.getMessage()[:20] for record in caplog.records] == ["would delete m:2, wh", "would delete m:3, wh"]
    caplog.clear()
    kept = housekeeping(world, data, pinned=Keep())
    with caplog.at_level(logging.INFO, "service.housekeeping"):
        kept.retain()
    assert versions(world, "m") == [5, 4, 1] and versions(world, "pinned") == [5, 4, 3, 2, 1]
    assert "deleted m:2, which neither keep_versions=2" in caplog.records[0].getMessage()


def test_what_a_crash_left_of_deleted_jobs_goes(world: World, data: DataFolder) -> None:
    jobs = JobStore(world.registry._database)
    spec = JobSpec(dataset="ds_1", backbone="tiny", register_as="m")
    alive = jobs.enqueue(TENANT, spec, is_data_ready=True).id
    for job in (alive, "ft_gone"):
        (data.root / "work" / job / "attempt-1-1").mkdir(parents=True)
        (data.root / "logs" / "jobs").mkdir(parents=True, exist_ok=True)
        (data.root / "logs" / "jobs" / f"{job}.log").write_text("x")
    (data.root / "logs" / "server.log").write_text("x")
    housekeeping(world, data).turn()
    assert [path.name for path in (data.root / "work").iterdir()] == [alive]
    assert [path.name for path in (data.root / "logs" / "jobs").iterdir()] == [f"{alive}.log"]
    assert (data.root / "logs" / "server.log").is_file()


def test_nothing_is_tidied_while_the_data_directory_is_away(world: World, data: DataFolder, tmp_path: Path) -> None:
    for seed in range(4):
        world.publish_baseline("m", seed=seed)
    data.root.rename(tmp_path / "away")
    chores = housekeeping(world, data)
    with pytest.raises(StoreUnavailable):
        chores.turn()
    assert versions(world, "m") == [4, 3, 2, 1]
    (tmp_path / "away").rename(data.root)
    chores.turn()
    assert versions(world, "m") == [4, 3, 1], "and its turn was not lost"


def test_two_replicas_take_turns(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    migrate(database)
    removals = [Removal(database, None, None) for _ in range(2)]  # type: ignore[arg-type]
    assert [removal.take_turn("retention", every_s=600) for removal in removals] == [True, False]
    database.dispose()
