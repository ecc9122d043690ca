"""The job table: enqueue, claim, heartbeat, cancel, finish. All SQL about jobs is here.

Delivery is at least once, effects happen once: every write of a worker runs in a transaction that
first compares the lease token, so a worker that lost its lease cannot write (`LeaseLost`).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from finetune.data.errors import DatasetNotFound
from finetune.jobs.errors import (
    IdempotencyMismatch,
    JobNotCancellable,
    JobNotDeletable,
    JobNotFound,
    JobNotPausable,
    JobNotResumable,
    LeaseLost,
)
from finetune.jobs.records import (
    EventType,
    FineTuneJob,
    Heartbeat,
    JobChange,
    JobEvent,
    JobFailure,
    JobSpec,
    JobStatus,
    Lease,
    Outlook,
)
from model_registry.db import Database, ids_among
from model_registry.removal import record, was_deleted
from model_registry.tables import datasets, idempotency_keys, job_events, jobs, workers

_HELD = (JobStatus.RUNNING, JobStatus.CANCELLING)
# A worker may still write to a job that was paused under it, until it lets go; no other worker claims such a job.
_WRITABLE = (*_HELD, JobStatus.PAUSED)
_PAUSED = frozenset({JobStatus.PAUSING, JobStatus.PAUSED})
IDEMPOTENCY_HOURS = 72
WORKER_SILENT_S = 60.0  # after which a worker counts as gone
_DATASET_FIELDS = ("dataset", "validation_dataset", "test_dataset")
_IDS_IN_ONE_QUERY = 500


_WHY_NOT_PAUSABLE = {
    JobStatus.VALIDATING_FILES: "wait until its datasets are checked and it is queued, or cancel it",
    JobStatus.PAUSING: "it is saving; resume it to go on",
    JobStatus.PAUSED: "resume it to go on",
    JobStatus.CANCELLING: "it is ending",
    **dict.fromkeys((JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED), "it has ended already"),
}


class JobStore:
    def __init__(self, database: Database, *, max_attempts: int = 3) -> None:
        self._database = database
        self._max_attempts = max_attempts

    # Callers' side

    def enqueue(
        self,
        tenant: str,
        spec: JobSpec,
        *,
        is_data_ready: bool,
        idempotency_key: str | None = None,
        request_sha256: str = "",
    ) -> FineTuneJob:
        """Creates a job, or returns the one that the same key and request created before.

        Raises `IdempotencyMismatch` where the key came with another request, `DatasetNotFound` for a dataset that was
        deleted meanwhile.
        """
        try:
            return self._enqueue(tenant, spec, is_data_ready, idempotency_key, request_sha256)
        except sa.exc.IntegrityError:
            # Two requests with one key at the same moment: the other one has created the job by now.
            return self._enqueue(tenant, spec, is_data_ready, idempotency_key, request_sha256)

    def _enqueue(
        self, tenant: str, spec: JobSpec, is_data_ready: bool, idempotency_key: str | None, request_sha256: str
    ) -> FineTuneJob:
        with self._database.write() as connection:
            now = self._database.now(connection)
            if idempotency_key is not None:
                known = self._known_key(connection, tenant, idempotency_key, request_sha256, now)
                if known is not None:
                    return self._get(connection, tenant, known)
            _require_datasets(connection, tenant, spec)
            job_id = f"ft_{secrets.token_hex(12)}"
            status = JobStatus.QUEUED if is_data_ready else JobStatus.VALIDATING_FILES
            connection.execute(
                jobs.insert().values(
                    id=job_id,
                    tenant=tenant,
                    status=status,
                    spec=spec.stored(),
                    attempt=0,
                    max_attempts=self._max_attempts,
                    lease_token=0,
                    cancel_keep_best=False,
                    last_seq=0,
                    created_at=now,
                )
            )
            if idempotency_key is not None:
                connection.execute(
                    idempotency_keys.insert().values(
                        tenant=tenant,
                        key=idempotency_key,
                        request_sha256=request_sha256,
                        job_id=job_id,
                        created_at=now,
                    )
                )
            self._append(connection, job_id, "state_changed", f"the job is {status}", {"status": status})
            return self._get(connection, tenant, job_id)

    def get(self, tenant: str, job_id: str) -> FineTuneJob:
        """Raises `JobNotFound`; a foreign tenant's job is not found either."""
        with self._database.read() as connection:
            return self._get(connection, tenant, job_id)

    def page(
        self, tenant: str, *, after: str | None = None, limit: int = 20, status: JobStatus | None = None
    ) -> list[FineTuneJob]:
        """Newest first; `after` is the id of the last job of the page before."""
        query = sa.select(jobs).where(jobs.c.tenant == tenant)
        if status is not None:
            query = query.where(_has(status))
        with self._database.read() as connection:
            if after is not None:
                edge = self._get(connection, tenant, after)
                earlier = sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(
                    sa.literal(edge.created_at, sa.Double), sa.literal(edge.id)
                )
                query = query.where(earlier)
            rows = connection.execute(query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit))
            return [_job(row) for row in rows]

    def events(self, tenant: str, job_id: str, *, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        """Events with a larger `seq`, oldest first. Raises `JobNotFound`."""
        with self._database.read() as connection:
            self._get(connection, tenant, job_id)
            return self._events(connection, job_id, after=after, limit=limit)

    def outlook(self, of: Collection[FineTuneJob] = ()) -> Outlook:
        """When workers were last heard from, and the places of the given jobs in the queue."""
        waiting = [job.id for job in of if job.status is JobStatus.QUEUED]
        place = sa.func.row_number().over(order_by=jobs.c.created_at) - 1
        queue = sa.select(jobs.c.id, place.label("place")).where(jobs.c.status == JobStatus.QUEUED).subquery()
        with self._database.read() as connection:
            now = self._database.now(connection)
            is_live = sa.case((workers.c.heartbeat_at > now - WORKER_SILENT_S, 1), else_=0)
            seen = connection.execute(sa.select(sa.func.max(workers.c.heartbeat_at), sa.func.sum(is_live))).one()
            places = connection.execute(sa.select(queue).where(queue.c.id.in_(waiting))).all() if waiting else []
        return Outlook(now, seen[0], int(seen[1] or 0), {row.id: int(row.place) for row in places})

    def changes(self, seen: Mapping[str, int]) -> dict[str, JobChange]:
        """What became of these jobs, of any tenant, since the `seq` given for each, in one view of the database. Those
        that go on and have nothing new are left out."""
        changed: dict[str, JobChange] = {}
        ids = sorted(seen)
        with self._database.read() as connection:
            for start in range(0, len(ids), _IDS_IN_ONE_QUERY):
                part = ids[start : start + _IDS_IN_ONE_QUERY]
                query = sa.select(jobs.c.id, jobs.c.status, jobs.c.last_seq).where(jobs.c.id.in_(part))
                found = {row.id: row for row in connection.execute(query)}
                changed |= {job_id: JobChange([], 0, is_gone=True) for job_id in part if job_id not in found}
                for row in found.values():
                    is_final = JobStatus(row.status).is_final
                    if row.last_seq > seen[row.id] or is_final:
                        events = self._events(connection, row.id, after=seen[row.id], limit=1000)
                        changed[row.id] = JobChange(events, row.last_seq, is_final=is_final)
        return changed

    def counts(self) -> dict[str, int]:
        """Jobs by status, over all tenants; every status is present."""
        is_held = sa.case((jobs.c.worker_id.is_not(None), 1), else_=0)
        query = sa.select(jobs.c.status, is_held, sa.func.count()).group_by(jobs.c.status, is_held)
        found = {status.value: 0 for status in JobStatus}
        with self._database.read() as connection:
            for status, held, count in connection.execute(query):
                found[_shown(JobStatus(status), is_held=bool(held)).value] += count
        return found

    def ended(self, job_ids: Collection[str]) -> set[str]:
        """Those of the given jobs, of any tenant, that are over."""
        over = [status for status in JobStatus if status.is_final]
        query = sa.select(jobs.c.id).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(over))
        with self._database.read() as connection:
            return {row.id for row in connection.execute(query)}

    def request_cancel(self, tenant: str, job_id: str, *, keep_best: bool) -> FineTuneJob:
        """Ends a waiting job at once, and one whose worker is gone; tells a running one's worker.

        A job that was once cancelled without keeping anything stays so, whatever comes after it. Raises `JobNotFound`,
        `JobNotCancellable`.
        """
        with self._database.write() as connection:
            job = self._get(connection, tenant, job_id, lock=True)
            if job.status.is_final:
                raise JobNotCancellable(f"{job_id} has ended already: it is {job.status}")
            now = self._database.now(connection)
            if job.status in _HELD and (job.lease_expires_at or 0.0) >= now:
                is_first = job.status is not JobStatus.CANCELLING
                kept = keep_best and (is_first or job.cancel_keep_best)
                values: dict[str, Any] = {"status": JobStatus.CANCELLING, "cancel_requested_at": now}
                self._update(connection, job_id, cancel_keep_best=kept, **values)
                if is_first or kept != job.cancel_keep_best:
                    message = "cancel was requested" + ("" if kept else "; nothing of it is to be kept")
                    data = {"status": "cancelling", "keep_best": kept}
                    self._append(connection, job_id, "state_changed", message, data)
            elif job.status in _HELD:
                self._end_orphan(connection, job, now)
            else:
                self._update(connection, job_id, status=JobStatus.CANCELLED, cancel_requested_at=now, finished_at=now)
                self._append(connection, job_id, "cancelled", "cancelled before it ran", {"status": "cancelled"})
            return self._get(connection, tenant, job_id)

    def request_pause(self, tenant: str, job_id: str) -> FineTuneJob:
        """Takes a job out of the queue, or tells its worker to save and let go. Raises `JobNotFound`,
        `JobNotPausable`."""
        with self._database.write() as connection:
            job = self._get(connection, tenant, job_id, lock=True)
            if job.status not in {JobStatus.QUEUED, JobStatus.RUNNING}:
                raise JobNotPausable(f"{job_id} is {job.status}; {_WHY_NOT_PAUSABLE[job.status]}")
            self._update(connection, job_id, status=JobStatus.PAUSED)
            paused = self._get(connection, tenant, job_id)
            self._append(connection, job_id, "state_changed", "pause was requested", {"status": paused.status})
            return self._get(connection, tenant, job_id)

    def request_resume(self, tenant: str, job_id: str) -> FineTuneJob:
        """Puts a paused job back into the queue; a worker that still winds it down loses its lease. Raises
        `JobNotFound`, `JobNotResumable`."""
        with self._database.write() as connection:
            job = self._get(connection, tenant, job_id, lock=True)
            if job.status not in _PAUSED:
                raise JobNotResumable(f"{job_id} is {job.status}; only a paused job can be resumed")
            self._update(
                connection,
                job_id,
                status=JobStatus.QUEUED,
                phase=None,
                worker_id=None,
                lease_expires_at=None,
                lease_token=job.lease_token + 1,
            )
            self._append(connection, job_id, "resumed", "resume was requested", {"status": "queued"})
            return self._get(connection, tenant, job_id)

    def settle(self) -> None:
        """Ends cancelled jobs whose worker is gone, and lets go of paused ones, so that neither waits for a worker."""
        is_left = jobs.c.lease_expires_at < sa.bindparam("now")
        is_cancelling = jobs.c.status == JobStatus.CANCELLING
        is_pausing = (jobs.c.status == JobStatus.PAUSED) & jobs.c.worker_id.is_not(None)
        query = sa.select(jobs).where(is_left & (is_cancelling | is_pausing))
        with self._database.read() as connection:
            if connection.execute(query, {"now": self._database.now(connection)}).first() is None:
                return
        with self._database.write() as connection:
            now = self._database.now(connection)
            for row in connection.execute(query.with_for_update(skip_locked=True), {"now": now}).all():
                self._end_orphan(connection, _job(row), now)

    # Deleting

    def users_of(self, connection: sa.Connection, dataset_id: str) -> list[str]:
        """Jobs that need a dataset, the oldest first; in the transaction that would delete it."""
        uses = sa.or_(*(jobs.c.spec[field].as_string() == dataset_id for field in _DATASET_FIELDS))
        return [row.id for row in connection.execute(_unfinished().where(uses).order_by(jobs.c.created_at).limit(20))]

    def registering(self, tenant: str, name: str) -> list[str]:
        """Jobs that will register a version of `name`, the oldest first."""
        mine = (jobs.c.tenant == tenant) & (jobs.c.spec["register_as"].as_string() == name)
        with self._database.read() as connection:
            return [
                row.id for row in connection.execute(_unfinished().where(mine).order_by(jobs.c.created_at).limit(20))
            ]

    def unfinished(self, job_ids: Collection[str]) -> set[str]:
        """Those of the given jobs, of any tenant, that exist and have not ended."""
        with self._database.read() as connection:
            return ids_among(connection, _unfinished(), jobs.c.id, job_ids)

    def unknown(self, job_ids: Collection[str]) -> set[str]:
        """Those of the given ids, of any tenant, that no job has."""
        with self._database.read() as connection:
            return set(job_ids) - ids_among(connection, sa.select(jobs.c.id), jobs.c.id, job_ids)

    def delete(self, tenant: str, job_id: str, *, actor: str, reason: str = "") -> None:
        """Removes a job that has ended, with its events; a repeat is no error. Versions that it registered stay.

        Raises `JobNotFound`, `JobNotDeletable`.
        """
        with self._database.write() as connection:
            try:
                job = self._get(connection, tenant, job_id, lock=True)
            except JobNotFound:
                if was_deleted(connection, tenant, "job", job_id):
                    return
                raise
            if not job.status.is_final:
                raise JobNotDeletable(f"{job_id} is {job.status}; cancel it and wait for its end")
            connection.execute(job_events.delete().where(job_events.c.job_id == job_id))
            connection.execute(idempotency_keys.delete().where(idempotency_keys.c.job_id == job_id))
            connection.execute(jobs.delete().where(jobs.c.id == job_id))
            record(connection, tenant, "job", job_id, actor=actor, reason=reason, now=self._database.now(connection))

    # Waiting for data

    def waiting_for_data(self) -> list[FineTuneJob]:
        query = sa.select(jobs).where(jobs.c.status == JobStatus.VALIDATING_FILES)
        with self._database.read() as connection:
            return [_job(row) for row in connection.execute(query)]

    def leave_validation(self, job_id: str, failure: JobFailure | None = None) -> None:
        """Moves a job from `validating_files` to the queue, or ends it with what is wrong with its dataset."""
        status = JobStatus.QUEUED if failure is None else JobStatus.FAILED
        with self._database.write() as connection:
            now = self._database.now(connection)
            values: dict[str, Any] = {"status": status}
            if failure is not None:
                values |= {"error": failure.model_dump(mode="json"), "finished_at": now}
            waiting = jobs.update().where(jobs.c.id == job_id, jobs.c.status == JobStatus.VALIDATING_FILES)
            if connection.execute(waiting.values(**values)).rowcount:
                self._append(connection, job_id, "state_changed", f"the job is {status}", {"status": status})

    # Workers' side

    def claim(self, worker_id: str, *, lease_s: float) -> tuple[Lease, FineTuneJob] | None:
        """Takes the oldest queued job, or one whose lease ran out. None if there is nothing to do.

        A job that has used up its attempts, or was being cancelled, is ended here instead. `started_at` moves by the
        time in which no worker had the job, so that `max_seconds` counts running alone.
        """
        while True:
            with self._database.write() as connection:
                now = self._database.now(connection)
                is_orphaned = jobs.c.status.in_(_HELD) & (jobs.c.lease_expires_at < now)
                query = sa.select(jobs).where((jobs.c.status == JobStatus.QUEUED) | is_orphaned)
                row = connection.execute(
                    query.order_by(jobs.c.created_at).limit(1).with_for_update(skip_locked=True)
                ).first()
                if row is None:
                    return None
                job = _job(row)
                if self._end_hopeless(connection, job, now):
                    continue
                lease = Lease(job.id, worker_id, job.lease_token + 1, job.attempt + 1)
                self._update(
                    connection,
                    job.id,
                    status=JobStatus.RUNNING,
                    worker_id=worker_id,
                    lease_token=lease.token,
                    attempt=lease.attempt,
                    lease_expires_at=now + lease_s,
                    heartbeat_at=now,
                    started_at=now if job.started_at is None else job.started_at + _idle_s(job, now),
                    phase=None,
                )
                kind: EventType = "resumed" if job.attempt else "state_changed"
                self._append(connection, job.id, kind, f"attempt {lease.attempt} begins", {"status": "running"})
                return lease, self._get(connection, job.tenant, job.id)

    def _end_hopeless(self, connection: sa.Connection, job: FineTuneJob, now: float) -> bool:
        if job.status is JobStatus.CANCELLING:
            self._end_orphan(connection, job, now)
            return True
        if job.attempt < job.max_attempts:
            return False
        failure = JobFailure(
            code="stalled",
            message=f"the run was lost {job.attempt} times",
            hint="look at the worker's log and memory; a smaller batch_size or max_length needs less",
        )
        self._update(
            connection,
            job.id,
            status=JobStatus.FAILED,
            finished_at=now,
            lease_token=job.lease_token + 1,
            error=failure.model_dump(mode="json"),
        )
        self._append(connection, job.id, "error", failure.message, failure.model_dump(mode="json"), level="error")
        return True

    def _end_orphan(self, connection: sa.Connection, job: FineTuneJob, now: float) -> None:
        """Does what a job was asked for whose worker is gone: it is cancelled, or no worker holds it any more."""
        token = {"lease_token": job.lease_token + 1, "lease_expires_at": None}
        if job.status in _PAUSED:
            self._update(connection, job.id, worker_id=None, phase=None, **token)
            self._append(connection, job.id, "state_changed", "paused; its worker was gone", {"status": "paused"})
            return
        ended = {"status": JobStatus.CANCELLED, "cancel_requested_at": job.cancel_requested_at or now}
        self._update(connection, job.id, finished_at=now, phase=None, **ended, **token)
        self._append(connection, job.id, "cancelled", "cancelled; its worker was gone", {"status": "cancelled"})

    def heartbeat(self, lease: Lease, *, lease_s: float) -> Heartbeat:
        """Renews the lease, and tells that the worker is there. Raises `LeaseLost`."""
        with self.fenced(lease) as connection:
            now = self._database.now(connection)
            self._update(connection, lease.job_id, lease_expires_at=now + lease_s, heartbeat_at=now)
            connection.execute(workers.update().where(workers.c.id == lease.worker_id).values(heartbeat_at=now))
            return self.asked_in(connection, lease)

    def asked(self, lease: Lease) -> Heartbeat:
        """What the job was asked to do, without renewing anything. Raises `LeaseLost`."""
        with self._database.read() as connection:
            self._require(connection, lease)
            return self.asked_in(connection, lease)

    def asked_in(self, connection: sa.Connection, lease: Lease) -> Heartbeat:
        """The same inside a transaction; inside one that `fenced` opened it holds until the commit."""
        query = sa.select(jobs.c.status, jobs.c.cancel_keep_best).where(jobs.c.id == lease.job_id)
        row = connection.execute(query).one()
        is_cancelled, is_paused = row.status == JobStatus.CANCELLING, row.status == JobStatus.PAUSED
        return Heartbeat(is_cancelled, bool(row.cancel_keep_best), is_paused)

    @contextlib.contextmanager
    def fenced(self, lease: Lease) -> Iterator[sa.Connection]:
        """A write transaction that exists only while the lease is current. Raises `LeaseLost`."""
        with self._database.write() as connection:
            self._require(connection, lease, lock=True)
            yield connection

    def _require(self, connection: sa.Connection, lease: Lease, *, lock: bool = False) -> None:
        query = sa.select(jobs.c.lease_token, jobs.c.status).where(jobs.c.id == lease.job_id)
        row = connection.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None or row.lease_token != lease.token or row.status not in _WRITABLE:
            raise LeaseLost(f"{lease.job_id} is no longer held under token {lease.token}")

    def record(
        self,
        lease: Lease,
        type_: EventType,
        message: str,
        data: dict[str, Any] | None = None,
        *,
        level: str = "info",
        **columns: Any,
    ) -> None:
        """Appends an event and sets columns of the job in one fenced transaction. Raises `LeaseLost`."""
        with self.fenced(lease) as connection:
            self.record_in(connection, lease, type_, message, data, level=level, **columns)

    def record_in(
        self,
        connection: sa.Connection,
        lease: Lease,
        type_: EventType,
        message: str,
        data: dict[str, Any] | None = None,
        *,
        level: str = "info",
        **columns: Any,
    ) -> None:
        """The same inside a transaction that `fenced` opened."""
        if columns:
            self._update(connection, lease.job_id, **columns)
        self._append(connection, lease.job_id, type_, message, data or {}, level=level)

    def remark(self, lease: Lease, message: str, data: dict[str, Any]) -> None:
        """Appends a warning to a job that has ended under this lease. Raises `LeaseLost` where another one came."""
        with self._database.write() as connection:
            query = sa.select(jobs.c.lease_token).where(jobs.c.id == lease.job_id).with_for_update()
            if connection.execute(query).scalar_one_or_none() != lease.token:
                raise LeaseLost(f"{lease.job_id} is no longer held under token {lease.token}")
            self._append(connection, lease.job_id, "data_warning", message, data, level="warn")

    def set_columns(self, lease: Lease, **columns: Any) -> None:
        """Sets columns without an event. Raises `LeaseLost`."""
        with self.fenced(lease) as connection:
            self._update(connection, lease.job_id, **columns)

    def finish_in(
        self,
        connection: sa.Connection,
        lease: Lease,
        status: JobStatus,
        *,
        failure: JobFailure | None = None,
        **columns: Any,
    ) -> None:
        """Ends the job inside a transaction that `fenced` opened."""
        error = failure.model_dump(mode="json") if failure is not None else None
        columns = {"phase": None} | columns
        values = columns | {"status": status, "finished_at": self._database.now(connection), "lease_expires_at": None}
        self._update(connection, lease.job_id, error=error, **values)
        if failure is not None:
            self._append(connection, lease.job_id, "error", failure.message, error or {}, level="error")
        kind: EventType = "cancelled" if status is JobStatus.CANCELLED else "state_changed"
        self._append(connection, lease.job_id, kind, f"the job is {status}", {"status": status})

    def finish(self, lease: Lease, status: JobStatus, *, failure: JobFailure | None = None, **columns: Any) -> None:
        with self.fenced(lease) as connection:
            self.finish_in(connection, lease, status, failure=failure, **columns)

    def requeue(self, lease: Lease, reason: str, *, charge_attempt: bool) -> JobStatus:
        """Lets go of the job: `queued`, or `paused` or `cancelled` if that was asked for, or `failed` with all attempts
        used up.

        Without `charge_attempt` the try does not count (a planned stop), nor does one that a pause ended. Raises
        `LeaseLost`.
        """
        with self.fenced(lease) as connection:
            job = _job(connection.execute(sa.select(jobs).where(jobs.c.id == lease.job_id)).one())
            if job.status is JobStatus.CANCELLING:
                self.finish_in(connection, lease, JobStatus.CANCELLED)
                return JobStatus.CANCELLED
            is_paused = job.status in _PAUSED
            attempt = lease.attempt if charge_attempt and not is_paused else lease.attempt - 1
            if charge_attempt and not is_paused and attempt >= self._max_attempts:
                self._end_hopeless(connection, job, self._database.now(connection))
                return JobStatus.FAILED
            status = JobStatus.PAUSED if is_paused else JobStatus.QUEUED
            self._update(
                connection,
                lease.job_id,
                status=status,
                attempt=attempt,
                worker_id=None,
                lease_token=lease.token + 1,
                lease_expires_at=None,
                phase=None,
            )
            level, why = ("info", "the worker released the paused job") if is_paused else ("warn", reason)
            self._append(connection, lease.job_id, "state_changed", why, {"status": status}, level=level)
            return status

    # Workers

    def register_worker(self, worker_id: str, profile: dict[str, Any]) -> None:
        with self._database.write() as connection:
            now = self._database.now(connection)
            connection.execute(workers.delete().where(workers.c.id == worker_id))
            connection.execute(workers.insert().values(id=worker_id, profile=profile, started_at=now, heartbeat_at=now))

    def worker_alive(self, worker_id: str) -> None:
        with self._database.write() as connection:
            now = self._database.now(connection)
            connection.execute(workers.update().where(workers.c.id == worker_id).values(heartbeat_at=now))

    def live_worker_profile(self, *, within_s: float = WORKER_SILENT_S) -> dict[str, Any] | None:
        """The profile of a worker heard from lately, or None."""
        with self._database.read() as connection:
            since = self._database.now(connection) - within_s
            query = sa.select(workers.c.profile).where(workers.c.heartbeat_at > since)
            row = connection.execute(query.order_by(workers.c.heartbeat_at.desc()).limit(1)).first()
            return None if row is None else dict(row.profile)

    # Inside a transaction

    def _known_key(
        self, connection: sa.Connection, tenant: str, key: str, request_sha256: str, now: float
    ) -> str | None:
        outdated = idempotency_keys.c.created_at < now - IDEMPOTENCY_HOURS * 3600
        connection.execute(idempotency_keys.delete().where(outdated))
        query = sa.select(idempotency_keys).where(idempotency_keys.c.tenant == tenant, idempotency_keys.c.key == key)
        row = connection.execute(query.with_for_update()).first()
        if row is None:
            return None
        if row.request_sha256 != request_sha256:
            raise IdempotencyMismatch(
                f"the Idempotency-Key {key[:60]!r} was used for another request; choose a new one"
            )
        return str(row.job_id)

    def _get(self, connection: sa.Connection, tenant: str, job_id: str, *, lock: bool = False) -> FineTuneJob:
        query = sa.select(jobs).where(jobs.c.id == job_id, jobs.c.tenant == tenant)
        row = connection.execute(query.with_for_update() if lock else query).first()
        if row is None:
            raise JobNotFound(f"there is no job {job_id[:70]!r}")
        return _job(row)

    def _events(self, connection: sa.Connection, job_id: str, *, after: int, limit: int) -> list[JobEvent]:
        query = sa.select(job_events).where(job_events.c.job_id == job_id, job_events.c.seq > after)
        return [JobEvent(**row._mapping) for row in connection.execute(query.order_by(job_events.c.seq).limit(limit))]

    def _update(self, connection: sa.Connection, job_id: str, **values: Any) -> None:
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(**values))

    def _append(
        self,
        connection: sa.Connection,
        job_id: str,
        type_: EventType,
        message: str,
        data: dict[str, Any],
        *,
        level: str = "info",
    ) -> None:
        bumped = jobs.update().where(jobs.c.id == job_id).values(last_seq=jobs.c.last_seq + 1)
        row = connection.execute(bumped.returning(jobs.c.last_seq, jobs.c.attempt)).one()
        connection.execute(
            job_events.insert().values(
                job_id=job_id,
                seq=row.last_seq,
                attempt=row.attempt,
                created_at=self._database.now(connection),
                level=level,
                type=type_,
                message=message,
                data=data,
            )
        )


def _unfinished() -> sa.Select[tuple[str]]:
    over = [status for status in JobStatus if status.is_final]
    return sa.select(jobs.c.id).where(jobs.c.status.not_in(over))


def _require_datasets(connection: sa.Connection, tenant: str, spec: JobSpec) -> None:
    """None of a job's datasets is deleted, or can be until the job is there. Raises `DatasetNotFound`."""
    mine = (datasets.c.id.in_(spec.datasets)) & (datasets.c.tenant == tenant)
    query = sa.select(datasets.c.id, datasets.c.deleted_at).where(mine).order_by(datasets.c.id)
    for row in connection.execute(query.with_for_update(read=True)):
        if row.deleted_at is not None:
            raise DatasetNotFound(f"the dataset {row.id!r} was deleted")


def _job(row: Any) -> FineTuneJob:
    values = {field.name: row._mapping[field.name] for field in fields(FineTuneJob)}
    values["status"] = _shown(JobStatus(values["status"]), is_held=values["worker_id"] is not None)
    values["spec"] = JobSpec.model_validate(values["spec"])
    return FineTuneJob(**values)


def _shown(stored: JobStatus, *, is_held: bool) -> JobStatus:
    """A job that was paused under its worker is only `pausing` until that lets go."""
    return JobStatus.PAUSING if stored is JobStatus.PAUSED and is_held else stored


def _has(status: JobStatus) -> sa.ColumnElement[bool]:
    """Whether a row is shown with this status."""
    if status not in _PAUSED:
        return jobs.c.status == status
    is_held = jobs.c.worker_id.is_not(None)
    return (jobs.c.status == JobStatus.PAUSED) & (is_held if status is JobStatus.PAUSING else ~is_held)


def _idle_s(job: FineTuneJob, now: float) -> float:
    """Seconds since anybody last worked on a job that has run before."""
    return 0.0 if job.heartbeat_at is None else max(0.0, now - job.heartbeat_at)
