"""What a fine-tune job is: its request, its states, its events. No SQL, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from finetune.data.options import AUTO, Columns, FrozenModel, TaskColumns, WantedTask
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
    PAUSED = "paused"  # as soon as it was asked for; a worker that holds the lease still saves and then lets go
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}


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
    register_as: str = Field(pattern=NAME_PATTERN)
    promote: Literal["manual", "if_better"] = "manual"
    hyperparameters: dict[str, Any] = Field({})
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]
    ] = Field({}, max_length=16)


class JobSpec(JobRequest):
    """A request as accepted: hyperparameters as asked for, not yet resolved."""

    backbone: str
    task: WantedTask = DEFAULT_TASK
    actor: str = "anonymous"

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
    """What the supervisor learns when it renews its lease."""

    cancel_requested: bool
    keep_best: bool
    pause_requested: bool = False
