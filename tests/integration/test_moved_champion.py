"""A run whose gates pass while somebody moves the champion: a real supervisor, and a child that waits for the move."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finetune.jobs.link import ChildJob, DatasetInput
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec, JobStatus
from finetune.jobs.store import JobStore
from finetune.worker.metrics import WorkerMetrics
from finetune.worker.supervisor import Ledger, Supervisor, Timing
from model_registry.db import Database
from model_registry.manifest import ModelManifest
from model_registry.registry import Registry
from model_registry.store import FileStore

# Asks who is champion, waits until the test has opened and closed the pipe, and ends with gates that passed.
CHILD = """
import json, sys
def say(**message): print(json.dumps(message), flush=True)
def hear(): return json.loads(sys.stdin.readline())
hear()
say(kind="champion")
champion = hear()["champion"]
open(sys.argv[1]).read()
say(kind="reserve", version_kind="head", method="linear_probe")
version = hear()["version"]
manifest = {"tenant": "default", "name": "m", "version": version, "kind": "head", "method": "linear_probe",
            "labels": ["a", "b"], "created_at": 0.0, "files": []}
over = champion and champion["version"]
promotion = {"wanted": "if_better", "champion": over, "is_passed": True, "gates": []}
say(kind="succeeded", manifest=manifest, evaluation={"promotion": promotion}, was_cancelled=False)
"""


def published(registry: Registry) -> int:
    with registry.transaction() as connection:
        version = registry.reserve(
            connection, tenant="default", name="m", task="text-classification", kind="head", method="x", job_id=None
        )
        manifest = ModelManifest(
            tenant="default",
            name="m",
            version=version,
            kind="head",
            method="x",
            labels=("a", "b"),
            created_at=0.0,
            files=(),
        )
        registry.publish(connection, manifest, actor="ann")
    return version


class World:
    def __init__(self, database: Database, folder: Path) -> None:
        self.jobs, self.registry = JobStore(database), Registry(database)
        self.folder = folder
        self.pipe = folder / "go"
        os.mkfifo(self.pipe)

    def supervisor(self) -> Supervisor:
        spec = JobSpec(dataset="ds_1", backbone="tiny", register_as="m", promote="if_better")
        self.job = self.jobs.enqueue("default", spec, is_data_ready=True)
        claimed = self.jobs.claim("w", lease_s=60)
        assert claimed is not None
        child = ChildJob(
            job_id=self.job.id,
            tenant="default",
            attempt=1,
            spec=spec,
            train=DatasetInput(id="ds_1", sha256="0" * 64, rows_file=self.folder / "rows"),
            backbone_folder=self.folder,
            store_root=self.folder / "store",
            work_dir=self.folder / "work",
            worker=WorkerProfile(),
        )
        ledger = Ledger(self.jobs, self.registry, FileStore(self.folder / "store"), WorkerMetrics())
        return Supervisor(
            ledger,
            claimed[0],
            child,
            Timing(60, 10, 60, 10),
            should_stop=lambda: False,
            log_file=self.folder / "log",
            command=[sys.executable, "-c", CHILD, str(self.pipe)],
        )

    def outcome(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        job = self.jobs.get("default", self.job.id)
        assert job.status is JobStatus.SUCCEEDED
        failed = [event.data for event in self.jobs.events("default", job.id) if event.type == "gate_failed"]
        return job.result or {}, failed


@pytest.fixture
def world(database: Database, tmp_path: Path) -> World:
    return World(database, tmp_path)


def run(world: World, meanwhile: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    supervisor = world.supervisor()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(supervisor.run)
        with world.pipe.open("w"):  # opens when the child has opened the other end: by then it knows the champion
            meanwhile()
        assert ended.result() == "succeeded"
    return world.outcome()


def champion(world: World) -> int | None:
    found = world.registry.champion("default", "m")
    return None if found is None else found.version


def test_it_is_promoted_where_nobody_moved_the_champion(world: World) -> None:
    published(world.registry)
    result, failed = run(world, lambda: None)
    assert (result, failed) == ({"name": "m", "version": 2, "is_champion": True}, [])
    assert champion(world) == 2
    assert world.registry.history(tenant="default", name="m")[0].reason == "passed every gate against version 1"


def test_it_is_not_where_somebody_did_and_the_job_says_so(world: World) -> None:
    published(world.registry)
    published(world.registry)

    def move() -> None:
        world.registry.set_alias(
            tenant="default", name="m", alias="champion", version=2, expected_version=1, actor="ann", reason=""
        )

    result, failed = run(world, move)
    assert (result["version"], result["is_champion"]) == (3, False)
    assert champion(world) == 2
    assert [event["gate"] for event in failed] == ["champion_unchanged"] and "version 1" in failed[0]["message"]


def test_nor_where_a_first_champion_came_meanwhile(world: World) -> None:
    result, failed = run(world, lambda: published(world.registry))
    assert (result["is_champion"], len(failed)) == (False, 1)
    assert champion(world) == 1 and "no champion" in failed[0]["message"]


# A cancel that comes while the version is written


@pytest.mark.parametrize("wanted", [(False,), (False, True), (True, False)])
def test_a_cancel_that_keeps_nothing_is_heard_until_the_last_moment(world: World, wanted: tuple[bool, ...]) -> None:
    def cancel() -> None:
        for keep_best in wanted:
            world.jobs.request_cancel("default", world.job.id, keep_best=keep_best)

    supervisor = world.supervisor()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(supervisor.run)
        with world.pipe.open("w"):
            cancel()
        assert ended.result() == "cancelled"
    job = world.jobs.get("default", world.job.id)
    assert (job.status, job.result) == (JobStatus.CANCELLED, None)
    assert champion(world) is None
    assert [version.status for version in world.registry.model("default", "m").versions] == ["abandoned"]
    assert not (world.folder / "store" / "models" / "default" / "m" / "1").exists()


def test_one_that_keeps_the_best_registers_it_and_makes_no_first_champion(world: World) -> None:
    supervisor = world.supervisor()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(supervisor.run)
        with world.pipe.open("w"):
            world.jobs.request_cancel("default", world.job.id, keep_best=True)
        assert ended.result() == "cancelled"
    job = world.jobs.get("default", world.job.id)
    assert (job.status, job.result) == (JobStatus.CANCELLED, {"name": "m", "version": 1, "is_champion": False})
    assert champion(world) is None
    assert [version.status for version in world.registry.model("default", "m").versions] == ["ready"]
