"""The child's line to its supervisor: JSON, one object a line, in both directions.

Downwards go the job, cancel requests and answers; upwards events, questions and the result. The
child has no database: what it reports, the supervisor writes under its lease.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic import BaseModel, ConfigDict

from finetune.data.records import Finding
from finetune.jobs.failures import Cancelled, Stopped
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import EventType, JobPhase, JobSpec


class DatasetInput(BaseModel):
    """One dataset of a job: its parsed rows on disk and what identifies them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    sha256: str
    rows_file: Path


class EmbeddingInput(BaseModel):
    """How a job gets the frozen backbone's vectors: the engine (`runtime/precision`), the folder of its graphs, and
    the folder of vectors known already, with its budget in bytes (0: none are kept)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    engine: str = "torch/fp32"
    graphs: Path | None = None
    cache: Path | None = None
    cache_bytes: int = 0


class ChildJob(BaseModel):
    """All that the child is told. Paths are on this host; what it prints goes to `log_file`.

    `graphs_root` is where servers keep exported graphs; `earlier_events` are those of the job until now.
    Each attempt writes into a `work_dir` of its own, so that a run whose lease was taken, but which does
    not know yet, cannot disturb its successor; that one reads from the `earlier_work_dirs`, newest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
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


class Nobody:
    """A `Link` that nobody listens to. It registers nothing."""

    def event(self, *_: Any, **__: Any) -> None: ...
    def phase(self, *_: Any) -> None: ...
    def progress(self, **_: Any) -> None: ...
    def set(self, **_: Any) -> None: ...
    def check_cancelled(self) -> None: ...
    def reserve(self, **_: Any) -> int:
        raise RuntimeError("there is nobody to register a version with")

    def champion(self) -> dict[str, Any] | None: ...
    def succeed(self, **_: Any) -> None: ...


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

    def event(
        self, type_: EventType, message: str, data: Mapping[str, Any] | None = None, *, level: str = "info"
    ) -> None:
        self._keep(type_, message, dict(data or {}), level)
        self._link.event(type_, message, data, level=level)

    def phase(self, phase: JobPhase) -> None:
        self._keep("phase_changed", phase, {"phase": phase}, "info")
        self._link.phase(phase)

    def progress(self, **values: Any) -> None:
        self._link.progress(**values)

    def set(self, **columns: Any) -> None:
        self._link.set(**columns)

    def check_cancelled(self) -> None:
        self._link.check_cancelled()

    def reserve(self, *, kind: str, method: str) -> int:
        return self._link.reserve(kind=kind, method=method)

    def champion(self) -> dict[str, Any] | None:
        return self._link.champion()

    def succeed(self, *, manifest: Mapping[str, Any], evaluation: Mapping[str, Any], was_cancelled: bool) -> None:
        self._link.succeed(manifest=manifest, evaluation=evaluation, was_cancelled=was_cancelled)

    def _keep(self, type_: EventType, message: str, data: dict[str, Any], level: str) -> None:
        values = {"job_id": self._job_id, "attempt": self._attempt, "created_at": time.time(), "level": level}
        self.entries.append({**values, "type": type_, "message": message, "data": data})


class PipeLink:
    """The `Link` over two pipes. A thread reads, so that a cancel is seen in the middle of a step."""

    def __init__(self, source: IO[str], sink: IO[str], *, progress_every_s: float = 0.5) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._end: Cancelled | Stopped | None = None
        self._progress_every_s = progress_every_s
        self._last_progress = 0.0
        threading.Thread(target=self._read, args=(source,), daemon=True, name="supervisor-link").start()

    def event(
        self, type_: EventType, message: str, data: Mapping[str, Any] | None = None, *, level: str = "info"
    ) -> None:
        self._send({"kind": "event", "type": type_, "message": message, "data": dict(data or {}), "level": level})

    def phase(self, phase: JobPhase) -> None:
        self._send({"kind": "phase", "phase": phase})

    def progress(self, **values: Any) -> None:
        now = time.monotonic()
        is_last = values.get("step") == values.get("total_steps")
        if is_last or now - self._last_progress >= self._progress_every_s:
            self._last_progress = now
            self._send({"kind": "progress", "values": values})

    def set(self, **columns: Any) -> None:
        self._send({"kind": "set", "columns": columns})

    def check_cancelled(self) -> None:
        if self._end is not None:
            raise self._end

    def reserve(self, *, kind: str, method: str) -> int:
        self._send({"kind": "reserve", "version_kind": kind, "method": method})
        return int(self._answers.get(timeout=120)["version"])

    def champion(self) -> dict[str, Any] | None:
        self._send({"kind": "champion"})
        found: dict[str, Any] | None = self._answers.get(timeout=120)["champion"]
        return found

    def succeed(self, *, manifest: Mapping[str, Any], evaluation: Mapping[str, Any], was_cancelled: bool) -> None:
        self._send(
            {
                "kind": "succeeded",
                "manifest": dict(manifest),
                "evaluation": dict(evaluation),
                "was_cancelled": was_cancelled,
            }
        )

    def fail(self, failure: Mapping[str, Any]) -> None:
        self._send({"kind": "failed", "failure": dict(failure)})

    def cancelled(self) -> None:
        self._send({"kind": "cancelled"})

    def stopped(self) -> None:
        self._send({"kind": "stopped"})

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._sink.write(json.dumps(message) + "\n")
            self._sink.flush()

    def _read(self, source: IO[str]) -> None:
        for line in source:
            message = json.loads(line)
            if message["kind"] == "cancel":
                self._end = Cancelled(keep_best=message["keep_best"])
            elif message["kind"] == "stop":
                self._end = Stopped()
            else:
                self._answers.put(message)
