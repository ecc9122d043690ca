"""Jobs over SQLite and PostgreSQL with a clock in hand: leases, fencing, cancel, attempts, idempotency."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from finetune.data.errors import DatasetInUse, DatasetNotFound
from finetune.data.store import DatasetStore
from finetune.jobs.errors import (
    IdempotencyMismatch,
    JobNotCancellable,
    JobNotDeletable,
    JobNotFound,
    JobNotPausable,
    JobNotResumable,
    LeaseLost,
)
from finetune.jobs.records import JobFailure, JobSpec, JobStatus, Lease
from finetune.jobs.store import JobStore
from model_registry.db import Database
from model_registry.tables import deletions, job_events

SPEC = JobSpec(dataset="ds_1", backbone="tiny", register_as="m")
LEASE_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(database: Database) -> Clock:
    clock = Clock()
    database._clock = clock
    return clock


@pytest.fixture
def store(database: Database, clock: Clock) -> JobStore:
    return JobStore(database, max_attempts=3)


def enqueue(store: JobStore, clock: Clock, **options: Any) -> str:
    clock.time += 1
    return store.enqueue("default", SPEC, is_data_ready=True, **options).id


def claim(store: JobStore, worker: str = "w1") -> Lease:
    claimed = store.claim(worker, lease_s=LEASE_S)
    assert claimed is not None
    return claimed[0]


def test_jobs_are_claimed_oldest_first_and_once(store: JobStore, clock: Clock) -> None:
    ids = [enqueue(store, clock) for _ in range(3)]
    assert [claim(store).job_id for _ in ids] == ids
    assert store.claim("w1", lease_s=LEASE_S) is None


def end(store: JobStore, clock: Clock, **options: Any) -> str:
    job = enqueue(store, clock, **options)
    store.finish(claim(store), JobStatus.SUCCEEDED)
    return job


def test_a_job_that_has_ended_goes_with_its_events_and_a_repeat_does_nothing(
    store: JobStore, clock: Clock, database: Database
) -> None:
    job = end(store, clock, idempotency_key="k", request_sha256="0")
    for _ in range(2):
        store.delete("default", job, actor="ann", reason="old")
        with pytest.raises(JobNotFound):
            store.get("default", job)
    with database.read() as connection:
        assert connection.execute(job_events.select()).all() == []
        assert [(row.kind, row.name, row.actor) for row in connection.execute(deletions.select())] == [
            ("job", job, "ann")
        ]
    assert enqueue(store, clock, idempotency_key="k", request_sha256="0") != job
    assert store.unknown([job, "ft_none"]) == {job, "ft_none"}


def test_a_job_that_has_not_ended_stays(store: JobStore, clock: Clock) -> None:
    waiting = enqueue(store, clock)
    with pytest.raises(JobNotDeletable, match="queued; cancel it"):
        store.delete("default", waiting, actor="ann")
    lease = claim(store)
    for ask in (lambda: None, lambda: store.request_pause("default", waiting)):
        ask()
        with pytest.raises(JobNotDeletable):
            store.delete("default", waiting, actor="ann")
    assert store.unfinished([waiting]) == {waiting}
    store.finish(lease, JobStatus.FAILED, failure=JobFailure(code="x", message="x"))
    for tenant, job in (("acme", waiting), ("default", "ft_none")):
        with pytest.raises(JobNotFound):
            store.delete(tenant, job, actor="ann")
    store.delete("default", waiting, actor="ann")
    assert store.unfinished([waiting]) == set()


def test_a_dataset_is_needed_by_jobs_in_whatever_part_until_they_end(
    store: JobStore, clock: Clock, database: Database
) -> None:
    ids = []
    for field in ("dataset", "validation_dataset", "test_dataset"):
        clock.time += 1
        spec = SPEC.model_copy(update={"dataset": "ds_other", field: "ds_1"})
        ids.append(store.enqueue("default", spec, is_data_ready=field == "dataset").id)

    def users() -> list[str]:
        with database.read() as connection:
            return store.users_of(connection, "ds_1")

    assert users() == ids and store.registering("default", "m") == ids and store.registering("acme", "m") == []
    for job in ids[1:]:
        store.request_cancel("default", job, keep_best=False)
    assert users() == ids[:1]
    store.finish(claim(store), JobStatus.SUCCEEDED)
    assert users() == [] and store.registering("default", "m") == []


def test_no_job_begins_with_a_dataset_that_is_being_deleted(store: JobStore, clock: Clock, database: Database) -> None:
    """Of a request and a deletion at once one is refused: the job has its data, or there is no job."""
    data = DatasetStore(database)
    for _ in range(5):
        record = data.create("default", filename="x.csv", file_format="csv", sha256="0" * 64, size_bytes=1)
        spec = SPEC.model_copy(update={"dataset": record.id})
        gate, refused = threading.Barrier(2), set[str]()

        def attempt(name: str, act: Callable[[], object], gate: threading.Barrier, refused: set[str]) -> None:
            gate.wait()
            try:
                act()
            except (DatasetInUse, DatasetNotFound):
                refused.add(name)

        start = functools.partial(store.enqueue, "default", spec, is_data_ready=True)
        delete = functools.partial(data.delete, "default", record.id, needed_by=store.users_of)
        threads = [
            threading.Thread(target=attempt, args=(name, act, gate, refused))
            for name, act in (("start", start), ("delete", delete))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 1
        assert (record.id in data.unknown([record.id])) == ("start" in refused)


def test_of_many_claimers_at_once_each_job_goes_to_one(store: JobStore, clock: Clock) -> None:
    ids = {enqueue(store, clock) for _ in range(4)}
    claimed: list[str] = []
    gate = threading.Barrier(8)

    def race(number: int) -> None:
        gate.wait()
        found = store.claim(f"w{number}", lease_s=LEASE_S)
        if found is not None:
            claimed.append(found[0].job_id)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(ids)


def test_a_lease_that_ran_out_is_taken_over_and_the_old_holder_cannot_write(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    old = claim(store)
    clock.time += LEASE_S - 1
    assert store.claim("w2", lease_s=LEASE_S) is None
    clock.time += 2
    new = claim(store, "w2")
    assert (new.job_id, new.attempt) == (job_id, 2)
    assert new.token > old.token
    before = store.events("default", job_id)
    for write in _writes(store, old):
        with pytest.raises(LeaseLost):
            write()
    assert store.events("default", job_id) == before
    store.finish(new, JobStatus.SUCCEEDED)
    with pytest.raises(LeaseLost):
        store.finish(new, JobStatus.FAILED)


def _writes(store: JobStore, lease: Lease) -> list[Callable[[], Any]]:
    failure = JobFailure(code="x", message="x")
    return [
        lambda: store.heartbeat(lease, lease_s=LEASE_S),
        lambda: store.record(lease, "progress", "x"),
        lambda: store.set_columns(lease, phase="training"),
        lambda: store.finish(lease, JobStatus.SUCCEEDED, result={"name": "m", "version": 9}),
        lambda: store.finish(lease, JobStatus.FAILED, failure=failure),
        lambda: store.requeue(lease, "x", charge_attempt=True),
    ]


def test_heartbeats_keep_the_lease(store: JobStore, clock: Clock) -> None:
    enqueue(store, clock)
    lease = claim(store)
    for _ in range(5):
        clock.time += LEASE_S - 1
        store.heartbeat(lease, lease_s=LEASE_S)
    assert store.claim("w2", lease_s=LEASE_S) is None


def test_a_job_lost_too_often_fails_as_stalled(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    for _ in range(3):
        claim(store)
        clock.time += LEASE_S + 1
    assert store.claim("w1", lease_s=LEASE_S) is None
    job = store.get("default", job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None and job.error["code"] == "stalled"


def test_requeueing_may_or_may_not_charge_an_attempt(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    for _ in range(5):
        assert store.requeue(claim(store), "planned", charge_attempt=False) is JobStatus.QUEUED
    assert store.get("default", job_id).attempt == 0
    assert store.requeue(claim(store), "lost", charge_attempt=True) is JobStatus.QUEUED
    assert store.requeue(claim(store), "lost", charge_attempt=True) is JobStatus.QUEUED
    assert store.requeue(claim(store), "lost", charge_attempt=True) is JobStatus.FAILED
    assert store.get("default", job_id).status is JobStatus.FAILED


def test_cancel_ends_what_waits_and_tells_what_runs(store: JobStore, clock: Clock) -> None:
    waiting = enqueue(store, clock)
    assert store.request_cancel("default", waiting, keep_best=True).status is JobStatus.CANCELLED
    running = enqueue(store, clock)
    lease = claim(store)
    assert store.request_cancel("default", running, keep_best=True).status is JobStatus.CANCELLING
    beat = store.heartbeat(lease, lease_s=LEASE_S)
    assert (beat.cancel_requested, beat.keep_best) == (True, True)
    store.finish(lease, JobStatus.CANCELLED)
    for job_id in (waiting, running):
        with pytest.raises(JobNotCancellable):
            store.request_cancel("default", job_id, keep_best=False)


@pytest.mark.parametrize("wanted", [(False, True), (True, False), (False, False), (False, True, True)])
def test_a_cancel_that_keeps_nothing_holds_whatever_comes_after_it(
    store: JobStore, clock: Clock, wanted: tuple[bool, ...]
) -> None:
    job_id = enqueue(store, clock)
    lease = claim(store)
    for keep_best in wanted:
        store.request_cancel("default", job_id, keep_best=keep_best)
    assert store.asked(lease).discards
    assert store.heartbeat(lease, lease_s=LEASE_S).discards
    told = [event.data["keep_best"] for event in store.events("default", job_id) if "keep_best" in event.data]
    assert told == [wanted[0], *([False] if wanted[0] else [])], "an event for each change, and for nothing else"


def test_a_job_whose_worker_is_gone_is_cancelled_at_once(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    lease = claim(store)
    clock.time += LEASE_S + 1
    assert store.request_cancel("default", job_id, keep_best=True).status is JobStatus.CANCELLED
    with pytest.raises(LeaseLost):
        store.finish(lease, JobStatus.SUCCEEDED)


def test_a_cancelled_run_that_lets_go_does_not_come_back(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    lease = claim(store)
    store.request_cancel("default", job_id, keep_best=False)
    assert store.requeue(lease, "the worker stops", charge_attempt=False) is JobStatus.CANCELLED
    assert store.claim("w2", lease_s=LEASE_S) is None
    assert store.get("default", job_id).status is JobStatus.CANCELLED


def test_what_a_worker_that_is_gone_was_asked_for_is_done_without_any_worker(store: JobStore, clock: Clock) -> None:
    cancelled, paused, running = (enqueue(store, clock) for _ in range(3))
    for _ in range(3):
        claim(store)
    store.request_cancel("default", cancelled, keep_best=True)
    store.request_pause("default", paused)
    store.settle()
    assert store.get("default", cancelled).status is JobStatus.CANCELLING, "its worker may still end it"
    assert store.get("default", paused).status is JobStatus.PAUSING
    clock.time += LEASE_S + 1
    store.settle()
    found = {job_id: store.get("default", job_id).status for job_id in (cancelled, paused, running)}
    assert list(found.values()) == [JobStatus.CANCELLED, JobStatus.PAUSED, JobStatus.RUNNING]
    store.request_resume("default", paused)
    assert {claim(store).job_id, claim(store).job_id} == {paused, running}


def test_a_cancelled_job_whose_worker_died_ends(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    claim(store)
    store.request_cancel("default", job_id, keep_best=False)
    clock.time += LEASE_S + 1
    assert store.claim("w2", lease_s=LEASE_S) is None
    assert store.get("default", job_id).status is JobStatus.CANCELLED


def test_a_queued_job_is_paused_out_of_the_queue_and_back(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    assert store.request_pause("default", job_id).status is JobStatus.PAUSED
    assert store.claim("w1", lease_s=LEASE_S) is None
    assert store.request_resume("default", job_id).status is JobStatus.QUEUED
    assert claim(store).job_id == job_id


def test_a_running_job_is_paused_by_its_worker_without_losing_an_attempt(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    lease = claim(store)
    assert not store.heartbeat(lease, lease_s=LEASE_S).pause_requested
    assert store.request_pause("default", job_id).status is JobStatus.PAUSING
    assert [job.id for job in store.page("default", status=JobStatus.PAUSING)] == [job_id]
    assert store.page("default", status=JobStatus.PAUSED) == []
    assert store.counts()["pausing"] == 1 and store.counts()["paused"] == 0
    assert store.heartbeat(lease, lease_s=LEASE_S).pause_requested
    store.record(lease, "checkpoint_saved", "the worker still writes")
    assert store.requeue(lease, "stopped", charge_attempt=True) is JobStatus.PAUSED
    job = store.get("default", job_id)
    assert (job.status, job.attempt, job.worker_id, job.phase) == (JobStatus.PAUSED, 0, None, None)
    assert [job.id for job in store.page("default", status=JobStatus.PAUSED)] == [job_id]
    told = [event.data["status"] for event in store.events("default", job_id) if "status" in event.data]
    assert told == ["queued", "running", "pausing", "paused"]
    with pytest.raises(LeaseLost):
        store.record(lease, "progress", "too late")


def test_a_paused_job_whose_worker_died_stays_paused_until_it_is_resumed(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    claim(store)
    store.request_pause("default", job_id)
    clock.time += 100 * LEASE_S
    assert store.claim("w2", lease_s=LEASE_S) is None
    store.request_resume("default", job_id)
    assert claim(store, "w2").job_id == job_id
    assert "resumed" in [event.type for event in store.events("default", job_id)]


def test_resuming_takes_the_lease_from_a_worker_that_still_winds_down(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    old = claim(store)
    store.request_pause("default", job_id)
    store.request_resume("default", job_id)
    for write in _writes(store, old):
        with pytest.raises(LeaseLost):
            write()
    assert claim(store, "w2").token > old.token


def test_the_time_of_a_pause_does_not_count_as_running(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    lease = claim(store)
    clock.time += 5
    store.request_pause("default", job_id)
    store.heartbeat(lease, lease_s=LEASE_S)
    store.requeue(lease, "stopped", charge_attempt=False)
    clock.time += 1000
    store.request_resume("default", job_id)
    claim(store)
    job = store.get("default", job_id)
    assert job.heartbeat_at is not None and job.started_at is not None
    assert job.heartbeat_at - job.started_at == pytest.approx(5)


def test_the_time_between_two_attempts_does_not_count_as_running(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    for idle_s in (100.0, LEASE_S + 50.0):  # handed back, then lost
        lease = claim(store)
        clock.time += 5
        store.heartbeat(lease, lease_s=LEASE_S)
        if idle_s == 100.0:
            store.requeue(lease, "the worker stops", charge_attempt=False)
        clock.time += idle_s
    claim(store)
    job = store.get("default", job_id)
    assert job.heartbeat_at is not None and job.started_at is not None
    assert job.heartbeat_at - job.started_at == pytest.approx(10)


def test_a_run_that_ends_before_it_sees_the_pause_succeeds(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    lease = claim(store)
    store.request_pause("default", job_id)
    store.finish(lease, JobStatus.SUCCEEDED, result={"name": "m", "version": 1})
    assert store.get("default", job_id).status is JobStatus.SUCCEEDED


def test_a_paused_job_can_be_cancelled(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    lease = claim(store)
    store.request_pause("default", job_id)
    assert store.request_cancel("default", job_id, keep_best=True).status is JobStatus.CANCELLED
    with pytest.raises(LeaseLost):
        store.heartbeat(lease, lease_s=LEASE_S)


def test_jobs_that_are_over_can_be_told_from_others(store: JobStore, clock: Clock) -> None:
    over, paused, queued = (enqueue(store, clock) for _ in range(3))
    store.request_cancel("default", over, keep_best=False)
    store.request_pause("default", paused)
    assert store.ended([over, paused, queued, "unknown"]) == {over}


def test_pausing_and_resuming_in_any_other_state_is_refused_with_what_to_do(store: JobStore, clock: Clock) -> None:
    validating = store.enqueue("default", SPEC, is_data_ready=False).id
    cancelling, running = enqueue(store, clock), enqueue(store, clock)
    claim(store)
    store.request_cancel("default", cancelling, keep_best=True)
    lease = claim(store)
    store.finish(lease, JobStatus.SUCCEEDED)
    for job_id in (validating, cancelling, running):
        with pytest.raises(JobNotPausable, match="; "):
            store.request_pause("default", job_id)
        with pytest.raises(JobNotResumable, match="only a paused job"):
            store.request_resume("default", job_id)
    paused = enqueue(store, clock)
    store.request_pause("default", paused)
    with pytest.raises(JobNotPausable, match="resume it"):
        store.request_pause("default", paused)


def test_events_are_numbered_without_gaps(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    lease = claim(store)
    for number in range(20):
        store.record(lease, "progress", str(number))
    events = store.events("default", job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.seq for event in store.events("default", job_id, after=5, limit=3)] == [6, 7, 8]
    assert store.get("default", job_id).last_seq == events[-1].seq


def test_a_failed_transaction_leaves_no_event(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    lease = claim(store)
    before = store.events("default", job_id)
    with pytest.raises(ZeroDivisionError), store.fenced(lease) as connection:
        store.record_in(connection, lease, "model_registered", "m:1")
        raise ZeroDivisionError
    assert store.events("default", job_id) == before


def test_the_same_key_and_request_give_the_same_job_also_at_once(store: JobStore, clock: Clock) -> None:
    found: list[str] = []
    gate = threading.Barrier(8)

    def ask() -> None:
        gate.wait()
        options = {"idempotency_key": "k", "request_sha256": "a"}
        found.append(store.enqueue("default", SPEC, is_data_ready=True, **options).id)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert len(store.page("default")) == 1


def test_a_key_used_for_another_request_is_refused_until_it_is_forgotten(store: JobStore, clock: Clock) -> None:
    first = enqueue(store, clock, idempotency_key="k", request_sha256="a")
    with pytest.raises(IdempotencyMismatch):
        enqueue(store, clock, idempotency_key="k", request_sha256="b")
    assert store.enqueue("other", SPEC, is_data_ready=True, idempotency_key="k", request_sha256="b").id != first
    clock.time += 73 * 3600
    assert enqueue(store, clock, idempotency_key="k", request_sha256="b") != first


def test_waiting_for_data_ends_in_the_queue_or_in_failure(store: JobStore, clock: Clock) -> None:
    good, bad = (store.enqueue("default", SPEC, is_data_ready=False).id for _ in range(2))
    assert store.claim("w1", lease_s=LEASE_S) is None
    assert {job.id for job in store.waiting_for_data()} == {good, bad}
    store.leave_validation(good)
    store.leave_validation(bad, JobFailure(code="dataset_invalid", message="one class"))
    store.leave_validation(bad)  # too late: it has ended
    assert claim(store).job_id == good
    assert store.get("default", bad).status is JobStatus.FAILED


def test_pages_follow_each_other_without_gaps(store: JobStore, clock: Clock) -> None:
    ids = [enqueue(store, clock) for _ in range(7)]
    seen: list[str] = []
    after = None
    while page := store.page("default", after=after, limit=3):
        seen += [job.id for job in page]
        after = page[-1].id
    assert seen == ids[::-1]


def test_tenants_do_not_see_each_other(store: JobStore, clock: Clock) -> None:
    job_id = enqueue(store, clock)
    for call in (
        store.get,
        store.events,
        store.request_pause,
        store.request_resume,
        lambda tenant, id_: store.request_cancel(tenant, id_, keep_best=True),
    ):
        with pytest.raises(JobNotFound):
            call("other", job_id)
    assert store.page("other") == []


def test_counts_name_every_status(store: JobStore, clock: Clock) -> None:
    enqueue(store, clock)
    assert store.counts() == {status.value: int(status is JobStatus.QUEUED) for status in JobStatus}


# Workers


def test_a_worker_that_trains_is_heard_from(store: JobStore, clock: Clock) -> None:
    store.register_worker("w1", {"device": "cpu"})
    enqueue(store, clock)
    lease = claim(store)
    for _ in range(30):
        clock.time += LEASE_S - 1
        store.heartbeat(lease, lease_s=LEASE_S)
    assert store.live_worker_profile() == {"device": "cpu"}
    assert store.outlook().worker_last_seen == clock.time


def test_a_waiting_job_says_what_it_waits_for(store: JobStore, clock: Clock) -> None:
    first, second = (store.get("default", enqueue(store, clock)) for _ in range(2))
    checked = store.enqueue("default", SPEC, is_data_ready=False)
    never = store.outlook([first, second])
    assert (never.worker_last_seen, never.live_workers) == (None, 0)
    assert "ever" in str(never.why_waiting(first)) and "python -m finetune" in str(never.why_waiting(checked))
    store.register_worker("w1", {})
    seen = clock.time
    live = store.outlook([first, second])
    assert (live.worker_last_seen, live.live_workers) == (seen, 1)
    assert live.positions == {first.id: 0, second.id: 1}
    assert "next" in str(live.why_waiting(first)) and "1 job" in str(live.why_waiting(second))
    assert "checked" in str(live.why_waiting(checked))
    clock.time += 600
    gone = store.outlook([first])
    assert (gone.worker_last_seen, gone.live_workers) == (seen, 0)
    assert "600 s ago" in str(gone.why_waiting(first))
    running = store.get("default", claim(store).job_id)
    assert store.outlook([running]).why_waiting(running) is None
