"""Jobs in a real MLflow server, started for the test, and what a job gets when that server is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.jobs.records import FineTuneJob, JobEvent, JobSpec, JobStatus
from finetune.jobs.store import JobStore
from finetune.worker.tracking import MlflowSink, TrackingFailed, batches, flat
from model_registry.db import Database
from tests.acceptance.processes import free_port

SPEC = JobSpec(dataset="ds_1", backbone="tiny", register_as="m", metadata={"team": "news"})


def ended(status: JobStatus = JobStatus.SUCCEEDED, **changed: Any) -> FineTuneJob:
    values: dict[str, Any] = {
        "id": "ft_1",
        "tenant": "default",
        "status": status,
        "phase": None,
        "spec": SPEC,
        "attempt": 1,
        "plan": {"seed": 42, "lora": {"r": 16}, "methods": [{"method": "lora", "learning_rate": 5e-4}]},
        "max_attempts": 3,
        "worker_id": "w",
        "lease_token": 1,
        "lease_expires_at": None,
        "heartbeat_at": None,
        "cancel_requested_at": None,
        "cancel_keep_best": False,
        "progress": None,
        "best": None,
        "result": {"name": "m", "version": 3, "is_champion": True},
        "error": None,
        "evaluation": {"test": {"accuracy": 0.9, "macro_f1": 0.88, "ece_after": 0.02}},
        "last_seq": 9,
        "created_at": 1000.0,
        "started_at": 1001.0,
        "finished_at": 1060.0,
    }
    return FineTuneJob(**(values | changed))


def evaluations(count: int) -> list[JobEvent]:
    def event(step: int, split: str, values: dict[str, float]) -> JobEvent:
        data = {"split": split, "step": step, "epoch": step / 10, "values": values, "method": "lora"}
        return JobEvent(step, "ft_1", 1, 1000.0 + step, "info", "metrics", "…", data)

    steps = range(1, count + 1)
    return [
        event(step, split, {"loss": 1 / step} | ({"accuracy": 1 - 1 / step} if split == "validation" else {}))
        for step in steps
        for split in ("train", "validation")
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server on SQLite. `MLFLOW_BIN` may name a program outside this environment."""
    program = os.environ.get("MLFLOW_BIN") or shutil.which("mlflow", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs the program mlflow")
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [program, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while not _is_up(url):
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def asked(url: str, path: str, **parameters: Any) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/api/2.0/mlflow/{path}", params=parameters).raise_for_status().json())


def test_a_job_stands_in_mlflow_with_all_that_it_was(server: str) -> None:
    sink = MlflowSink(server, "an experiment of ours")
    run_id = sink.record(ended(), evaluations(700))  # more metrics than one request may hold
    run = asked(server, "runs/get", run_id=run_id)["run"]
    assert (run["info"]["status"], run["info"]["start_time"], run["info"]["end_time"]) == ("FINISHED", 1001000, 1060000)
    params = {item["key"]: item["value"] for item in run["data"]["params"]}
    assert params == {"seed": "42", "lora.r": "16", "lora.learning_rate": "0.0005"}
    tags = {item["key"]: item["value"] for item in run["data"]["tags"]}
    assert tags["polyhead.artifact"] == "models/default/m/3" and tags["metadata.team"] == "news"
    assert tags["polyhead.is_champion"] == "true"
    metrics = {item["key"]: item["value"] for item in run["data"]["metrics"]}
    assert metrics["test_accuracy"] == 0.9 and metrics["lora/validation_loss"] == pytest.approx(1 / 700)
    history = asked(server, "metrics/get-history", run_id=run_id, metric_key="lora/train_loss", max_results=1000)
    assert [item["step"] for item in history["metrics"]] == list(range(1, 701))


def test_a_second_job_joins_the_experiment(server: str) -> None:
    runs = [
        MlflowSink(server, "shared").record(ended(status), []) for status in (JobStatus.FAILED, JobStatus.CANCELLED)
    ]
    found = [asked(server, "runs/get", run_id=run_id)["run"]["info"] for run_id in runs]
    assert [info["status"] for info in found] == ["FAILED", "KILLED"]
    assert len({info["experiment_id"] for info in found}) == 1


def test_a_refusal_is_told_with_the_servers_words(server: str) -> None:
    job = replace(ended(), plan={"a bad key!?": 1})
    with pytest.raises(TrackingFailed, match=r"log-batch was answered with 400: .*a bad key"):
        MlflowSink(server, "shared").record(job, [])


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(TrackingFailed, match="ConnectError"):
        MlflowSink(f"http://127.0.0.1:{free_port()}", "x").record(ended(), [])


def test_batches_keep_to_the_servers_limits() -> None:
    job = replace(ended(), plan={f"p{number}": "x" * 9000 for number in range(250)})
    found = list(batches(job, evaluations(900)))
    assert [len(batch.get("params", [])) for batch in found if "params" in batch] == [100, 100, 50]
    assert max(len(batch.get("metrics", [])) for batch in found) == 1000
    assert all(len(param["value"]) == 6000 for batch in found for param in batch.get("params", []))


def test_numbers_that_json_lacks_are_left_out() -> None:
    event = replace(evaluations(1)[0], data={"split": "train", "values": {"loss": float("nan")}})
    assert not [batch for batch in batches(replace(ended(), evaluation=None), [event]) if "metrics" in batch]


def test_nested_values_have_dotted_names() -> None:
    assert dict(flat({"a": {"b": {"c": 1}}, "d": [1, 2]})) == {"a.b.c": "1", "d": "[1, 2]"}


def test_a_remark_on_an_ended_job_needs_the_lease_it_ended_under(database: Database) -> None:
    from finetune.jobs.errors import LeaseLost

    jobs = JobStore(database)
    job = jobs.enqueue("default", SPEC, is_data_ready=True)
    claimed = jobs.claim("w", lease_s=60)
    assert claimed is not None
    lease = claimed[0]
    jobs.finish(lease, JobStatus.SUCCEEDED)
    jobs.remark(lease, "not recorded", {"code": "tracking_failed"})
    last = jobs.events("default", job.id)[-1]
    assert (last.type, last.level, last.data) == ("data_warning", "warn", {"code": "tracking_failed"})
    assert jobs.get("default", job.id).status is JobStatus.SUCCEEDED
    with pytest.raises(LeaseLost):
        jobs.remark(replace(lease, token=lease.token + 1), "x", {})
