"""Deleting through the whole application, over a real registry, job table, data sets and files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.data.records import DatasetRecord, DatasetReport, DatasetStatus
from finetune.data.store import DatasetStore
from finetune.jobs.records import JobSpec
from finetune.jobs.store import JobStore
from model_registry.data_folder import DataFolder
from model_registry.db import Database
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.removal import Removal
from model_registry.store import FileStore
from modeling.backbone import ingest
from modeling.testing import write_tiny_checkpoint
from service.api.deps import Services
from service.dataset_intake import DatasetIntake
from service.folder_watch import FolderWatch
from service.inference.registry_watcher import RegistryWatcher
from service.settings import ServingSettings
from tests.support.asgi import Answered, AppUnderTest
from tests.support.world import World


class Replica(AppUnderTest):
    def __init__(self, world: World, database: Database, settings: ServingSettings) -> None:
        self._world, self._database = world, database
        self.jobs, self.datasets = JobStore(database), DatasetStore(database)
        super().__init__(settings)

    @asynccontextmanager
    async def _build(self) -> AsyncIterator[Services]:
        unused: Any = SimpleNamespace()
        world = self._world
        folder = FolderWatch(DataFolder.open(self.settings.data_dir, self._database))
        intake = DatasetIntake(self.datasets, self.settings.data_dir / "datasets", timeout_s=60, memory_bytes=1 << 31)
        async with world.bare_pool(metrics=self.metrics) as pool:
            watcher = RegistryWatcher(world.registry, pool, poll_s=0.01)
            await watcher.refresh()
            await pool.settled()
            pool.is_started = True
            yield Services(
                settings=self.settings,
                pool=pool,
                predictor=unused,
                watcher=watcher,
                registry=world.registry,
                removal=Removal(self._database, world.registry, world.store),
                jobs=self.jobs,
                datasets=self.datasets,
                intake=intake,
                imports=unused,
                store=world.store,
                metrics=self.metrics,
                drain=self.drain,
                events=unused,
                backbones={},
                folder=folder,
            )
            await intake.stop()
            folder.close()

    def delete(self, path: str) -> Answered:
        return self.ask(path, b"", method="DELETE")

    def get(self, path: str) -> Answered:
        return self.ask(path, b"", method="GET")

    def refused(self, path: str, status: int, code: str) -> Any:
        answered = self.delete(path)
        assert (answered.status, answered.document["code"]) == (status, code), answered.body
        return answered.document

    def dataset(self) -> DatasetRecord:
        record = self.datasets.create("default", filename="a.csv", file_format="csv", sha256="0" * 64, size_bytes=1)
        folder = self.settings.data_dir / "datasets" / "default" / record.id
        folder.mkdir(parents=True)
        (folder / "raw").write_text("text,label\n")
        self.datasets.finish(record.id, DatasetReport(rows=1, columns=[], findings=[]), DatasetStatus.READY)
        return record

    def job(self, dataset: str, name: str = "m") -> str:
        spec = JobSpec(dataset=dataset, backbone="tiny", register_as=name)
        return self.jobs.enqueue("default", spec, is_data_ready=True).id


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., tuple[World, Replica]]]:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    migrate(database)
    store = FileStore(tmp_path / "data" / "store")
    backbone = ingest(store, write_tiny_checkpoint(tmp_path / "tiny"), name="tiny", source="file:tiny")
    world = World(Registry(database), store, backbone, tmp_path)
    started: list[Replica] = []

    def start(**settings: Any) -> tuple[World, Replica]:
        for seed in (1, 2, 3):
            world.publish_baseline("m", seed=seed)
        replica = Replica(world, database, ServingSettings(data_dir=tmp_path / "data", **settings))
        started.append(replica)
        return world, replica

    yield start
    for replica in started:
        replica.close()
    database.dispose()


def test_a_version_goes_unless_an_alias_needs_it(make: Callable[..., tuple[World, Replica]]) -> None:
    world, replica = make()
    document = replica.refused("/models/m/versions/1", 409, "version_in_use")
    assert "champion points at version 1" in document["detail"]
    assert [item["loc"] for item in document["errors"]] == [["aliases", "champion"]]
    for _ in range(2):
        answered = replica.delete("/models/m/versions/2?reason=superseded")
        assert (answered.status, answered.body) == (204, b"")
    assert replica.get("/models/m").document["versions"] == [3, 1]
    for path in ("", "/card", "/files/labels.json"):
        assert replica.get(f"/models/m/versions/2{path}").status == 404
    assert not (world.store.root / "models/default/m/2").exists()
    history = replica.get("/models/m/history").document
    assert [(item["kind"], item["version"], item["reason"]) for item in history["deletions"]] == [
        ("version", 2, "superseded")
    ]
    replica.refused("/models/m/versions/9", 404, "model_not_found")
    replica.refused("/models/other/versions/1", 404, "model_not_found")
    for version in ("0", "x", "99999999999999999999"):
        replica.refused(f"/models/m/versions/{version}", 422, "invalid_request")


def test_an_alias_goes_and_its_history_stays(make: Callable[..., tuple[World, Replica]]) -> None:
    _, replica = make()
    replica.refused("/models/m/aliases/champion?expected_version=2", 409, "alias_conflict")
    for _ in range(2):
        assert replica.delete("/models/m/aliases/champion?expected_version=1").status == 204
    assert replica.get("/models/m").document["aliases"] == {}
    moves = replica.get("/models/m/aliases/champion/history").document["data"]
    assert [(move["action"], move["version"]) for move in moves] == [("delete", None), ("publish", 1)]
    replica.refused("/models/m/aliases/canary", 404, "model_not_found")
    assert replica.delete("/models/m/versions/1").status == 204, "nothing needs it any more"


def test_a_model_goes_by_force_and_its_history_stays(make: Callable[..., tuple[World, Replica]]) -> None:
    world, replica = make()
    document = replica.refused("/models/m", 409, "model_in_use")
    assert "force=true" in document["detail"]
    for query in ("?force=true", "", "?force=true"):
        assert replica.delete(f"/models/m{query}").status == 204
    assert replica.get("/models/m").status == 404
    assert [item["id"] for item in replica.get("/models").document["data"]] == []
    assert not (world.store.root / "models/default/m/1").exists()
    history = replica.get("/models/m/history").document
    assert [item["kind"] for item in history["deletions"]] == ["model", "version", "version", "version"]
    assert history["data"][0]["action"] == "delete"
    world.publish_baseline("m", seed=4)
    assert replica.get("/models/m").document["versions"] == [4]


def test_a_model_that_a_job_will_register_stays(make: Callable[..., tuple[World, Replica]]) -> None:
    _, replica = make()
    job = replica.job(replica.dataset().id)
    assert job in replica.refused("/models/m?force=true", 409, "model_in_use")["detail"]
    replica.jobs.request_cancel("default", job, keep_best=False)
    assert replica.delete("/models/m?force=true").status == 204


@pytest.mark.parametrize(
    ("default", "path"),
    [
        ("m", "/models/m?force=true"),
        ("m", "/models/m/aliases/champion"),
        ("m:2", "/models/m/versions/2"),
        ("m@canary", "/models/m/aliases/canary"),
    ],
)
def test_what_a_request_without_a_model_gets_stays(
    make: Callable[..., tuple[World, Replica]], default: str, path: str
) -> None:
    _, replica = make(default_model=default)
    assert "default_model" in replica.refused(path, 409, "model_in_use")["detail"]


def test_a_dataset_goes_when_no_job_needs_it(make: Callable[..., tuple[World, Replica]]) -> None:
    _, replica = make()
    record = replica.dataset()
    job = replica.job(record.id)
    assert job in replica.refused(f"/datasets/{record.id}", 409, "dataset_in_use")["detail"]
    folder = replica.settings.data_dir / "datasets" / "default" / record.id
    assert folder.is_dir()
    replica.jobs.request_cancel("default", job, keep_best=False)
    for _ in range(2):
        assert replica.delete(f"/datasets/{record.id}").status == 204
    assert not folder.exists() and replica.get(f"/datasets/{record.id}").status == 404
    replica.refused("/datasets/ds_none", 404, "dataset_not_found")
    started = replica.ask("/finetune", json.dumps({"dataset": record.id, "register_as": "m"}).encode())
    assert (started.status, started.document["code"]) == (404, "dataset_not_found")


def test_a_job_goes_when_it_has_ended(make: Callable[..., tuple[World, Replica]]) -> None:
    _, replica = make()
    job = replica.job(replica.dataset().id)
    replica.refused(f"/finetune/{job}", 409, "job_not_deletable")
    log, work = (replica.settings.data_dir / path for path in (f"logs/jobs/{job}.log", f"work/{job}/attempt-1-1"))
    for path in (log.parent, work):
        path.mkdir(parents=True)
    log.write_text("x")
    replica.jobs.request_cancel("default", job, keep_best=False)
    for _ in range(2):
        assert replica.delete(f"/finetune/{job}").status == 204
    assert replica.get(f"/finetune/{job}").status == 404 and replica.get(f"/finetune/{job}/events").status == 404
    assert not log.exists() and not work.parent.exists()
    for job_id, status in (("ft_none", 404), ("..", 422), ("%2e%2e", 422)):
        assert replica.delete(f"/finetune/{job_id}").status == status, job_id
    assert replica.settings.data_dir.is_dir()


def test_a_job_goes_although_its_log_cannot(
    make: Callable[..., tuple[World, Replica]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, replica = make()
    job = replica.job(replica.dataset().id)
    replica.jobs.request_cancel("default", job, keep_best=False)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert replica.delete(f"/finetune/{job}").status == 204
    assert replica.get(f"/finetune/{job}").status == 404


def test_a_dataset_that_goes_while_its_rows_are_read_is_not_found(
    make: Callable[..., tuple[World, Replica]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, replica = make()
    record = replica.dataset()
    answered = replica.get(f"/datasets/{record.id}/preview")  # it has no rows, and is not deleted
    assert (answered.status, answered.document["code"]) == (503, "storage_unavailable")

    def deleted(*_: object, **__: object) -> None:
        replica.datasets.delete("default", record.id)
        raise FileNotFoundError(record.id)

    monkeypatch.setattr("service.api.datasets.read_batches", deleted)
    monkeypatch.setattr("service.api.finetune.load_sides", deleted)
    monkeypatch.setattr("service.api.finetune._check_dataset", lambda *_, **__: None)
    started = replica.ask("/finetune", json.dumps({"dataset": record.id, "register_as": "n"}).encode())
    assert (started.status, started.document["code"]) == (404, "dataset_not_found"), started.body


# The data directory


def test_while_the_data_directory_is_away_nothing_is_taken_or_made_and_it_is_told(
    make: Callable[..., tuple[World, Replica]], tmp_path: Path
) -> None:
    world, replica = make()
    record = replica.dataset()
    assert replica.get("/readyz").status == 200
    (tmp_path / "data").rename(tmp_path / "away")
    (tmp_path / "data").mkdir()
    part = b'Content-Disposition: form-data; name="file"; filename="a.csv"'
    upload = b"--b\r\n%b\r\n\r\ntext,label\na,b\r\n--b--\r\n" % part
    multipart = {"content-type": "multipart/form-data; boundary=b"}
    for answered in (
        replica.ask("/datasets", upload, headers=multipart),
        replica.ask("/finetune", json.dumps({"dataset": record.id, "register_as": "m"}).encode()),
        replica.get(f"/datasets/{record.id}/preview"),
        replica.get("/models/m/versions/1/files/labels.json"),
        replica.delete("/models/m/versions/2"),
        replica.delete(f"/datasets/{record.id}"),
    ):
        assert (answered.status, answered.document["code"]) == (503, "storage_unavailable"), answered.body
        assert answered.headers["retry-after"]
    probe = replica.get("/readyz")
    assert probe.status == 503 and "not mounted" in probe.document["reason"]
    assert list((tmp_path / "data").iterdir()) == []
    assert replica.get("/models/m").status == 200 and replica.get("/livez").status == 200
    (tmp_path / "data").rmdir()
    (tmp_path / "away").rename(tmp_path / "data")
    assert replica.delete("/models/m/versions/2").status == 204
    assert replica.get("/readyz").status == 200
    assert replica.get("/models/m/versions/1/files/labels.json").status == 200
    assert [version.version for version in world.registry.model("default", "m").versions] == [3, 1]


def test_a_file_that_was_altered_is_not_shown(make: Callable[..., tuple[World, Replica]]) -> None:
    world, replica = make()
    folder = world.store.root / "models/default/m/1"
    assert replica.get("/models/m/versions/1/files/labels.json").status == 200
    for name, path in (("labels.json", "files/labels.json"), ("manifest.json", "files/calibration.json")):
        file = folder / name
        before = file.read_bytes()
        altered = before.replace(b"a", b"b", 1) if name == "labels.json" else before + b" "
        file.write_bytes(altered)
        answered = replica.get(f"/models/m/versions/1/{path}")
        assert (answered.status, answered.document["code"]) == (409, "artifact_invalid")
        if name == "manifest.json":
            assert replica.get("/models/m/versions/1").status == 409
        file.write_bytes(before)
        assert replica.get(f"/models/m/versions/1/{path}").status == 200
