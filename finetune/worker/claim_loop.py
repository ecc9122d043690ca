"""The claim loop: waits for data, takes jobs one at a time, drains on SIGTERM."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.data.check import ROWS_FILE
from finetune.data.errors import ColumnMissing, DatasetNotFound
from finetune.data.records import DatasetRecord, DatasetStatus
from finetune.data.store import DatasetStore
from finetune.jobs.errors import JobNotFound, LeaseLost
from finetune.jobs.link import ChildJob, DatasetInput, EmbeddingInput, Original
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import FineTuneJob, JobFailure, JobStatus, Lease
from finetune.training.embedding import choose_engine
from finetune.training.settings import child_environment
from finetune.worker.supervisor import Ledger, Supervisor, Timing
from finetune.worker.tracking import MlflowSink, TrackingFailed
from finetune.worker.warm_child import SpareChild
from model_registry.data_folder import DataFolder
from model_registry.engine_reports import EngineReports
from model_registry.errors import DatabaseUnavailable, StoreUnavailable
from modeling.backbone import Backbone
from modeling.engines.device import fingerprint
from modeling.engines.graphs import GraphFiles, graphs_key
from modeling.errors import ModelingError

_log = logging.getLogger("finetune.worker.claim_loop")
_BEAT_EVERY_S = 10.0
_MAX_BACKOFF_S = 30.0
_MOST_EVENTS = 10_000


class Worker:
    """One worker process. `stop()` may be called from a signal handler."""

    def __init__(
        self,
        worker_id: str,
        ledger: Ledger,
        datasets: DatasetStore,
        *,
        backbones: Mapping[str, Backbone],
        profile: WorkerProfile,
        data_dir: Path,
        folder: DataFolder | None = None,
        timing: Timing,
        poll_s: float,
        engines: EngineReports | None = None,
        feature_cache_bytes: int = 0,
        spare: SpareChild | None = None,
        sink: MlflowSink | None = None,
    ) -> None:
        """`data_dir` is shared with the serving process, which puts datasets and graphs there; no job is claimed while
        `folder` says that it is away; `engines`: what servers
        measured; `spare`: a training process to keep waiting while there is no job."""
        self._id, self._ledger, self._datasets = worker_id, ledger, datasets
        self._backbones, self._profile, self._timing = backbones, profile, timing
        self._folder, self._work = data_dir.absolute(), data_dir.absolute() / "work"
        self._poll_s, self._sink, self._data = poll_s, sink, folder
        self._engines, self._feature_cache_bytes, self._spare = engines, feature_cache_bytes, spare
        # A plain flag: an Event set by a signal handler can deadlock with the main thread inside its wait.
        self._is_stopping = False

    def stop(self) -> None:
        self._is_stopping = True

    def run_forever(self) -> None:
        """Works until `stop`. A database that is away only delays it."""
        try:
            self._follow_queue()
        finally:
            if self._spare is not None:
                self._spare.close()

    def _follow_queue(self) -> None:
        backoff_s, beaten = self._poll_s, 0.0
        is_registered = False
        while not self._is_stopping:
            try:
                if not is_registered:
                    self._ledger.jobs.register_worker(self._id, self._profile.model_dump(mode="json"))
                    is_registered = True
                    self.sweep()
                if time.monotonic() - beaten > _BEAT_EVERY_S:
                    self._ledger.jobs.worker_alive(self._id)
                    beaten = time.monotonic()
                self._ledger.metrics.beat()
                self.promote_waiting()
                if self._data is not None:
                    self._data.check()
                worked = self.work_once()
                backoff_s = self._poll_s
            except DatabaseUnavailable as error:
                _log.warning("database unavailable", extra={"action": "db_unavailable", "error": str(error)})
                worked, backoff_s = False, min(_MAX_BACKOFF_S, backoff_s * 2)
            except StoreUnavailable as error:
                _log.warning("data directory unavailable", extra={"action": "data_folder_gone", "error": str(error)})
                worked, backoff_s = False, min(_MAX_BACKOFF_S, backoff_s * 2)
            if not worked:
                if self._spare is not None:
                    self._spare.prepare(child_environment(self._profile.cpu_threads))
                self._pause(backoff_s)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._is_stopping and (left := until - time.monotonic()) > 0:
            time.sleep(min(0.2, left))

    def sweep(self) -> None:
        """Removes resume state of jobs that ended without a worker, such as those cancelled while paused."""
        if self._work.is_dir():
            for job_id in self._ledger.jobs.ended([path.name for path in self._work.iterdir()]):
                shutil.rmtree(self._work / job_id, ignore_errors=True)

    def work_once(self) -> bool:
        """Claims and runs one job. False if there was none."""
        claimed = self._ledger.jobs.claim(self._id, lease_s=self._timing.lease_s)
        if claimed is None:
            return False
        lease, job = claimed
        started = time.monotonic()
        _log.info("run begins", extra={"action": "run_begins", "job": job.id, "attempt": lease.attempt})
        with self._ledger.metrics.finetune_jobs_running.track_inprogress():
            outcome = self._run(lease, job)
        method = str(job.spec.hyperparameters.get("method", "auto"))
        self._ledger.metrics.set_phase(None)
        if outcome != "lost":
            duration = self._ledger.metrics.finetune_duration_seconds.labels(method, outcome)
            duration.observe(time.monotonic() - started)
        _log.info("run ended", extra={"action": "run_ended", "job": job.id, "outcome": outcome})
        return True

    def promote_waiting(self) -> None:
        """Moves jobs whose datasets are checked into the queue, or ends them with the findings."""
        for job in self._ledger.jobs.waiting_for_data():
            try:
                records = [self._datasets.get(job.tenant, id_) for id_ in job.spec.datasets]
            except DatasetNotFound as error:
                failure = JobFailure(code="dataset_invalid", message=str(error), hint="upload it again")
                self._ledger.jobs.leave_validation(job.id, failure)
                continue
            invalid = [record for record in records if record.status is DatasetStatus.INVALID]
            if invalid:
                self._ledger.jobs.leave_validation(job.id, _invalid(invalid[0]))
            elif all(record.status is DatasetStatus.READY for record in records):
                self._ledger.jobs.leave_validation(job.id)

    def _run(self, lease: Lease, job: FineTuneJob) -> str:
        try:
            child_job = self._child_job(lease, job)
        except (DatasetNotFound, ColumnMissing, ModelingError) as error:
            code = "backbone_unavailable" if isinstance(error, ModelingError) else "dataset_invalid"
            try:
                self._ledger.jobs.finish(lease, JobStatus.FAILED, failure=JobFailure(code=code, message=str(error)))
            except LeaseLost:
                return "lost"
            return "failed"
        supervisor = Supervisor(
            self._ledger,
            lease,
            child_job,
            self._timing,
            should_stop=lambda: self._is_stopping,
            log_file=self._folder / "logs" / "jobs" / f"{job.id}.log",
            spare=self._spare,
        )
        outcome = self._supervised(supervisor, lease)
        if outcome in {"succeeded", "failed", "cancelled"}:
            shutil.rmtree(self._work / job.id, ignore_errors=True)
            self._track(lease, job)
        return outcome

    def _supervised(self, supervisor: Supervisor, lease: Lease) -> str:
        """How the run ended. An unforeseen error fails the job, and the worker goes on with the next one."""
        try:
            return supervisor.run()
        except DatabaseUnavailable:
            raise
        except Exception as error:
            _log.exception("the run's supervision failed", extra={"action": "run_failed", "job": lease.job_id})
            message = f"the run could not be supervised ({type(error).__name__})"
            failure = JobFailure(code="internal_error", message=message, hint="the worker's log has the details")
            try:
                self._ledger.jobs.finish(lease, JobStatus.FAILED, failure=failure)
            except LeaseLost:
                return "lost"
            return "failed"

    def _track(self, lease: Lease, job: FineTuneJob) -> None:
        """Records the ended job elsewhere. Whatever comes of it, the job is as it is."""
        if self._sink is None:
            return
        jobs = self._ledger.jobs
        try:
            ended, events = jobs.get(job.tenant, job.id), jobs.events(job.tenant, job.id, limit=_MOST_EVENTS)
            run_id = self._sink.record(ended, events)
            _log.info("run recorded", extra={"action": "tracked", "job": job.id, "outcome": run_id})
        except TrackingFailed as error:
            _log.warning("run not recorded", extra={"action": "tracking_failed", "job": job.id, "error": str(error)})
            with contextlib.suppress(LeaseLost):
                jobs.remark(lease, f"the job was not recorded in MLflow: {error}", {"code": "tracking_failed"})

    def _child_job(self, lease: Lease, job: FineTuneJob) -> ChildJob:
        spec = job.spec
        if spec.backbone not in self._backbones:
            raise ModelingError(f"this worker has no backbone {spec.backbone!r}; it has {', '.join(self._backbones)}")
        inputs = {id_: self._dataset(job.tenant, id_) for id_ in spec.datasets}
        original = self._original(job)
        worker, embedding = self._profile, self._embedding(self._backbones[spec.backbone])
        if original is not None:
            worker, embedding = _as_before(original, worker, embedding)
        ran_s = 0.0 if job.started_at is None else max(0.0, (job.heartbeat_at or 0) - job.started_at)
        return ChildJob(
            job_id=job.id,
            tenant=job.tenant,
            attempt=lease.attempt,
            spec=spec,
            train=inputs[spec.dataset],
            validation=inputs[spec.validation_dataset] if spec.validation_dataset else None,
            test=inputs[spec.test_dataset] if spec.test_dataset else None,
            backbone_folder=self._backbones[spec.backbone].folder.absolute(),
            store_root=self._folder / "store",
            work_dir=self._work / job.id / f"attempt-{lease.attempt}-{lease.token}",
            worker=worker,
            elapsed_s=ran_s,
            earlier_work_dirs=self._earlier_work_dirs(job.id, lease.token),
            embedding=embedding,
            graphs_root=self._folder / "cache" / "graphs",
            earlier_events=self._events(job),
            percent=float((job.progress or {}).get("percent") or 0.0),
            best=job.best,
            original=original,
        )

    def _original(self, job: FineTuneJob) -> Original | None:
        """The job that this one repeats."""
        if job.spec.rerun_of is None:
            return None
        try:
            found = self._ledger.jobs.get(job.tenant, job.spec.rerun_of)
        except JobNotFound:
            return Original(job_id=job.spec.rerun_of)
        return Original(job_id=found.id, plan=found.plan, evaluation=found.evaluation)

    def _embedding(self, backbone: Backbone) -> EmbeddingInput:
        graphs = GraphFiles(self._folder / "cache" / "graphs" / graphs_key(backbone.info.digest))
        measured = [] if self._engines is None else self._engines.of([backbone.info.digest])
        engine = choose_engine(
            [{"device": row.device, "chosen": row.chosen} for row in measured],
            fingerprint(self._profile.device),
            has_graphs=graphs.is_complete,
            has_bf16=self._profile.has_bf16,
        )
        return EmbeddingInput(
            engine=engine,
            graphs=graphs.folder,
            cache=self._folder / "cache" / "features",
            cache_bytes=self._feature_cache_bytes,
        )

    def _events(self, job: FineTuneJob) -> tuple[dict[str, Any], ...]:
        found = self._ledger.jobs.events(job.tenant, job.id, limit=_MOST_EVENTS)
        return tuple({key: value for key, value in asdict(event).items() if key != "seq"} for event in found)

    def _earlier_work_dirs(self, job_id: str, token: int) -> tuple[Path, ...]:
        """Folders of runs under older leases, the newest first; the token orders them, whichever host they ran on."""
        found = {int(path.name.rpartition("-")[2]): path for path in (self._work / job_id).glob("attempt-*-*")}
        return tuple(found[older] for older in sorted(found, reverse=True) if older < token)

    def _dataset(self, tenant: str, dataset_id: str) -> DatasetInput:
        record = self._datasets.get(tenant, dataset_id)
        rows = self._folder / "datasets" / tenant / dataset_id / ROWS_FILE
        return DatasetInput(id=dataset_id, sha256=record.sha256, rows_file=rows)


def _as_before(
    original: Original, worker: WorkerProfile, embedding: EmbeddingInput
) -> tuple[WorkerProfile, EmbeddingInput]:
    """The threads and the engine of the original run, as far as there are any: both change the last digits."""
    threads = min((original.plan or {}).get("cpu_threads", worker.cpu_threads), worker.cpu_threads)
    engine = original.engine or embedding.engine
    return worker.model_copy(update={"cpu_threads": threads}), embedding.model_copy(update={"engine": engine})


def _invalid(record: DatasetRecord) -> JobFailure:
    findings = [] if record.report is None else record.report.findings
    errors = [finding.model_dump(mode="json") for finding in findings if finding.severity == "error"]
    message = f"{record.id} cannot be used: " + "; ".join(error["message"] for error in errors)[:1000]
    return JobFailure(code="dataset_invalid", message=message, hint="fix the file and upload it again", findings=errors)
