"""What passes between a run and its supervisor: the job that a run is given, and the `Link` that it reports by.

A run has no database: what it reports, the supervisor writes under its lease.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from finetune.data.options import FrozenModel
from finetune.data.records import Finding
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import EventType, JobPhase, JobSpec


class DatasetInput(FrozenModel):
    """One dataset of a job: its parsed rows on disk and what identifies them."""

    id: str
    sha256: str
    rows_file: Path


class EmbeddingInput(FrozenModel):
    """How a job gets the frozen backbone's vectors: the engine (`runtime/precision`), the folder of its graphs, and
    the folder of vectors known already, with its budget in bytes (0: none are kept)."""

    engine: str = "torch/fp32"
    graphs: Path | None = None
    cache: Path | None = None
    cache_bytes: int = 0


class Original(FrozenModel):
    """What a rerun repeats, and compares itself with: the plan and the evaluation of the job before."""

    job_id: str
    plan: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def engine(self) -> str | None:
        """The engine that gave the frozen backbone's vectors."""
        return (self.recorded("environment") or {}).get("engine")

    @property
    def methods(self) -> list[str]:
        """Those that were trained."""
        return [one["method"] for one in self.recorded("methods") or ()]

    def recorded(self, name: str) -> Any:
        return (self.evaluation or {}).get(name)


class ChildJob(FrozenModel):
    """All that a run is told. Paths are on this host; what it prints goes to `log_file`.

    `graphs_root` is where servers keep exported graphs; `earlier_events` are those of the job until now.
    Each attempt writes into a `work_dir` of its own, so that a run whose lease was taken, but which does
    not know yet, cannot disturb its successor; that one reads from the `earlier_work_dirs`, newest first.
    `percent` and `best` are what earlier attempts came to.
    """

    job_id: str
    tenant: str
    attempt: int
    spec: JobSpec
    train: DatasetInput
    validation: DatasetInput | None = None
    test: DatasetInput | None = None
    backbone_folder: Path
    store_root: Path
    work_dir: Path
    earlier_work_dirs: tuple[Path, ...] = ()
    worker: WorkerProfile
    elapsed_s: float = 0.0
    log_file: Path | None = None
    embedding: EmbeddingInput = EmbeddingInput()
    graphs_root: Path | None = None
    earlier_events: tuple[dict[str, Any], ...] = ()
    percent: float = 0.0
    best: dict[str, Any] | None = None
    original: Original | None = None


class Link(Protocol):
    """What a run needs of the world around it."""

    def event(
        self, type_: EventType, message: str, data: Mapping[str, Any] | None = None, *, level: str = "info"
    ) -> None: ...
    def phase(self, phase: JobPhase) -> None: ...
    def progress(self, **values: Any) -> None: ...
    def set(self, **columns: Any) -> None: ...
    def check_cancelled(self) -> None:
        """Raises `Cancelled` or `Stopped` if the run was asked to end."""

    def reserve(self, *, kind: str, method: str) -> int:
        """The version number to write under; raises if the lease is gone."""

    def champion(self) -> dict[str, Any] | None:
        """The version and manifest digest that the alias `champion` of the job's model names now, or None."""

    def succeed(self, *, manifest: Mapping[str, Any], evaluation: Mapping[str, Any], was_cancelled: bool) -> None: ...


class SilentLink:
    """A `Link` that passes nothing on and registers nothing."""

    def event(self, *_: Any, **__: Any) -> None: ...
    def phase(self, *_: Any) -> None: ...
    def progress(self, **_: Any) -> None: ...
    def set(self, **_: Any) -> None: ...
    def check_cancelled(self) -> None: ...
    def reserve(self, **_: Any) -> int:
        raise RuntimeError("a silent link cannot register a version")

    def champion(self) -> dict[str, Any] | None: ...
    def succeed(self, **_: Any) -> None: ...


def finite(document: Any) -> Any:
    """A document of JSON's types with None for every number that JSON does not know: infinite ones, and NaN."""
    if isinstance(document, float):
        return document if math.isfinite(document) else None
    if isinstance(document, Mapping):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [finite(value) for value in document]
    return document


def tell(link: Link, findings: Iterable[Finding]) -> None:
    """An event for each finding."""
    for finding in findings:
        level = {"error": "error", "warning": "warn", "info": "info"}[finding.severity]
        link.event("data_warning", f"{finding.code}: {finding.message}", finding.model_dump(mode="json"), level=level)


class Journal:
    """A `Link` that passes everything on, and keeps the events in the form that the job's own have."""

    def __init__(self, link: Link, *, job_id: str, attempt: int, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        self._link, self._job_id, self._attempt = link, job_id, attempt
        self.entries: list[dict[str, Any]] = [dict(entry) for entry in earlier]
        self.progress, self.set, self.check_cancelled = link.progress, link.set, link.check_cancelled
        self.reserve, self.champion, self.succeed = link.reserve, link.champion, link.succeed

    def event(
        self, type_: EventType, message: str, data: Mapping[str, Any] | None = None, *, level: str = "info"
    ) -> None:
        self._keep(type_, message, dict(data or {}), level)
        self._link.event(type_, message, data, level=level)

    def phase(self, phase: JobPhase) -> None:
        self._keep("phase_changed", phase, {"phase": phase}, "info")
        self._link.phase(phase)

    def _keep(self, type_: EventType, message: str, data: dict[str, Any], level: str) -> None:
        values = {"job_id": self._job_id, "attempt": self._attempt, "created_at": time.time(), "level": level}
        self.entries.append({**values, "type": type_, "message": message, "data": data})
