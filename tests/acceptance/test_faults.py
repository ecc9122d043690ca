"""Training processes and workers that die, hang or are told to stop: a job ends once, and with one version."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import Home, Service
from tests.acceptance.processes import LEASE_S, Client, Worker, is_running, problem, until

# Some seconds of training with a checkpoint every 20 steps: time enough to disturb it.
STEPS_BETWEEN = 20
# The export of the graph is left out: it takes as long.
LONG: dict[str, Any] = {
    "method": "full",
    "epochs": 80,
    "eval_every": 5,
    "early_stopping": {"patience": 1000},
    "export": [],
}


def test_a_killed_training_process_is_replaced_and_the_job_goes_on(
    lone: Service, lone_words: str, start_worker: Callable[[], Worker]
) -> None:
    client, worker = lone.client, start_worker()
    job_id = client.finetune(lone_words, "child-killed", **LONG)
    client.wait_event(job_id, "checkpoint_saved")
    child = worker.training_child()
    os.kill(child, signal.SIGKILL)
    job = client.wait(job_id)
    assert job["attempt"] == 2
    assert not is_running(child)
    events = client.events(job_id)
    lost = next(event for event in events if "SIGKILL" in event["message"])
    assert (lost["level"], lost["data"]["status"]) == ("warn", "queued")
    assert resumed_step(events) >= STEPS_BETWEEN
    assert_one_version(client, "child-killed", job)


def test_a_killed_worker_loses_its_job_to_the_next_one(
    lone: Service, lone_words: str, start_worker: Callable[[], Worker]
) -> None:
    client, worker = lone.client, start_worker()
    job_id = client.finetune(lone_words, "worker-killed", **LONG)
    client.wait_event(job_id, "checkpoint_saved")
    child = worker.training_child()
    worker.kill()
    until(lambda: not is_running(child), within_s=10, what="the training process to end with its worker")
    killed = time.monotonic()
    start_worker()
    until(lambda: client.job(job_id)["attempt"] == 2, within_s=LEASE_S + 30, what="the next worker to take the job")
    assert client.job(job_id)["status"] == "running"
    assert time.monotonic() - killed < LEASE_S + 30
    job = client.wait(job_id)
    assert resumed_step(client.events(job_id)) >= STEPS_BETWEEN
    assert_one_version(client, "worker-killed", job)


@pytest.mark.slow
def test_a_worker_whose_lease_was_taken_cannot_write(
    lone: Service, lone_words: str, start_worker: Callable[[], Worker]
) -> None:
    client, old = lone.client, start_worker()
    job_id = client.finetune(lone_words, "lease-taken", **LONG)
    client.wait_event(job_id, "checkpoint_saved")
    child = old.training_child()
    pause(old.pid, child, database=lone.home.data / "polyhead.db")
    try:
        new = start_worker()  # takes longer than the lease
        until(lambda: client.job(job_id)["attempt"] == 2, within_s=LEASE_S + 30, what="the new worker's attempt")
        taken = client.events(job_id)[-1]["seq"]
        client.wait_event(job_id, "checkpoint_saved", after=taken)
    finally:
        for pid in (child, old.pid):
            os.kill(pid, signal.SIGCONT)
    until(lambda: "lease lost" in old.log(), within_s=20, what="the old worker to notice")
    until(lambda: not is_running(child), within_s=10, what="the old training process to be killed")
    job = client.wait(job_id)
    assert job["attempt"] == 2
    after = [event for event in client.events(job_id) if event["seq"] > taken]
    steps = [event["data"]["step"] for event in after if event["type"] == "checkpoint_saved"]
    assert steps == sorted(set(steps))  # a second writer would report steps of its own in between
    assert [event["type"] for event in after].count("model_registered") == 1
    assert_one_version(client, "lease-taken", job)
    # The old worker is as good as any for the next job.
    assert new.terminate() == 0
    client.train(lone_words, "lease-taken", method="baseline")
    assert old.is_alive


@pytest.mark.slow
def test_a_worker_told_to_stop_gives_its_job_back_uncharged(
    lone: Service, lone_words: str, start_worker: Callable[[], Worker]
) -> None:
    client, worker = lone.client, start_worker()
    job_id = client.finetune(lone_words, "worker-stopped", **LONG)
    client.wait_event(job_id, "checkpoint_saved")
    assert worker.terminate() == 0
    job = client.job(job_id)
    assert (job["status"], job["attempt"], job["error"]) == ("queued", 0, None)
    start_worker()
    job = client.wait(job_id)
    assert job["attempt"] == 1
    assert resumed_step(client.events(job_id)) >= STEPS_BETWEEN
    assert_one_version(client, "worker-stopped", job)


@pytest.mark.slow
def test_a_paused_job_frees_its_worker_outlives_it_and_goes_on(
    lone: Service, lone_words: str, start_worker: Callable[[], Worker]
) -> None:
    client, worker = lone.client, start_worker()
    job_id = client.finetune(lone_words, "paused", **LONG)
    client.wait_event(job_id, "checkpoint_saved")
    child = worker.training_child()
    paused = client.http.post(f"/finetune/{job_id}/pause")
    assert (paused.status_code, paused.json()["status"]) == (200, "pausing")
    until(lambda: client.job(job_id)["status"] == "paused", within_s=30, what="the run to save and let go")
    until(lambda: not is_running(child), within_s=5, what="the training process to end")
    meanwhile = client.train(lone_words, "meanwhile", method="baseline")  # by the worker that the pause has freed
    worker.kill()
    leftover = lone.home.data / "work" / meanwhile["id"]
    leftover.mkdir(exist_ok=True)
    problem(client.http.post(f"/finetune/{job_id}/pause"), 409, "job_not_pausable")
    assert (client.job(job_id)["status"], client.job(job_id)["attempt"]) == ("paused", 0)
    assert client.http.post(f"/finetune/{job_id}/resume").json()["status"] == "queued"
    problem(client.http.post(f"/finetune/{job_id}/resume"), 409, "job_not_resumable")
    start_worker()
    job = client.wait(job_id)
    assert job["attempt"] == 1
    assert not leftover.exists(), "a worker that starts removes what jobs that are over have left"
    assert resumed_step(client.events(job_id)) >= STEPS_BETWEEN
    assert_one_version(client, "paused", job)
    problem(client.http.post(f"/finetune/{job_id}/pause"), 409, "job_not_pausable")


@pytest.mark.slow
def test_a_job_that_loses_every_run_fails_and_says_so(
    lone: Service, lone_words: str, start_worker: Callable[[], Worker]
) -> None:
    client, worker = lone.client, start_worker()
    job_id = client.finetune(lone_words, "hopeless", **LONG)
    for attempt in (1, 2, 3):
        # Until its training process speaks: one that still waits would be replaced, and no attempt would be lost.
        until(
            lambda attempt=attempt: any(  # type: ignore[misc]
                (event["attempt"], event["type"]) == (attempt, "phase_changed") for event in client.events(job_id)
            ),
            within_s=60,
            what=f"attempt {attempt}",
        )
        os.kill(worker.training_child(), signal.SIGKILL)
    job = client.wait(job_id, status="failed")
    assert (job["error"]["code"], job["result"]) == ("stalled", None)
    assert "hopeless" not in {model["id"] for model in client.get("/models")["data"]}
    client.train(lone_words, "after-hopeless", method="baseline")


@pytest.mark.slow
def test_checkpoints_that_find_no_space_are_left_out_and_the_job_succeeds(
    lone: Service, lone_words: str, start_worker: Callable[[], Worker]
) -> None:
    client = lone.client
    with small_disk(
        lone.home, kib=340
    ):  # the artefact (some 280 KiB) fits, a checkpoint with its optimiser (370) does not
        start_worker()
        job = client.train(lone_words, "no-checkpoints", method="full", epochs=4, export=[])
    events = client.events(job["id"])
    warnings = [event for event in events if event["data"].get("code") == "checkpoint_not_saved"]
    assert warnings and warnings[0]["level"] == "warn"
    assert "checkpoint_saved" not in {event["type"] for event in events}
    assert client.wait_served("no-checkpoints", "a good film", within_s=30)["version"] == 1


@pytest.mark.slow
def test_a_disk_without_room_for_the_artefact_ends_the_job_and_nothing_else(
    lone: Service, lone_words: str, start_worker: Callable[[], Worker]
) -> None:
    client = lone.client
    with small_disk(lone.home, kib=64):
        start_worker()
        job = client.wait(client.finetune(lone_words, "no-room", method="full", epochs=1), status="failed")
        assert (job["error"]["code"], job["error"]["retryable"]) == ("storage_full", True)
        assert job["error"]["hint"]
        assert job["result"] is None
        assert client.http.get("/readyz").status_code == 200
    job = client.train(lone_words, "no-room", method="full", epochs=1)
    assert_one_version(client, "no-room", job)


def resumed_step(events: list[dict[str, Any]]) -> int:
    """From where the training loop went on."""
    return int(next(e["data"]["step"] for e in events if e["type"] == "resumed" and "step" in e["data"]))


def assert_one_version(client: Client, model: str, job: dict[str, Any]) -> None:
    """One version is ready, it is the job's, it serves, and a number that was only reserved cannot be had."""
    versions = client.versions(model)
    ready = [version for version in versions if version["status"] == "ready"]
    assert [version["version"] for version in ready] == [job["result"]["version"]]
    assert ready[0]["job_id"] == job["id"]
    assert client.wait_served(model, "a good film", within_s=30)["version"] == job["result"]["version"]
    for version in versions:
        if version["status"] != "ready":
            assert client.predict(f"{model}:{version['version']}", ["a good film"]).status_code == 404


def pause(*pids: int, database: Path) -> None:
    """SIGSTOP, at a moment when none of them holds the database's write lock."""

    def is_paused() -> bool:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        connection = sqlite3.connect(database, timeout=0.5, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            return False
        finally:
            connection.close()
        return True

    until(is_paused, within_s=20, what="a moment to pause the worker")


@contextmanager
def small_disk(home: Home, *, kib: int) -> Iterator[None]:
    """A file system of `kib` KiB where workers keep the state of runs."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = home.data / "work"
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
