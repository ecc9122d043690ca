"""A worker whose data directory is away leaves the queue alone, and takes its jobs when it is back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.data.store import DatasetStore
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec
from finetune.jobs.store import JobStore
from finetune.worker.claim_loop import Worker
from finetune.worker.metrics import WorkerMetrics
from finetune.worker.supervisor import Ledger, Timing
from model_registry.data_folder import DataFolder
from model_registry.db import Database
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.store import FileStore


class OneTurn(Worker):
    """Ends where another would wait."""

    def _pause(self, seconds: float) -> None:
        self.stop()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    migrate(database)
    yield database
    database.dispose()


def test_no_job_is_claimed_while_the_data_directory_is_away(database: Database, tmp_path: Path) -> None:
    root, jobs = tmp_path / "data", JobStore(database)
    folder = DataFolder.open(root, database)
    ledger = Ledger(jobs, Registry(database), FileStore(root / "store", is_there=True), WorkerMetrics())
    spec = JobSpec(dataset="ds_1", backbone="unknown", register_as="m")
    job = jobs.enqueue("default", spec, is_data_ready=True).id

    def turn() -> str:
        timing = Timing(60, 10, 60, 10)
        worker = OneTurn(
            "w",
            ledger,
            DatasetStore(database),
            backbones={},
            profile=WorkerProfile(),
            data_dir=root,
            folder=folder,
            timing=timing,
            poll_s=0.1,
        )
        worker.run_forever()
        return jobs.get("default", job).status

    root.rename(tmp_path / "away")
    assert turn() == "queued" and not root.exists()
    (tmp_path / "away").rename(root)
    assert turn() == "failed", "it was claimed, and this worker has no such backbone"
