"""One run: starts the child, writes what it reports under the lease, renews the lease, ends it.

The child computes; everything that the world may see is written here, in transactions that check
the lease first. When the lease is lost the child is killed and nothing more is written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune.data.targets import metric_of
from finetune.jobs.errors import LeaseLost
from finetune.jobs.link import ChildJob
from finetune.jobs.records import Heartbeat, JobFailure, JobStatus, Lease
from finetune.jobs.store import JobStore
from finetune.training.settings import child_environment
from finetune.worker.metrics import WorkerMetrics
from finetune.worker.warm_child import SpareChild, child_command, close_pipes, end_child, start_child
from model_registry.errors import ArtifactExists, DatabaseUnavailable, InvalidReference
from model_registry.manifest import MANIFEST_NAME, ModelManifest
from model_registry.registry import Promotion, Registry
from model_registry.store import ArtifactStore
from modeling.child_process import describe_exit
from modeling.tasks import DEFAULT_TASK

_log = logging.getLogger("finetune.worker.supervisor")
_DATABASE_RETRY_S = 0.5
_LOOK_EVERY_S = 1.0  # for a cancel or a pause, between two renewals
_OUTCOMES = {
    JobStatus.QUEUED: "requeued",
    JobStatus.PAUSED: "paused",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "cancelled",
}
_DONE = {"percent": 100.0, "eta_seconds": 0.0}


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: how long a lease lasts, how often it is renewed, and when a silent or unwilling child is killed."""

    lease_s: float
    heartbeat_s: float
    stall_s: float
    cancel_grace_s: float


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where a run's outcome is written."""

    jobs: JobStore
    registry: Registry
    store: ArtifactStore
    metrics: WorkerMetrics


class Supervisor:
    """Runs one job under one lease, in the `spare` process if one waits. `command` starts another (for tests)."""

    def __init__(
        self,
        ledger: Ledger,
        lease: Lease,
        job: ChildJob,
        timing: Timing,
        *,
        should_stop: Callable[[], bool],
        log_file: Path,
        command: list[str] | None = None,
        spare: SpareChild | None = None,
    ) -> None:
        self._ledger, self._lease, self._job, self._timing = ledger, lease, job, timing
        self._should_stop = should_stop
        self._log_file = log_file
        self._command = command or child_command()
        self._spare = spare
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._end_requested_at: float | None = None
        self._cancel: Heartbeat | None = None  # as the child was told
        self._is_pausing = False
        self._grace_s = timing.cancel_grace_s
        self._best: float | None = None if job.best is None else float(job.best["value"])
        self._task = DEFAULT_TASK  # until the child's plan says
        self._outcome: str | None = None

    def run(self) -> str:
        """Blocks until the run's end is written. Returns succeeded, failed, cancelled, requeued, paused or lost."""
        with self._child() as child:
            try:
                self._watch(child)
                if self._outcome is None:
                    self._lost_child(child)
            except LeaseLost:
                _log.warning("lease lost, run abandoned", extra={"action": "lease_lost", "job": self._lease.job_id})
                self._outcome = "lost"
            finally:
                end_child(child)
        assert self._outcome is not None
        return self._outcome

    # The loop

    def _watch(self, child: subprocess.Popen[str]) -> None:
        timing = self._timing
        renewed = looked = progressed = time.monotonic()
        while self._outcome is None:
            try:
                message = self._lines.get(timeout=min(0.2, timing.heartbeat_s))
            except queue.Empty:
                message = {}
            if message is None:
                return  # the child closed its pipe
            if message:
                self._persistently(functools.partial(self._write, child, message))
                progressed = time.monotonic()  # however long the database was away
            if self._outcome is not None:
                return  # the run has ended and holds no lease any more: renewing it would look like a lost one
            now = time.monotonic()
            if now - renewed >= timing.heartbeat_s:
                self._persistently(functools.partial(self._renew, child))
                renewed = looked = now
            elif now - looked >= _LOOK_EVERY_S:
                self._persistently(lambda: self._heed(child, self._ledger.jobs.asked(self._lease)))
                looked = now
            self._end_if_due(child, now, progressed)

    def _renew(self, child: subprocess.Popen[str]) -> None:
        asked = self._ledger.jobs.heartbeat(self._lease, lease_s=self._timing.lease_s)
        self._ledger.metrics.beat()
        self._heed(child, asked)

    def _heed(self, child: subprocess.Popen[str], asked: Heartbeat) -> None:
        """Passes a request on once; a cancel that keeps nothing also after one that keeps the best."""
        if asked.cancel_requested and (self._cancel is None or (asked.discards and not self._cancel.discards)):
            self._cancel, self._end_requested_at = asked, time.monotonic()
            # Keeping the best means evaluating and registering it, which takes as long as it takes.
            self._grace_s = self._timing.stall_s if asked.keep_best else self._timing.cancel_grace_s
            _send(child, {"kind": "cancel", "keep_best": asked.keep_best})
        elif asked.pause_requested and self._end_requested_at is None:
            self._end_requested_at, self._is_pausing = time.monotonic(), True
            _send(child, {"kind": "stop"})

    def _end_if_due(self, child: subprocess.Popen[str], now: float, progressed: float) -> None:
        if self._should_stop() and self._end_requested_at is None:
            self._end_requested_at = now
            _send(child, {"kind": "stop"})
        if self._end_requested_at is not None and now - self._end_requested_at > self._grace_s:
            end_child(child)
        if now - progressed > self._timing.stall_s:
            end_child(child)
            self._requeue(f"no sign of progress for {self._timing.stall_s:.0f} s", charge_attempt=True)

    def _persistently(self, write: Callable[[], None]) -> None:
        """Repeats a write while the database is away; the lease decides whether it still counts in the end."""
        started = time.monotonic()
        while True:
            try:
                return write()
            except DatabaseUnavailable as error:
                if self._should_stop() and time.monotonic() - started > self._timing.cancel_grace_s:
                    raise LeaseLost("the database is away and this worker must stop; the lease will run out") from error
                _log.warning("database unavailable, retrying", extra={"action": "db_retry", "error": str(error)})
                time.sleep(_DATABASE_RETRY_S)

    # What the child says

    def _write(self, child: subprocess.Popen[str], message: dict[str, Any]) -> None:
        try:
            self._take(child, message)
        except InvalidReference as error:  # another job took the name for its task
            hint = "choose another name in register_as, and submit the job again"
            failure = JobFailure(code="name_has_another_task", message=str(error), hint=hint)
            self._ledger.jobs.finish(self._lease, JobStatus.FAILED, failure=failure)
            self._outcome = "failed"

    def _take(self, child: subprocess.Popen[str], message: dict[str, Any]) -> None:
        jobs, lease = self._ledger.jobs, self._lease
        kind = message["kind"]
        if kind == "event":
            columns = {"best": message["data"]} if self._is_best(message) else {}
            jobs.record(lease, message["type"], message["message"], message["data"], level=message["level"], **columns)
        elif kind == "phase":
            self._ledger.metrics.set_phase(message["phase"])
            jobs.record(lease, "phase_changed", message["phase"], {"phase": message["phase"]}, phase=message["phase"])
        elif kind == "progress":
            jobs.set_columns(lease, progress=message["values"])
        elif kind == "set":
            if "plan" in message["columns"]:
                self._require_task(message["columns"]["plan"]["task"])
            jobs.set_columns(lease, **message["columns"])
        elif kind == "reserve":
            _send(child, {"kind": "reserved", "version": self._reserve(message)})
        elif kind == "champion":
            _send(child, {"kind": "champion", "champion": self._champion()})
        elif kind == "succeeded":
            self._publish(message)
        elif kind == "failed":
            jobs.finish(lease, JobStatus.FAILED, failure=JobFailure.model_validate(message["failure"]))
            self._outcome = "failed"
        elif kind == "cancelled":
            jobs.finish(lease, JobStatus.CANCELLED)
            self._outcome = "cancelled"
        elif kind == "stopped":
            reason = "the worker is shutting down; the run goes on elsewhere"
            self._outcome = _OUTCOMES[jobs.requeue(lease, reason, charge_attempt=False)]

    def _require_task(self, task: str) -> None:
        """Before hours of training, not after. Raises `InvalidReference`."""
        self._task = task
        self._ledger.registry.check_task(tenant=self._job.tenant, name=self._job.spec.register_as, task=task)

    def _is_best(self, message: dict[str, Any]) -> bool:
        """Whether an event reports the best so far over all methods of the run."""
        if message["type"] != "best_updated":
            return False
        value = float(message["data"]["value"])
        gain = metric_of(message["data"]["metric"]).gain
        if self._best is not None and gain(value) <= gain(self._best):
            return False
        self._best = value
        return True

    def _reserve(self, message: dict[str, Any]) -> int:
        with self._ledger.jobs.fenced(self._lease) as connection:
            return self._ledger.registry.reserve(
                connection,
                tenant=self._job.tenant,
                name=self._job.spec.register_as,
                task=self._task,
                kind=message["version_kind"],
                method=message["method"],
                job_id=self._job.job_id,
            )

    def _publish(self, message: dict[str, Any]) -> None:
        """One transaction: the lease and what was asked meanwhile are checked, the manifest stored, the version made
        ready and the job ended."""
        manifest = ModelManifest.model_validate(message["manifest"])
        with self._ledger.jobs.fenced(self._lease) as connection:
            asked = self._ledger.jobs.asked_in(connection, self._lease)
            if not asked.discards:
                is_cancelled = asked.cancel_requested or message["was_cancelled"]
                return self._register(connection, manifest, message["evaluation"], is_cancelled=is_cancelled)
            self._ledger.registry.abandon(connection, job_id=self._lease.job_id)
            self._ledger.jobs.finish_in(connection, self._lease, JobStatus.CANCELLED)
        self._outcome = "cancelled"
        self._ledger.store.delete_tree(manifest.prefix)

    def _register(
        self, connection: sa.Connection, manifest: ModelManifest, evaluation: dict[str, Any], *, is_cancelled: bool
    ) -> None:
        jobs, lease = self._ledger.jobs, self._lease
        # Already there after a lost commit: the same child's same bytes, for a number reserved once.
        with contextlib.suppress(ArtifactExists):
            key = f"{manifest.prefix}/{MANIFEST_NAME}"
            self._ledger.store.put_bytes(key, manifest.to_bytes(), create_only=True)
        is_asked_for = not is_cancelled and self._job.original is None
        promotion = promotion_of(evaluation.get("promotion"), may_be_first=is_asked_for)
        promoted = self._make_ready(connection, manifest, promotion)
        result = {"name": manifest.name, "version": manifest.version, "is_champion": promoted}
        message = f"{manifest.name}:{manifest.version}"
        if is_cancelled and not promoted:
            message += ", of a cancelled job; it is not made champion by itself"
        jobs.record_in(connection, lease, "model_registered", message, result)
        status = JobStatus.CANCELLED if is_cancelled else JobStatus.SUCCEEDED
        done: dict[str, Any] = {} if is_cancelled else {"progress": _DONE}
        jobs.finish_in(connection, lease, status, result=result, evaluation=evaluation, **done)
        self._outcome = status.value

    def _champion(self) -> dict[str, Any] | None:
        found = self._ledger.registry.champion(self._job.tenant, self._job.spec.register_as)
        return None if found is None else {"version": found.version, "manifest_sha256": found.manifest_sha256}

    def _make_ready(self, connection: sa.Connection, manifest: ModelManifest, promotion: Promotion | None) -> bool:
        """Registers the version, and makes it champion if the gates say so and the champion is who it was then."""
        registry, actor = self._ledger.registry, self._job.spec.actor
        is_promoted = registry.publish(connection, manifest, actor=actor, promotion=promotion)
        if promotion is not None and promotion.is_wanted and not is_promoted:
            against = "no champion" if promotion.over is None else f"version {promotion.over}"
            message = f"champion_unchanged: the gates were judged against {against}, and the champion is another by now"
            data = {"gate": "champion_unchanged", "status": "failed", "message": message, "figures": {}}
            self._ledger.jobs.record_in(connection, self._lease, "gate_failed", message, data, level="warn")
        return is_promoted

    def _lost_child(self, child: subprocess.Popen[str]) -> None:
        child.wait()
        if self._end_requested_at is not None and not self._should_stop() and not self._is_pausing:
            self._persistently(lambda: self._ledger.jobs.finish(self._lease, JobStatus.CANCELLED))
            self._outcome = "cancelled"
            return
        reason = f"the training process ended without a result ({describe_exit(child.returncode)})"
        self._requeue(reason, charge_attempt=not self._should_stop())

    def _requeue(self, reason: str, *, charge_attempt: bool) -> None:
        def write() -> None:
            self._outcome = _OUTCOMES[self._ledger.jobs.requeue(self._lease, reason, charge_attempt=charge_attempt)]

        self._persistently(write)

    # The process

    @contextlib.contextmanager
    def _child(self) -> Any:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        child = self._start()
        reader = threading.Thread(target=self._read, args=(child,), daemon=True, name="child-reader")
        reader.start()
        _send(child, json.loads(self._job.model_copy(update={"log_file": self._log_file.absolute()}).model_dump_json()))
        try:
            yield child
        finally:
            end_child(child)
            reader.join(timeout=5)
            close_pipes(child)

    def _start(self) -> subprocess.Popen[str]:
        environment = child_environment(self._job.worker.cpu_threads)
        waiting = None if self._spare is None else self._spare.take(environment)
        if waiting is not None:
            return waiting
        with self._log_file.open("a") as log:
            return start_child(self._command, environment, log)

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        with contextlib.suppress(ValueError):  # the pipe is closed under us at the end
            for line in child.stdout:
                try:
                    self._lines.put(json.loads(line))
                except json.JSONDecodeError:
                    _log.warning("unreadable line from the child", extra={"action": "child_line"})
        self._lines.put(None)


def promotion_of(judged: dict[str, Any] | None, *, may_be_first: bool = True) -> Promotion | None:
    """What the gates' outcome means for the registry; None leaves a name's first version to become its champion.

    The version of a cancelled job, or of a rerun, may not: it becomes champion by passing the gates against one alone.
    """
    over = None if judged is None else judged["champion"]
    if not may_be_first and over is None:
        return Promotion(is_wanted=False, over=None, reason="")
    if judged is None or (judged["wanted"] == "manual" and judged["is_passed"]):
        return None
    reason = "first version" if over is None else f"passed every gate against version {over}"
    return Promotion(is_wanted=judged["is_passed"], over=over, reason=reason)


def _send(child: subprocess.Popen[str], message: dict[str, Any]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # it may have just died; its exit is noticed elsewhere
        child.stdin.write(json.dumps(message) + "\n")
        child.stdin.flush()
