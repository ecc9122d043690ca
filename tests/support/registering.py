"""Jobs run in this process and registered in a store, as a supervisor would: without a database."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.check import ROWS_FILE, write_checked
from finetune.jobs.link import ChildJob, DatasetInput
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec
from finetune.training.recipe import run_job
from model_registry.manifest import MANIFEST_NAME, ModelManifest, sha256_hex
from model_registry.store import FileStore


@dataclass
class Record:
    """A `Link` that keeps what it is told; `check(events)` may raise at any check."""

    version: int = 1
    standing: dict[str, Any] | None = None
    check: Callable[[list[dict[str, Any]]], None] | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    def event(self, type_: str, message: str, data: Mapping[str, Any] | None = None, *, level: str = "info") -> None:
        self.events.append({"type": type_, "message": message, "data": dict(data or {}), "level": level})

    def phase(self, phase: str) -> None:
        self.event("phase_changed", phase)

    def progress(self, **values: Any) -> None: ...
    def set(self, **columns: Any) -> None: ...

    def check_cancelled(self) -> None:
        if self.check is not None:
            self.check(self.events)

    def reserve(self, *, kind: str, method: str) -> int:
        return self.version

    def champion(self) -> dict[str, Any] | None:
        return self.standing

    def succeed(self, *, manifest: Mapping[str, Any], evaluation: Mapping[str, Any], was_cancelled: bool) -> None:
        self.result = {"manifest": manifest, "evaluation": dict(evaluation), "was_cancelled": was_cancelled}

    def of(self, type_: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == type_]


@dataclass
class Workshop:
    """A store, a backbone and a folder to work in."""

    store: FileStore
    backbone_folder: Path
    folder: Path
    graphs_root: Path | None = None

    def dataset(self, words: Mapping[str, list[str]], rows: Mapping[str, int], *, seed: int) -> DatasetInput:
        """`rows[label]` texts that hold one of the label's telling words; the seed makes them new."""
        draw = random.Random(seed)
        name = f"ds_{seed}"
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for label, count in rows.items():
            for number in range(count):
                filler = draw.sample("film plot actor movie story it was the and a".split(), 5)
                text = " ".join([draw.choice(words[label]), *filler, f"{label}{seed}n{number}"])
                lines.append(json.dumps({"text": text, "label": label}))
        draw.shuffle(lines)
        (folder / "raw").write_text("\n".join(lines))
        assert write_checked(folder / "raw", "jsonl", folder).is_valid
        return DatasetInput(id=name, sha256="0" * 64, rows_file=folder / ROWS_FILE)

    def job(
        self,
        train: DatasetInput,
        test: DatasetInput,
        *,
        work: str = "work",
        promote: Any = "manual",
        earlier: tuple[str, ...] = (),
        **hyperparameters: Any,
    ) -> ChildJob:
        (self.folder / work).mkdir(exist_ok=True)
        spec = JobSpec(
            dataset=train.id,
            test_dataset=test.id,
            backbone="tiny",
            register_as="m",
            promote=promote,
            hyperparameters={"method": "baseline", **hyperparameters},
        )
        return ChildJob(
            job_id="ft_1",
            tenant="default",
            attempt=1,
            spec=spec,
            train=train,
            test=test,
            backbone_folder=self.backbone_folder,
            store_root=self.store.root,
            work_dir=self.folder / work,
            earlier_work_dirs=tuple(self.folder / name for name in earlier),
            worker=WorkerProfile(cpu_threads=1),
            graphs_root=self.graphs_root,
        )

    def register(self, job: ChildJob, record: Record) -> ModelManifest:
        """Runs the job and writes its manifest; `record` holds the rest."""
        run_job(job, record)
        manifest = ModelManifest.model_validate(record.result["manifest"])
        self.store.put_bytes(f"{manifest.prefix}/{MANIFEST_NAME}", manifest.to_bytes())
        return manifest


def pointer(manifest: ModelManifest) -> dict[str, Any]:
    """What a supervisor answers when asked for the champion."""
    return {"version": manifest.version, "manifest_sha256": sha256_hex(manifest.to_bytes())}
