"""The job table: enqueue, claim, heartbeat, cancel, finish. All SQL about jobs is here.

Delivery is at least once, effects happen once: every write of a worker runs in a transaction that
first compares the lease token, so a worker that lost its lease cannot write (`LeaseLost`).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from finetune.jobs.errors import (
    IdempotencyMismatch,
    JobNotCancellable,
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
)
from model_registry.db import Database
from model_registry.tables import idempotency_keys, job_events, jobs, workers

_HELD = (JobStatus.RUNNING, JobStatus.CANCELLING)
# A worker may still write to a job that was paused under it, until it lets go; no other worker claims such a job.
_WRITABLE = (*_HELD, JobStatus.PAUSED)
IDEMPOTENCY_HOURS = 72
_IDS_IN_ONE_QUERY = 500


_WHY_NOT_PAUSABLE = {
    JobStatus.VALIDATING_FILES: "wait until its datasets are checked and it is queued, or cancel it",
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

        Raises `IdempotencyMismatch` where the key came with another request.
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
            job_id = f"ft_{secrets.token_hex(12)}"
            status = JobStatus.QUEUED if is_data_ready else JobStatus.VALIDATING_FILES
            connection.execute(
                jobs.insert().values(
                    id=job_id,
                    tenant=tenant,
                    status=status,
                    spec=spec.model_dump(mode="json"),
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
            query = query.where(jobs.c.status == status)
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

    def queue_positions(self, shown: Sequence[FineTuneJob]) -> dict[str, int]:
        """How many queued jobs of all tenants come before each of these that waits: workers take the oldest."""
        waiting = [job.id for job in shown if job.status is JobStatus.QUEUED]
        if not waiting:
            return {}
        other = jobs.alias()
        ahead = (
            sa.select(sa.func.count())
            .select_from(other)
            .where(other.c.status == JobStatus.QUEUED, other.c.created_at < jobs.c.created_at)
            .scalar_subquery()
        )
        with self._database.read() as connection:
            rows = connection.execute(sa.select(jobs.c.id, ahead).where(jobs.c.id.in_(waiting)))
            return {row[0]: int(row[1]) for row in rows}

    def counts(self) -> dict[str, int]:
        """Jobs by status, over all tenants; every status is present."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)).all()
        return {status.value: 0 for status in JobStatus} | {row[0]: row[1] for row in rows}

    def ended(self, job_ids: Collection[str]) -> set[str]:
        """Those of the given jobs, of any tenant, that are over."""
        over = [status for status in JobStatus if status.is_final]
        query = sa.select(jobs.c.id).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(over))
        with self._database.read() as connection:
            return {row.id for row in connection.execute(query)}

    def request_cancel(self, tenant: str, job_id: str, *, keep_best: bool) -> FineTuneJob:
        """Ends a waiting job at once; tells a running one's worker. Raises `JobNotFound`, `JobNotCancellable`."""
        with self._database.write() as connection:
            job = self._get(connection, tenant, job_id, lock=True)
            if job.status.is_final:
                raise JobNotCancellable(f"{job_id} has ended already: it is {job.status}")
            now = self._database.now(connection)
            if job.status in _HELD:
                values: dict[str, Any] = {"status": JobStatus.CANCELLING, "cancel_requested_at": now}
                self._update(connection, job_id, cancel_keep_best=keep_best, **values)
                self._append(connection, job_id, "state_changed", "cancel was requested", {"status": "cancelling"})
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
            self._append(connection, job_id, "state_changed", "pause was requested", {"status": "paused"})
            return self._get(connection, tenant, job_id)

    def request_resume(self, tenant: str, job_id: str) -> FineTuneJob:
        """Puts a paused job back into the queue; a worker that still winds it down loses its lease.

        `started_at` moves by the time that the job was paused, so `max_seconds` counts running alone.
        Raises `JobNotFound`, `JobNotResumable`.
        """
        with self._database.write() as connection:
            job = self._get(connection, tenant, job_id, lock=True)
            if job.status is not JobStatus.PAUSED:
                raise JobNotResumable(f"{job_id} is {job.status}; only a paused job can be resumed")
            idle_s = self._database.now(connection) - (job.heartbeat_at or 0.0)
            self._update(
                connection,
                job_id,
                status=JobStatus.QUEUED,
                phase=None,
                worker_id=None,
                lease_expires_at=None,
                lease_token=job.lease_token + 1,
                started_at=None if job.started_at is None else job.started_at + max(0.0, idle_s),
            )
            self._append(connection, job_id, "resumed", "resume was requested", {"status": "queued"})
            return self._get(connection, tenant, job_id)

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

        A job that has used up its attempts, or was being cancelled, is ended here instead.
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
                    started_at=job.started_at or now,
                    phase=None,
                )
                kind: EventType = "resumed" if job.attempt else "state_changed"
                self._append(connection, job.id, kind, f"attempt {lease.attempt} begins", {"status": "running"})
                return lease, self._get(connection, job.tenant, job.id)

    def _end_hopeless(self, connection: sa.Connection, job: FineTuneJob, now: float) -> bool:
        if job.status is JobStatus.CANCELLING:
            self._update(
                connection, job.id, status=JobStatus.CANCELLED, finished_at=now, lease_token=job.lease_token + 1
            )
            self._append(connection, job.id, "cancelled", "cancelled; its worker was gone", {"status": "cancelled"})
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

    def heartbeat(self, lease: Lease, *, lease_s: float) -> Heartbeat:
        """Renews the lease. Raises `LeaseLost`."""
        with self.fenced(lease) as connection:
            now = self._database.now(connection)
            self._update(connection, lease.job_id, lease_expires_at=now + lease_s, heartbeat_at=now)
            query = sa.select(jobs.c.status, jobs.c.cancel_keep_best).where(jobs.c.id == lease.job_id)
            row = connection.execute(query).one()
            is_cancelled, is_paused = row.status == JobStatus.CANCELLING, row.status == JobStatus.PAUSED
            return Heartbeat(is_cancelled, bool(row.cancel_keep_best), is_paused)

    @contextlib.contextmanager
    def fenced(self, lease: Lease) -> Iterator[sa.Connection]:
        """A write transaction that exists only while the lease is current. Raises `LeaseLost`."""
        with self._database.write() as connection:
            query = sa.select(jobs.c.lease_token, jobs.c.status).where(jobs.c.id == lease.job_id).with_for_update()
            row = connection.execute(query).one_or_none()
            if row is None or row.lease_token != lease.token or row.status not in _WRITABLE:
                raise LeaseLost(f"{lease.job_id} is no longer held under token {lease.token}")
            yield connection

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
        """Lets go of the job: `queued`, or `paused` where that was asked for, or `failed` with all attempts used up.

        Without `charge_attempt` the try does not count (a planned stop), nor does one that a pause ended. Raises
        `LeaseLost`.
        """
        with self.fenced(lease) as connection:
            job = _job(connection.execute(sa.select(jobs).where(jobs.c.id == lease.job_id)).one())
            is_paused = job.status is JobStatus.PAUSED
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
            level, why = ("info", "the worker let go of the paused job") if is_paused else ("warn", reason)
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

    def live_worker_profile(self, *, within_s: float = 60.0) -> dict[str, Any] | None:
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


def _job(row: Any) -> FineTuneJob:
    values = {field.name: row._mapping[field.name] for field in fields(FineTuneJob)}
    values["status"] = JobStatus(values["status"])
    values["spec"] = JobSpec.model_validate(values["spec"])
    return FineTuneJob(**values)
