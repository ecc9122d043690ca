"""Manifest and files → the parts of a runnable version, every file checked; and the golden-row check.

What `read_version` reads, `write_version_files` wrote on the training side: the two stand together
so that they cannot drift apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model_registry.manifest import ModelManifest
from model_registry.store import ArtifactStore, verify_files
from modeling.adapters import Adapter
from modeling.backbone import Backbone
from modeling.errors import GoldenRowsDiffer, WeightsInvalid
from modeling.heads import TaskHead
from modeling.linear_text import LinearText
from modeling.preprocess import TextInput
from modeling.tasks import DEFAULT_THRESHOLD, Task, outputs_of, scores_of
from modeling.weights import FloatArray

GOLDEN_ROWS = 8
REFERENCE_STATS = "reference_stats.json"
_MAX_JSON_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class GoldenRow:
    text: TextInput
    logits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class VersionParts:
    """A version read from the store. `backbone` is its own for a full fine-tune, else the shared one is named by
    `manifest.base`; exactly one of `head` and `linear` is set."""

    manifest: ModelManifest
    head: TaskHead | None
    linear: LinearText | None
    adapter: Adapter | None
    backbone: Backbone | None
    max_length: int | None
    temperature: float
    golden: tuple[GoldenRow, ...]
    thresholds: tuple[float, ...] = ()
    """Of text-multi-label: the probability from which each label is given; else empty."""
    value_shares: tuple[tuple[float, float], ...] = ()
    """Of text-regression: values in order, each with the share of its answers on validation that lie below; empty where
    the version brings no `reference_stats.json`."""

    @property
    def own_bytes(self) -> int:
        """What this version adds to the memory of its backbone."""
        parts = (self.head, self.linear, self.adapter)
        return sum(part.size_bytes for part in parts if part is not None)


def write_version_files(
    folder: Path,
    *,
    head: TaskHead | None = None,
    linear: LinearText | None = None,
    labels: Sequence[str],
    max_length: int | None,
    temperature: float,
    calibration: dict[str, Any] | None = None,
    golden: Sequence[GoldenRow],
    task: Task = "text-classification",
    thresholds: Sequence[float] | None = None,
) -> None:
    """Writes what `read_version` reads, but for `adapter/` and `full/`, which their own modules write.

    `thresholds` are those of text-multi-label, one for each label; left out, each is `DEFAULT_THRESHOLD`. Raises
    `ValueError` where they, the labels or the temperature do not fit the task.
    """
    limits = _thresholds(task, labels, thresholds)
    if task == "text-regression" and (labels or temperature != 1):
        raise ValueError("text-regression has no labels, and no temperature but 1")
    folder.mkdir(parents=True, exist_ok=True)
    if head is not None:
        (folder / "head.safetensors").write_bytes(head.to_bytes())
    for name, data in (linear.files() if linear is not None else {}).items():
        (folder / name).write_bytes(data)
    documents = {
        "labels.json": list(labels),
        "preprocess.json": {"schema": 1, "max_length": max_length},
        "calibration.json": {"temperature": temperature, **limits, **(calibration or {})},
        "golden.json": {"rows": [{"text": row.text, "logits": row.logits} for row in golden]},
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1))


def read_version(store: ArtifactStore, manifest: ModelManifest) -> VersionParts:
    """Checks every file against the manifest, then reads them.

    Raises `ArtifactError`, `WeightsInvalid`, `AdapterMismatch`, `BackboneUnavailable`.
    """
    verify_files(store, manifest.prefix, manifest.files)
    folder = store.local_path(manifest.prefix)
    calibration = _json(store, manifest, "calibration.json")
    temperature = float(calibration["temperature"])
    labels = tuple(_json(store, manifest, "labels.json"))
    if labels != manifest.labels or not temperature > 0:
        raise WeightsInvalid("labels.json or calibration.json contradict the manifest")
    kind, task = manifest.kind, manifest.task
    if task == "text-regression" and temperature != 1:
        raise WeightsInvalid("calibration.json has a temperature, and values have none")
    try:
        limits = _thresholds(task, labels, calibration.get("thresholds"))
    except (TypeError, ValueError) as error:
        raise WeightsInvalid(f"calibration.json: {error}") from error
    parts = VersionParts(
        manifest=manifest,
        head=None if kind == "baseline" else TaskHead.read(folder / "head.safetensors", temperature=temperature),
        linear=LinearText.read(folder) if kind == "baseline" else None,
        adapter=read_adapter(store, manifest) if kind == "lora" else None,
        backbone=Backbone.open(folder / "full") if kind == "full" else None,
        max_length=_json(store, manifest, "preprocess.json")["max_length"],
        temperature=temperature,
        golden=tuple(_golden(row) for row in _json(store, manifest, "golden.json")["rows"]),
        thresholds=tuple(limits.get("thresholds", ())),
        value_shares=_value_shares(store, manifest) if task == "text-regression" else (),
    )
    outputs = parts.head.labels if parts.head else len(parts.linear.bias) if parts.linear else 0
    wanted = outputs_of(task, labels)
    if outputs != wanted:
        raise WeightsInvalid(f"the weights give {outputs} outputs; {task} with {len(labels)} labels needs {wanted}")
    return parts


def read_adapter(store: ArtifactStore, manifest: ModelManifest) -> Adapter:
    """The LoRA weights of a version of kind `lora`, as its files say. Raises `AdapterMismatch`, `WeightsInvalid`."""
    return Adapter.read(store.local_path(manifest.prefix) / "adapter")


def check_golden(
    parts: VersionParts, logits_of: Callable[[Sequence[TextInput]], FloatArray], *, precision: str = "fp32"
) -> None:
    """Runs the golden rows in one go and compares. Raises `GoldenRowsDiffer`."""
    compare_golden(parts, logits_of([row.text for row in parts.golden]), precision=precision)


def compare_golden(parts: VersionParts, got: FloatArray, *, precision: str = "fp32") -> None:
    """Raises `GoldenRowsDiffer` where the golden rows' logits float32[rows, outputs] are not the stored ones.

    fp32: within 1e-4 of the stored logits, relative to their size; lower precision: the same answer
    where the margin exceeds 0.05, and no probability further than 0.05. The values of regression are in units of their
    own: in fp32 within 1e-4 of the largest and 1e-3 of what they span, in lower precision within a tenth of the span.
    """
    if not parts.golden:
        raise GoldenRowsDiffer("the version stores no golden rows")
    wanted = np.asarray([row.logits for row in parts.golden], dtype=np.float32)
    if got.shape != wanted.shape:
        raise GoldenRowsDiffer(f"golden rows give logits of shape {got.shape}, stored are {wanted.shape}")
    task = parts.manifest.task
    worst, size = float(np.abs(got - wanted).max()), float(np.abs(wanted).max())
    if task == "text-regression":
        is_near = worst <= 1e-4 * size + (1e-3 if precision == "fp32" else 0.1) * float(np.ptp(wanted))
    elif precision == "fp32":
        is_near = worst <= 1e-4 * max(1.0, size)
    else:
        is_near = _is_same_answer(parts, wanted, got)
    if not is_near:
        raise GoldenRowsDiffer(f"golden rows differ from their stored logits by {worst:.2g} in {precision}")


def _is_same_answer(parts: VersionParts, wanted: FloatArray, got: FloatArray) -> bool:
    """For answers of lower precision: no probability is far off, and so no label that stands further than that from
    its threshold changes; and where the labels share 1, those with a clear winner keep it."""
    task = parts.manifest.task
    p, q = (scores_of(task, logits, temperature=parts.temperature) for logits in (wanted, got))
    if not np.abs(p - q).max() <= 0.05:
        return False
    if task == "text-multi-label":
        return True
    ordered = np.sort(p, axis=1)
    is_clear = ordered[:, -1] - ordered[:, -2] > 0.05
    return not (p.argmax(1) != q.argmax(1))[is_clear].any()


def _value_shares(store: ArtifactStore, manifest: ModelManifest) -> tuple[tuple[float, float], ...]:
    """From `value_histogram` of `reference_stats.json`, where there is one. Raises `WeightsInvalid`."""
    if not any(entry.path == REFERENCE_STATS for entry in manifest.files):
        return ()
    found = _json(store, manifest, REFERENCE_STATS).get("value_histogram")
    if found is None or not sum(found["counts"]):
        return ()
    edges, counts = np.asarray(found["edges"], np.float64), np.asarray(found["counts"], np.float64)
    is_ordered = np.isfinite(edges).all() and (np.diff(edges) > 0).all() and (counts >= 0).all()
    if edges.shape != (len(counts) + 1,) or not is_ordered:
        raise WeightsInvalid(f"{REFERENCE_STATS}: value_histogram needs rising edges and a count between each two")
    shares = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    return tuple(zip(edges.tolist(), shares.tolist(), strict=True))


def _thresholds(task: Task, labels: Sequence[str], given: Sequence[float] | None) -> dict[str, list[float]]:
    """What stands in `calibration.json` beside the temperature; nothing but for text-multi-label. Raises `ValueError`,
    `TypeError`."""
    if task != "text-multi-label":
        if given is not None:
            raise ValueError(f"thresholds are for text-multi-label, not {task}")
        return {}
    thresholds = [DEFAULT_THRESHOLD] * len(labels) if given is None else [float(value) for value in given]
    if len(thresholds) != len(labels) or not all(0 <= value <= 1 for value in thresholds):
        raise ValueError(f"thresholds must be {len(labels)} numbers from 0 to 1, one for each label")
    return {"thresholds": thresholds}


def _json(store: ArtifactStore, manifest: ModelManifest, name: str) -> Any:
    try:
        return json.loads(store.get_bytes(f"{manifest.prefix}/{name}", max_bytes=_MAX_JSON_BYTES))
    except ValueError as error:
        raise WeightsInvalid(f"{name} is not JSON") from error


def _golden(row: dict[str, Any]) -> GoldenRow:
    text = row["text"]
    return GoldenRow(text if isinstance(text, str) else (text[0], text[1]), tuple(row["logits"]))
