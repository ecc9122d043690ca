"""What the worker does with a run whose supervision fails in an unforeseen way."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune.data.store import DatasetStore
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec, JobStatus, Lease
from finetune.jobs.store import JobStore
from finetune.worker.claim_loop import Worker
from finetune.worker.metrics import WorkerMetrics
from finetune.worker.supervisor import Ledger, Supervisor, Timing
from model_registry.db import Database
from model_registry.errors import DatabaseUnavailable
from model_registry.registry import Registry
from model_registry.store import FileStore


class Failing:
    """A supervisor that ends in an error of its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self) -> str:
        raise self.error


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def worker(database: Database, jobs: JobStore, tmp_path: Path) -> Worker:
    ledger = Ledger(jobs, Registry(database), FileStore(tmp_path / "store"), WorkerMetrics())
    return Worker(
        "w",
        ledger,
        DatasetStore(database),
        backbones={},
        profile=WorkerProfile(),
        data_dir=tmp_path,
        timing=Timing(60, 10, 60, 10),
        poll_s=1,
    )


@pytest.fixture
def lease(jobs: JobStore) -> Lease:
    jobs.enqueue("default", JobSpec(dataset="ds_1", backbone="tiny", register_as="m"), is_data_ready=True)
    claimed = jobs.claim("w", lease_s=60)
    assert claimed is not None
    return claimed[0]


def supervised(worker: Worker, lease: Lease, error: Exception) -> str:
    supervisor: Supervisor = Failing(error)  # type: ignore[assignment]
    return worker._supervised(supervisor, lease)


def test_an_error_that_nobody_foresaw_fails_the_job_and_not_the_worker(
    worker: Worker, jobs: JobStore, lease: Lease
) -> None:
    refused = sa.exc.IntegrityError("INSERT INTO models", None, Exception("secret of the database"))
    assert supervised(worker, lease, refused) == "failed"
    job = jobs.get("default", lease.job_id)
    assert job.status is JobStatus.FAILED and job.error is not None
    assert job.error["code"] == "internal_error" and "IntegrityError" in job.error["message"]
    assert "secret" not in str(job.error)


def test_one_whose_lease_is_gone_is_left_to_its_new_holder(worker: Worker, jobs: JobStore, lease: Lease) -> None:
    jobs.requeue(lease, "another worker", charge_attempt=False)
    assert supervised(worker, lease, KeyError("x")) == "lost"
    assert jobs.get("default", lease.job_id).status is JobStatus.QUEUED


def test_a_database_that_is_away_is_the_loops_affair(worker: Worker, lease: Lease) -> None:
    with pytest.raises(DatabaseUnavailable):
        supervised(worker, lease, DatabaseUnavailable("away"))
