"""A version's folder, from its weights to its card, and its way into the store."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.options import JOINTS
from finetune.evaluation.plots import draw
from finetune.jobs.link import ChildJob, finite
from finetune.training.methods.candidate import Candidate, Servable
from finetune.training.run_context import Run
from model_registry.card import render_card
from model_registry.manifest import BackboneRef, FileEntry, ModelManifest
from model_registry.store import ArtifactStore, put_tree
from modeling.assemble import GOLDEN_ROWS, GoldenRow, write_version_files
from modeling.backbone import GRAPHS_FOLDER, Backbone
from modeling.engines.device import fingerprint as fingerprint_of
from modeling.inputs import Example
from modeling.tasks import Calibration

_log = logging.getLogger("finetune.training.artefact")
_GOLDEN_BYTES = 100_000  # of one row; as JSON it may be six times as long
_GOLDEN_NUMBERS = 400_000  # of all, which take some 27 bytes each
_GOLDEN_BYTES_BY_POSITION = 600  # of one that brings logits for each of its positions
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "scikit-learn", "numpy", "safetensors")


def stage_weights(folder: Path, run: Run, best: Candidate, servable: Servable) -> None:
    """Writes what the version carries beside its head, and the graph of weights of its own, so that a server need not
    export them. Without the graph, which is told, it serves them on torch until it has."""
    if servable.write_extra is not None:
        servable.write_extra(folder)
    if best.kind != "full" or "onnx" not in run.plan.export:
        return
    graphs = folder / "full" / GRAPHS_FOLDER
    try:
        from modeling.export import export_graphs

        export_graphs(Backbone.open(folder / "full"), graphs, has_adapters=False)
    except Exception as error:  # torch's exporter raises whatever its stages raise; OSError of a full disk is one too
        shutil.rmtree(graphs, ignore_errors=True)  # half of it may be what fills the disk
        _log.exception("no graph was exported", extra={"action": "export_failed"})
        message = f"the version comes without its ONNX graph, which servers then export themselves: {error}"[:500]
        run.link.event("data_warning", message, {"code": "export_failed"}, level="warn")


def write_weights(
    folder: Path,
    run: Run,
    best: Candidate,
    servable: Servable,
    *,
    answering: Calibration,
    evaluation: dict[str, Any],
) -> None:
    """Writes the head, and all else that a server reads."""
    examples = _golden_examples(run)
    logits = (servable.golden_logits or servable.reference_logits or servable.logits)(examples)
    rows = [GoldenRow(example, row.tolist()) for example, row in zip(examples, logits, strict=True)]
    sizes = [row.size for row in logits]
    golden = [
        row
        for row, size, before in zip(rows, sizes, np.cumsum([0, *sizes]), strict=False)
        if before + size <= _GOLDEN_NUMBERS
    ]
    golden = golden or [rows[int(np.argmin(sizes))]]
    held_out = evaluation["validation"]
    calibration = {name: held_out[name] for name in ("ece_before", "ece_after") if name in held_out}
    write_version_files(
        folder,
        head=servable.head,
        linear=servable.linear,
        labels=run.labels,
        max_length=None if best.kind == "baseline" else run.plan.max_length,
        temperature=answering.temperature,
        calibration=calibration,
        golden=golden,
        task=run.plan.task,
        thresholds=answering.thresholds or None,
    )


def write_documents(
    folder: Path, job: ChildJob, run: Run, best: Candidate, *, answering: Calibration, evaluation: dict[str, Any]
) -> None:
    """Writes what people and later jobs read: the report, the plan, the environment and the data's fingerprint."""
    documents = {
        "eval/report.json": evaluation | {"suspects": [_without_text(one) for one in evaluation.get("suspects") or []]},
        "train/params.json": run.plan.model_dump(mode="json"),
        "train/environment.json": evaluation["environment"],
        "data/fingerprint.json": fingerprint(job, run),
        "reference_stats.json": run.rules.reference(best.validation_logits, run.labels, answering),
    }
    for name, document in documents.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(finite(document), indent=1, allow_nan=False))
    (folder / "train" / "metrics.jsonl").write_text(
        "".join(
            json.dumps(finite({"method": candidate["method"], **entry}), allow_nan=False) + "\n"
            for candidate in evaluation["methods"]
            for entry in candidate["details"].get("history", [])
        )
    )
    for name, rows in run.rules.tables(evaluation["test"] or evaluation["validation"], run.labels).items():
        (folder / "eval" / f"{name}.csv").write_text(_csv(rows))


def _without_text(suspect: Mapping[str, Any]) -> dict[str, Any]:
    """More people may read a version than the data."""
    return {name: value for name, value in suspect.items() if name != "text"}


def write_judgement(
    folder: Path, evaluation: Mapping[str, Any], curves: Mapping[str, Any], labels: Sequence[str]
) -> None:
    """The points of the curves, and the pictures of them where matplotlib is installed."""
    (folder / "eval" / "curves.json").write_text(json.dumps(finite(curves), allow_nan=False))
    for name, content in draw(evaluation, curves, labels).items():
        (folder / "eval" / name).write_bytes(content)


def write_events(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """All events of the job up to its registration."""
    (folder / "train" / "events.jsonl").write_text("".join(json.dumps(finite(entry)) + "\n" for entry in entries))


def store_artefact(
    store: ArtifactStore,
    folder: Path,
    job: ChildJob,
    run: Run,
    best: Candidate,
    *,
    version: int,
    evaluation: dict[str, Any],
) -> ModelManifest:
    """Copies the folder into the store and returns the manifest, which the supervisor writes last."""
    side = evaluation["test"] or evaluation["validation"]
    info = run.backbone.info
    draft = ModelManifest(
        tenant=job.tenant,
        name=job.spec.register_as,
        version=version,
        kind=best.kind,
        method=best.method,
        task=run.plan.task,
        labels=run.labels,
        base=BackboneRef(name=job.spec.backbone, digest=info.digest, source=info.source),
        job_id=job.job_id,
        created_at=time.time(),
        metrics={name: side[name] for name in run.rules.figures if math.isfinite(side[name])},
        dataset={"id": job.train.id, "sha256": job.train.sha256, "rows": len(run.train)},
        files=(),
    )
    card = render_card(
        draft,
        evaluation,
        run.rules.card,
        metadata=job.spec.metadata,
        fingerprint=json.loads((folder / "data" / "fingerprint.json").read_text()),
        environment=json.loads((folder / "train" / "environment.json").read_text()),
        files=[path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()],
    )
    (folder / "MODEL_CARD.md").write_text(card)
    store.delete_tree(draft.prefix)  # a number is reserved once, so whatever is there was never served
    files: tuple[FileEntry, ...] = put_tree(store, draft.prefix, folder)
    return draft.model_copy(update={"files": files})


def environment(run: Run) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in (*_LIBRARIES, *run.modality.libraries)}
    device = fingerprint_of(run.plan.device)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": {"name": device.name, "features": list(device.flags)},
        "libraries": {**device.libraries, **versions},
        "engine": run.engine_name,
        "cached_vectors": run.cached_vectors,
        "precision": run.plan.precision,
        "device": run.plan.device,
        "cpu_threads": run.plan.cpu_threads,
        "seed": run.plan.seed,
        "backbone": {"digest": run.backbone.info.digest, "source": run.backbone.info.source},
    }


def fingerprint(job: ChildJob, run: Run) -> dict[str, Any]:
    """What the version was trained on, as hashes of the normalised inputs: enough to find overlap, not to read them."""
    sides = {"train": run.train, "validation": run.validation, "test": run.test}
    inputs = {"train": job.train, "validation": job.validation, "test": job.test}
    return {
        "datasets": {side: {"id": given.id, "sha256": given.sha256} for side, given in inputs.items() if given},
        "split": run.plan.split.model_dump(mode="json"),
        "columns": job.spec.columns.model_dump(mode="json"),
        "joint": JOINTS.get(run.modality.name),  # between the cells of several columns of one role
        "rows": {side: len(rows) for side, rows in sides.items()},
        "label_counts" if run.rules.has_labels else "targets": {
            side: run.rules.counts(rows.labels, run.labels) for side, rows in sides.items()
        },
        "row_hashes": {side: run.row_hashes(rows) for side, rows in sides.items()},
    }


def _golden_examples(run: Run) -> list[Example]:
    """Rows of every kind first, then more, from those held out; none so long that servers could not read them back."""
    rows = run.validation
    firsts = run.rules.golden(rows.labels)
    rest = [row for row in range(len(rows)) if row not in set(firsts)]
    ordered = (rows.examples[row] for row in [*firsts, *rest])
    most = _GOLDEN_BYTES_BY_POSITION if run.rules.by_position else _GOLDEN_BYTES
    short = (example for example in ordered if len(run.modality.content(example)) <= most)
    return list(islice(short, GOLDEN_ROWS)) or run.modality.probe_set(GOLDEN_ROWS)[0]


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()
