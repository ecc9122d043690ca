"""What a fine-tune job is: its request, its states, its events. No SQL, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from finetune.data.options import AUTO, Columns, FrozenModel, TaskColumns, TaskSideColumns, WantedTask
from model_registry.refs import NAME_PATTERN
from modeling.tasks import DEFAULT_TASK

EventType = Literal[
    "state_changed",
    "phase_changed",
    "progress",
    "metrics",
    "baseline_ready",
    "checkpoint_saved",
    "best_updated",
    "early_stopped",
    "data_warning",
    "resumed",
    "evaluation_ready",
    "model_registered",
    "gate_passed",
    "gate_failed",
    "cancelled",
    "error",
]


class JobStatus(StrEnum):
    VALIDATING_FILES = "validating_files"  # waits for its datasets to be checked
    QUEUED = "queued"  # waits for a worker
    RUNNING = "running"  # a worker holds the lease
    CANCELLING = "cancelling"  # the worker was told and is winding down
    PAUSING = "pausing"  # the worker was told, and saves before it lets go; stored as `paused` with a worker
    PAUSED = "paused"  # no worker holds it, and none takes it until it is resumed
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}

    @property
    def is_waiting(self) -> bool:
        """Whether it will run without anybody asking for it, as soon as there is a worker for it."""
        return self in {JobStatus.VALIDATING_FILES, JobStatus.QUEUED}


class JobPhase(StrEnum):
    PREPARING_DATA = "preparing_data"
    LOADING_BACKBONE = "loading_backbone"
    EMBEDDING = "embedding"
    TRAINING = "training"
    EVALUATING = "evaluating"
    CALIBRATING = "calibrating"
    EXPORTING = "exporting"
    REGISTERING = "registering"


class JobRequest(FrozenModel):
    """What a client asks for; `backbone` None is the service's default."""

    dataset: str = Field(min_length=1, max_length=64)
    validation_dataset: str | None = Field(None, max_length=64)
    test_dataset: str | None = Field(None, max_length=64)
    backbone: str | None = Field(None, pattern=NAME_PATTERN)
    task: WantedTask = AUTO
    columns: TaskColumns = Field(Columns(), validate_default=True)
    exclude_rows: list[Annotated[int, Field(ge=1, le=10_000_000, strict=True)]] = Field([], max_length=10_000)
    validation_columns: TaskSideColumns = None
    test_columns: TaskSideColumns = None
    register_as: str = Field(pattern=NAME_PATTERN)
    promote: Literal["manual", "if_better"] = "manual"
    hyperparameters: dict[str, Any] = Field({})
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]
    ] = Field({}, max_length=16)

    @model_validator(mode="after")
    def _names_columns_of_given_datasets(self) -> Self:
        for side in ("validation", "test"):
            if getattr(self, f"{side}_columns") is not None and getattr(self, f"{side}_dataset") is None:
                raise ValueError(f"{side}_columns has no effect without {side}_dataset")
        return self

    @property
    def columns_by_side(self) -> dict[str, Columns]:
        """The columns in the datasets of `train`, `validation` and `test`."""
        others = {"train": None, "validation": self.validation_columns, "test": self.test_columns}
        return {side: self.columns.of_side(other) for side, other in others.items()}


class JobSpec(JobRequest):
    """A request as accepted: hyperparameters as asked for, not yet resolved."""

    backbone: str
    task: WantedTask = DEFAULT_TASK
    actor: str = "anonymous"
    rerun_of: str | None = None  # the job whose rows, seed and plan this one repeats

    def stored(self) -> dict[str, Any]:
        """As the database has it: without what earlier releases do not know, unless it says something."""
        return self.model_dump(mode="json", exclude={"rerun_of"} if self.rerun_of is None else set())

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(id_ for id_ in (self.dataset, self.validation_dataset, self.test_dataset) if id_ is not None)


class JobFailure(FrozenModel):
    """Why a job failed, in a form a person can act on."""

    code: str
    message: str
    hint: str = ""
    retryable: bool = False
    findings: list[dict[str, Any]] = Field([])


@dataclass(frozen=True, slots=True)
class JobEvent:
    seq: int
    job_id: str
    attempt: int
    created_at: float
    level: str
    type: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class FineTuneJob:
    """One row of `jobs`."""

    id: str
    tenant: str
    status: JobStatus
    phase: str | None
    spec: JobSpec
    plan: dict[str, Any] | None
    attempt: int
    max_attempts: int
    worker_id: str | None
    lease_token: int
    lease_expires_at: float | None
    heartbeat_at: float | None
    cancel_requested_at: float | None
    cancel_keep_best: bool
    progress: dict[str, Any] | None
    best: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    last_seq: int
    created_at: float
    started_at: float | None
    finished_at: float | None


@dataclass(frozen=True, slots=True)
class JobChange:
    """The events of a job that its reader has not seen, and how far it has come by then."""

    events: list[JobEvent]
    last_seq: int
    is_final: bool = False
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to write to a job. Each claim raises the token, so an older holder's writes fail."""

    job_id: str
    worker_id: str
    token: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a job was asked to do, as its supervisor learns it under its lease."""

    cancel_requested: bool
    keep_best: bool
    pause_requested: bool = False

    @property
    def discards(self) -> bool:
        """Whether the run is to end without a version."""
        return self.cancel_requested and not self.keep_best


@dataclass(frozen=True, slots=True)
class Outlook:
    """When waiting jobs can be expected to run: `positions` are the jobs before each queued one, by id."""

    now: float
    worker_last_seen: float | None
    live_workers: int
    positions: Mapping[str, int]

    def why_waiting(self, job: FineTuneJob) -> str | None:
        """What a job waits for, in a sentence; None if it does not wait."""
        if not job.status.is_waiting:
            return None
        if self.worker_last_seen is None:
            return "no worker has ever been heard from: start one (`python -m finetune`) on this database"
        if not self.live_workers:
            ago = max(0, round(self.now - self.worker_last_seen))
            return f"no worker is running: the last one was heard from {ago} s ago; start one (`python -m finetune`)"
        if job.status is JobStatus.VALIDATING_FILES:
            return "its datasets are being checked"
        before = self.positions.get(job.id, 0)
        if not before:
            return "it is the next one that a worker takes"
        return f"{before} {'job comes' if before == 1 else 'jobs come'} before it"
