"""The whole job, top to bottom, in the child process.

1. read and inspect the rows, split them  2. resolve the plan  3. train the methods, cheapest first
4. the best on validation wins  5. calibrate, evaluate on test as it will be served  6. write, register.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.calibration import fit_temperature
from finetune.datasets import load as datasets
from finetune.datasets.findings import too_long
from finetune.datasets.labelled import LabelledRows
from finetune.datasets.records import has_errors
from finetune.datasets.texts import text_digest
from finetune.errors import Cancelled, DatasetInvalid, RunError
from finetune.evaluation import report, score, summary
from finetune.events import ChildJob, Link, tell
from finetune.jobs.records import JobPhase
from finetune.memory import release_free_memory
from finetune.methods import METHODS
from finetune.methods.candidate import Candidate, Servable
from finetune.plan import DatasetProfile, TrainingPlan, parse_hyperparameters, resolve
from finetune.run import Rows, Run
from finetune.suspects import find_suspects
from model_registry.card import render_card
from model_registry.manifest import BackboneRef, FileEntry, ModelManifest
from model_registry.store import ArtifactStore, FileStore, put_tree
from modeling.assemble import GOLDEN_ROWS, GoldenRow, write_version_files
from modeling.backbone import Backbone
from modeling.preprocess import TextPreprocessor
from modeling.weights import FloatArray, IntArray

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "scikit-learn", "numpy", "tokenizers", "safetensors")


def run_job(job: ChildJob, link: Link) -> None:
    """Runs one job to its registration. Raises `RunError`, `Cancelled` (nothing to keep), `Stopped`."""
    started = time.monotonic()
    link.phase(JobPhase.PREPARING_DATA)
    train, validation, test = load_sides(job, link)
    suspects = find_suspects(train, link, seed=parse_hyperparameters(job.spec.hyperparameters).seed)
    release_free_memory()
    labels = tuple(sorted(set(train.labels)))
    check_class_weights(job, labels)
    backbone = Backbone.open(job.backbone_folder)
    plan = resolve_plan(job, backbone, train, validation, test, link)
    link.set(plan=plan.model_dump(mode="json"))
    deadline = None if plan.max_seconds is None else started + plan.max_seconds - job.elapsed_s
    run = Run(
        train=_rows(train, labels), validation=_rows(validation, labels), test=_rows(test, labels), labels=labels,
        plan=plan, backbone=backbone, link=link, work_dir=job.work_dir,
        earlier_work_dirs=job.earlier_work_dirs, deadline=deadline,
    )  # fmt: skip

    candidates = train_methods(run)
    best = choose(candidates, run)

    link.phase(JobPhase.EVALUATING)
    servable = best.finish()
    test_logits = servable.logits(run.test.texts) if run.test.texts else None
    link.phase(JobPhase.CALIBRATING)
    temperature = 1.0
    if plan.calibration == "temperature":
        temperature = fit_temperature(best.validation_logits, run.validation.labels)
    evaluation = {**evaluate(run, candidates, best, test_logits, temperature), "suspects": suspects}
    link.event("evaluation_ready", f"{best.method} was the best on validation", _headline(evaluation))

    link.phase(JobPhase.EXPORTING)
    with tempfile.TemporaryDirectory(prefix="polyhead-version-", dir=job.work_dir) as folder:
        write_artefact(Path(folder), job, run, best, servable, temperature=temperature, evaluation=evaluation)
        link.phase(JobPhase.REGISTERING)
        version = link.reserve(kind=best.kind, method=best.method)
        manifest = store_artefact(
            FileStore(job.store_root), Path(folder), job, run, best, version=version, evaluation=evaluation
        )
    link.succeed(manifest=manifest.model_dump(mode="json"), evaluation=evaluation, was_cancelled=run.is_winding_down)


# 1. Data


def load_sides(job: ChildJob, link: Link) -> tuple[LabelledRows, LabelledRows, LabelledRows]:
    """Train, validation and test rows; what the request does not bring is split off. Raises `DatasetInvalid`."""
    wanted = parse_hyperparameters(job.spec.hyperparameters)
    inputs = {"train": job.train, "validation": job.validation, "test": job.test}
    files = {side: given.rows_file for side, given in inputs.items() if given is not None}
    sides = datasets.load_sides(files, columns=job.spec.columns, options=wanted.split, seed=wanted.seed)
    tell(link, sides.findings)
    if has_errors(sides.findings):
        errors = [finding for finding in sides.findings if finding.severity == "error"]
        message = "; ".join(finding.message for finding in errors)[:1000]
        raise DatasetInvalid(message, [finding.model_dump(mode="json") for finding in errors])
    return sides.train, sides.validation, sides.test


def check_class_weights(job: ChildJob, labels: Sequence[str]) -> None:
    """Raises `RunError` for a weight on a label that the data does not have: a misspelling would do nothing."""
    weights = parse_hyperparameters(job.spec.hyperparameters).class_weights
    unknown = sorted(set(weights) - set(labels)) if isinstance(weights, dict) else []
    if unknown:
        raise RunError(
            "invalid_hyperparameters",
            f"class_weights names the label {unknown[0][:100]!r}, which the data does not have",
            hint=f"the labels are {', '.join(labels)[:300]}",
        )


def _rows(rows: LabelledRows, labels: Sequence[str]) -> Rows:
    index = {label: position for position, label in enumerate(labels)}
    positions = np.asarray([index[label] for label in rows.labels], dtype=np.int64)
    return Rows(rows.texts, positions, rows.row_numbers, rows.extras)


# 2. Plan


def resolve_plan(
    job: ChildJob, backbone: Backbone, train: LabelledRows, validation: LabelledRows, test: LabelledRows, link: Link
) -> TrainingPlan:
    info = backbone.info
    tokenizer = TextPreprocessor(backbone.folder / "tokenizer.json", max_length=info.max_length)
    lengths = token_lengths(tokenizer, train.texts)
    data = DatasetProfile(
        train_rows=len(train), validation_rows=len(validation), test_rows=len(test),
        labels=len(set(train.labels)), max_length_p99=int(np.ceil(np.percentile(lengths, 99))),
    )  # fmt: skip
    wanted = parse_hyperparameters(job.spec.hyperparameters)
    plan = resolve(wanted, data=data, worker=job.worker, parameters=info.parameters, model_max_length=info.max_length)
    tell(link, too_long(train, lengths, plan.max_length))
    return plan


def token_lengths(tokenizer: TextPreprocessor, texts: Sequence[str], *, batch: int = 1024) -> list[int]:
    """Tokens of each text, one more than the tokenizer's limit where it was cut.

    A batch at a time: all encodings at once would take more memory than the texts.
    """
    starts = range(0, len(texts), batch)
    encoded = (item for start in starts for item in tokenizer.encode(texts[start : start + batch]))
    return [item.length + item.is_truncated for item in encoded]


# 3. and 4. Methods


def train_methods(run: Run) -> list[Candidate]:
    """Trains what the plan lists, cheapest first; stops early where the budget or a cancel says so."""
    candidates: list[Candidate] = []
    for planned in run.plan.methods:
        if candidates and _must_skip(run, planned.estimated_seconds):
            left = run.seconds_left()
            message = f"{planned.method} is left out: it needs about {planned.estimated_seconds or 0:.0f} s"
            message += "" if left is None else f", {max(0.0, left):.0f} s are left"
            run.link.event("data_warning", message, {"code": "budget", "method": planned.method}, level="warn")
            continue
        try:
            candidate = METHODS[planned.method](run)
        except Cancelled as request:
            if not request.keep_best or not candidates:
                raise
            run.is_winding_down = True
            break
        candidates.append(candidate)
        _announce(run, candidate)
        if run.is_winding_down:
            break
    return candidates


def _must_skip(run: Run, needed_s: float | None) -> bool:
    left = run.seconds_left()
    if left is None:
        return False
    # Half of an estimate still leaves time for a useful, shorter run of a method that stops on time.
    return left < (needed_s or 0) * 0.5


def _announce(run: Run, candidate: Candidate) -> None:
    values = summary(candidate.validation_logits, run.validation.labels)
    data = {"method": candidate.method, "split": "validation", "values": values, "seconds": round(candidate.seconds, 2)}
    text = f"{candidate.method}: {run.plan.metric} {values[run.plan.metric]:.4f} on {len(run.validation.labels)} rows"
    run.link.event("baseline_ready" if candidate.method == "baseline" else "metrics", text, data)


def choose(candidates: Sequence[Candidate], run: Run) -> Candidate:
    """The best on validation; among equals the cheaper one, which comes first."""
    values = [score(run.plan.metric, candidate.validation_logits, run.validation.labels) for candidate in candidates]
    best = candidates[int(np.argmax(values))]
    data = {"metric": run.plan.metric, "value": max(values), "method": best.method, "step": 0}
    run.link.set(best=data)
    return best


# 5. Evaluation


def evaluate(
    run: Run, candidates: Sequence[Candidate], best: Candidate, test_logits: FloatArray | None, temperature: float
) -> dict[str, Any]:
    """The report: every method on validation, the winner on test as it will be served."""
    document: dict[str, Any] = {
        "metric": run.plan.metric,
        "chosen": best.method,
        "temperature": temperature,
        "methods": [
            {
                "method": candidate.method,
                "seconds": round(candidate.seconds, 2),
                "validation": summary(candidate.validation_logits, run.validation.labels),
                "details": candidate.details,
            }
            for candidate in candidates
        ],
        "validation": _split_report(run, best.validation_logits, run.validation.labels, temperature),
        "test": None,
        "rows": {"train": len(run.train.texts), "validation": len(run.validation.texts), "test": len(run.test.texts)},
    }
    if test_logits is not None:
        document["test"] = _split_report(run, test_logits, run.test.labels, temperature)
    return document


def _split_report(run: Run, logits: FloatArray, labels: IntArray, temperature: float) -> dict[str, Any]:
    return report(logits, labels, run.labels, temperature=temperature, seed=run.plan.seed)


def _headline(evaluation: dict[str, Any]) -> dict[str, Any]:
    picked = ("accuracy", "macro_f1", "weighted_f1", "loss", "rows", "accuracy_interval_95", "ece_after")
    sides = {side: evaluation[side] for side in ("validation", "test") if evaluation[side] is not None}
    return {
        "chosen": evaluation["chosen"],
        "methods": {item["method"]: item["validation"] for item in evaluation["methods"]},
        **{side: {name: numbers[name] for name in picked} for side, numbers in sides.items()},
    }


# 6. Artefact


def write_artefact(
    folder: Path, job: ChildJob, run: Run, best: Candidate, servable: Servable, *, temperature: float,
    evaluation: dict[str, Any],
) -> None:  # fmt: skip
    texts = _golden_texts(run)
    logits = servable.logits(texts)
    golden = [GoldenRow(text, tuple(float(x) for x in row)) for text, row in zip(texts, logits, strict=True)]
    calibration = {
        "ece_before": evaluation["validation"]["ece_before"],
        "ece_after": evaluation["validation"]["ece_after"],
    }
    write_version_files(
        folder, head=servable.head, linear=servable.linear, labels=run.labels,
        max_length=None if best.kind == "baseline" else run.plan.max_length,
        temperature=temperature, calibration=calibration, golden=golden,
    )  # fmt: skip
    if servable.write_extra is not None:
        servable.write_extra(folder)
    documents = {
        "eval/report.json": evaluation,
        "train/params.json": run.plan.model_dump(mode="json"),
        "train/environment.json": environment(run),
        "data/fingerprint.json": fingerprint(job, run),
        "reference_stats.json": reference_stats(run, best, temperature),
    }
    for name, document in documents.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document, indent=1))
    (folder / "train" / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"method": candidate["method"], **entry}) + "\n"
            for candidate in evaluation["methods"]
            for entry in candidate["details"].get("history", [])
        )
    )
    matrix: list[list[Any]] = [
        ["", *run.labels],
        *([label, *row] for label, row in zip(run.labels, _matrix(evaluation), strict=True)),
    ]
    (folder / "eval" / "confusion_matrix.csv").write_text(_csv(matrix))


def store_artefact(
    store: ArtifactStore, folder: Path, job: ChildJob, run: Run, best: Candidate, *, version: int,
    evaluation: dict[str, Any],
) -> ModelManifest:  # fmt: skip
    """Copies the folder into the store and returns the manifest, which the supervisor writes last."""
    side = evaluation["test"] or evaluation["validation"]
    info = run.backbone.info
    draft = ModelManifest(
        tenant=job.tenant, name=job.spec.register_as, version=version, kind=best.kind, method=best.method,
        labels=run.labels, base=BackboneRef(name=job.spec.backbone, digest=info.digest, source=info.source),
        job_id=job.job_id, created_at=time.time(),
        metrics={name: side[name] for name in ("accuracy", "macro_f1", "weighted_f1", "loss", "rows")},
        dataset={"id": job.train.id, "sha256": job.train.sha256, "rows": len(run.train.texts)}, files=(),
    )  # fmt: skip
    (folder / "MODEL_CARD.md").write_text(render_card(draft, evaluation, metadata=job.spec.metadata))
    store.delete_tree(draft.prefix)  # a number is reserved once, so whatever is there was never served
    files: tuple[FileEntry, ...] = put_tree(store, draft.prefix, folder)
    return draft.model_copy(update={"files": files})


def environment(run: Run) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": versions,
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
        "rows": {side: len(rows.texts) for side, rows in sides.items()},
        "label_counts": {
            side: dict(zip(run.labels, np.bincount(rows.labels, minlength=len(run.labels)).tolist(), strict=True))
            for side, rows in sides.items()
        },
        "row_hashes": {side: [text_digest(text).hex()[:16] for text in rows.texts] for side, rows in sides.items()},
    }


def reference_stats(run: Run, best: Candidate, temperature: float) -> dict[str, Any]:
    """The baseline for drift: shares of answers and of confidence on the validation rows."""
    from modeling.heads import softmax

    probabilities = softmax(best.validation_logits / np.float32(temperature))
    answers = np.bincount(probabilities.argmax(1), minlength=len(run.labels)) / max(1, len(probabilities))
    confidence, edges = np.histogram(probabilities.max(1), bins=10, range=(0.0, 1.0))
    return {
        "rows": len(probabilities),
        "answer_shares": dict(zip(run.labels, answers.tolist(), strict=True)),
        "confidence_histogram": {"edges": edges.tolist(), "counts": confidence.tolist()},
        "mean_confidence": float(probabilities.max(1).mean()),
    }


def _golden_texts(run: Run) -> list[str]:
    """Rows of every class first, then more, from those held out."""
    rows = run.validation
    firsts = [int(np.flatnonzero(rows.labels == label)[0]) for label in np.unique(rows.labels)]
    rest = [row for row in range(len(rows.texts)) if row not in set(firsts)]
    return [rows.texts[row] for row in [*firsts, *rest][:GOLDEN_ROWS]]


def _matrix(evaluation: dict[str, Any]) -> list[list[int]]:
    matrix: list[list[int]] = (evaluation["test"] or evaluation["validation"])["confusion_matrix"]
    return matrix


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    import csv
    import io

    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()
