"""Request bodies of the management routes, which refuse unknown fields, and the documents that they answer with.

Documents are typed dictionaries: mypy holds the routes to them, and the OpenAPI document is made of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, GetPydanticSchema, field_validator
from typing_extensions import TypedDict

from finetune.data.options import FrozenModel
from finetune.data.records import ColumnType, DatasetReport, DatasetStatus, FileFormat, Finding
from finetune.jobs.plan import TrainingPlan
from finetune.jobs.records import EventType, JobPhase, JobRequest, JobStatus
from model_registry.refs import MAX_VERSION, NAME_PATTERN

_MAX_PATH_PART_BYTES = 255


def _dumped(model: Any) -> GetPydanticSchema:
    """A dictionary that a model was dumped to."""
    return GetPydanticSchema(lambda _source, handler: handler(model))


# What is asked


class FinetuneRequest(JobRequest):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"dataset": "ds_…", "register_as": "reviews", "hyperparameters": {"method": "auto"}}]
        },
    )


class CancelRequest(FrozenModel):
    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [{"keep_best": True}]})

    keep_best: bool = Field(True, description="register the best so far before ending")


class AliasRequest(FrozenModel):
    model_config = ConfigDict(
        strict=True, json_schema_extra={"examples": [{"version": 2, "expected_version": 1, "reason": "better on test"}]}
    )

    version: int = Field(ge=1, le=MAX_VERSION)
    expected_version: int | None = Field(
        ge=1, le=MAX_VERSION, description="where the alias points now; null if it does not exist yet"
    )
    reason: str = Field("", max_length=1024)


class RollbackRequest(FrozenModel):
    model_config = ConfigDict(
        strict=True, json_schema_extra={"examples": [{"alias": "champion", "reason": "complaints"}]}
    )

    alias: str = Field("champion", pattern=NAME_PATTERN)
    reason: str = Field("", max_length=1024)


class ImportRequest(FrozenModel):
    model_config = ConfigDict(
        strict=True, json_schema_extra={"examples": [{"name": "topics", "source": "file:topics-bert"}]}
    )

    name: str = Field(pattern=NAME_PATTERN, description="model to register the checkpoint as")
    source: str = Field(min_length=1, max_length=512, description="folder below import_root, or hub:org/name@revision")

    @field_validator("source")
    @classmethod
    def _can_be_a_path(cls, source: str) -> str:
        if any(len(part.encode("utf-8", "replace")) > _MAX_PATH_PART_BYTES for part in source.split("/")):
            raise ValueError(f"a part of the path is longer than {_MAX_PATH_PART_BYTES} bytes")
        return source


# What is answered: errors


class Place(TypedDict):
    loc: NotRequired[list[str | int]]
    message: str


class ProblemDocument(TypedDict):
    """RFC 9457. `errors` are places in the request, or findings in a dataset."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    retry_after_ms: NotRequired[int]
    errors: NotRequired[list[Place]]


class OpenAIErrorBody(TypedDict):
    message: str
    type: str
    param: None
    code: str


class OpenAIError(TypedDict):
    error: OpenAIErrorBody


# Datasets


class Column(TypedDict):
    name: str
    type: ColumnType
    empty: int
    distinct: int | None
    example: str | None


class FindingCounts(TypedDict):
    error: int
    warning: int
    info: int


class Dataset(TypedDict):
    id: str
    object: Literal["dataset"]
    filename: str
    format: FileFormat
    status: DatasetStatus
    bytes: int
    sha256: str
    rows: int | None
    columns: list[Column] | None
    findings: FindingCounts
    errors: list[Annotated[dict[str, Any], _dumped(Finding)]]
    created_at: float


class DatasetList(TypedDict):
    object: Literal["list"]
    data: list[Dataset]
    has_more: bool


class ReportOfDataset(TypedDict):
    object: Literal["dataset.report"]
    dataset: str
    status: DatasetStatus
    report: Annotated[dict[str, Any] | None, _dumped(DatasetReport | None)]
    classes: dict[str, Any] | None


class PreviewRow(TypedDict):
    row: int
    values: dict[str, Any]


class DatasetPreview(TypedDict):
    object: Literal["dataset.preview"]
    dataset: str
    columns: list[str]
    rows: list[PreviewRow]
    classes: dict[str, Any] | None


# Fine-tuning


class Job(TypedDict):
    """`plan` is what became of every `auto`, `result` the version, `error` code, message and hint of a failure."""

    id: str
    object: Literal["finetune.job"]
    status: JobStatus
    phase: Annotated[str | None, _dumped(JobPhase | None)]
    attempt: int
    register_as: str
    dataset: str
    validation_dataset: str | None
    test_dataset: str | None
    backbone: str
    task: str
    columns: dict[str, Any]
    exclude_rows: list[int]
    validation_columns: dict[str, Any] | None
    test_columns: dict[str, Any] | None
    promote: str
    hyperparameters: dict[str, Any]
    plan: dict[str, Any] | None
    metadata: dict[str, str]
    rerun_of: str | None
    progress: dict[str, Any] | None
    queue_position: int | None
    waiting_for: str | None
    worker_last_seen: float | None
    best: dict[str, Any] | None
    cut_short: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    created_at: float
    started_at: float | None
    finished_at: float | None


class JobList(TypedDict):
    object: Literal["list"]
    data: list[Job]
    has_more: bool


class JobPlan(TypedDict):
    """What `dry_run` answers."""

    object: Literal["finetune.plan"]
    plan: Annotated[dict[str, Any], _dumped(TrainingPlan)]
    estimated_seconds: float | None
    findings: list[Annotated[dict[str, Any], _dumped(Finding)]]


class Event(TypedDict):
    seq: int
    object: Literal["finetune.event"]
    job_id: str
    attempt: int
    created_at: float
    level: str
    type: Annotated[str, _dumped(EventType)]
    message: str
    data: dict[str, Any]


class EventList(TypedDict):
    object: Literal["list"]
    data: list[Event]
    has_more: bool


class Evaluation(TypedDict):
    """The report's further members depend on the task; docs/api.md lists them."""

    object: Literal["finetune.evaluation"]
    job_id: str


# Models


class Capabilities(TypedDict):
    """What may be asked of it: labels, vectors (`return_embedding`, `/v1/embeddings`), and inputs of which kind."""

    labels: bool
    embedding: bool
    input: str
    task: str


class AliasStatus(TypedDict):
    wanted: int
    serving: int | None
    reason: str | None
    retry_at: float | None


class EngineReport(TypedDict):
    device: dict[str, Any]
    chosen: str
    created_at: float
    engines: list[dict[str, Any]]


class BackboneDocument(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: None
    root: str
    digest: str | None
    task: str
    capabilities: Capabilities
    version: None
    aliases: dict[str, int]
    state: str
    reason: str | None
    engine: str | None
    engine_reason: str | None
    prompts: list[str]
    labels: list[str]
    bytes: int
    engine_reports: list[EngineReport]


class Model(TypedDict):
    """The last seven describe the champion, or else the newest version; they are left out while none is ready."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: str
    capabilities: Capabilities
    aliases: dict[str, int]
    alias_states: dict[str, AliasStatus]
    wanted: int | None
    serving: int | None
    versions: list[int]
    version: int | None
    state: str
    reason: str | None
    engine: str | None
    labels: list[str]
    bytes: int
    parent: NotRequired[str | None]
    root: NotRequired[str | None]
    kind: NotRequired[str]
    method: NotRequired[str]
    metrics: NotRequired[dict[str, Any]]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[BackboneDocument | Model]


class Version(TypedDict):
    id: str
    object: Literal["model.version"]
    name: str
    version: int
    status: str
    aliases: list[str]
    parent: str | None
    root: str | None
    retrain: str | None
    kind: str
    task: str
    capabilities: Capabilities
    method: str
    job_id: str | None
    state: str
    reason: str | None
    engine: str | None
    engine_reason: str | None
    labels: list[str]
    metrics: dict[str, Any]
    bytes: int
    created: int


class File(TypedDict):
    path: str
    size: int
    sha256: str


class VersionWithFiles(Version):
    files: list[File]


class VersionList(TypedDict):
    object: Literal["list"]
    data: list[Version]
    alias_states: dict[str, AliasStatus]


class AliasMove(TypedDict):
    object: Literal["alias.change"]
    model: str
    alias: str
    from_version: int | None
    version: int | None
    action: str
    actor: str
    reason: str
    epoch: int
    created_at: float


class AliasMoveList(TypedDict):
    object: Literal["list"]
    data: list[AliasMove]


class DeletionRecord(TypedDict):
    """What was deleted: a model, a version, a job or a dataset."""

    object: Literal["deletion"]
    id: int
    kind: str
    name: str
    version: int | None
    actor: str
    reason: str
    created_at: float


class History(AliasMoveList):
    deletions: list[DeletionRecord]


class AliasPending(TypedDict):
    """An alias that has moved to a version which this replica does not serve yet.

    `serving` is the version that requests get meanwhile; null: 503 model_not_ready. `reason` is what keeps the wanted
    one from serving, `retry_at` (seconds since the epoch) when it is tried again; null while the load is in progress.
    """

    object: Literal["alias.pending"]
    model: str
    alias: str
    wanted: int
    serving: int | None
    reason: str | None
    retry_at: float | None
    change: AliasMove


# Operations


class Liveness(TypedDict):
    status: Literal["ok", "failing"]
    dead: list[str]
    stuck: list[str]


class WorkersDocument(TypedDict):
    live: int | None
    last_seen: float | None


class Readiness(TypedDict):
    """`degraded` lists what does not work although requests may come."""

    status: Literal["ready", "unready"]
    reason: str | None
    degraded: list[str]
    workers: WorkersDocument


class BackboneInfo(TypedDict):
    digest: str
    source: str
    max_length: int
    embedding_size: int
    engine: str


class Info(TypedDict):
    name: str
    version: str
    backbones: dict[str, BackboneInfo]
    workers: WorkersDocument
    limits: dict[str, Any]
