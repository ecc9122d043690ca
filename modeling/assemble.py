"""Manifest and files → the parts of a runnable version, every file checked; and the golden-row check.

What `read_version` reads, `write_version_files` wrote on the training side: the two are in one module
so that they cannot drift apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model_registry.errors import ManifestUnsupported
from model_registry.manifest import ModelManifest
from model_registry.store import ArtifactStore, verify_files
from modeling.adapters import Adapter
from modeling.backbone import Backbone
from modeling.errors import GoldenRowsDiffer, WeightsInvalid
from modeling.heads import TaskHead
from modeling.inputs import MODALITIES, Example
from modeling.linear_text import LinearText
from modeling.linear_tokens import LinearTokens
from modeling.tasks import DEFAULT_TASK, TASKS, Calibration, Task
from modeling.weights import FloatArray

GOLDEN_ROWS = 8
REFERENCE_STATS = "reference_stats.json"
_MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class GoldenRow:
    """An example and its logits: one for each output or, if its task goes by states, such a row for each position."""

    example: Example
    logits: Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class VersionParts:
    """A version read from the store. `backbone` is its own for a full fine-tune, else the shared one is named by
    `manifest.base`; exactly one of `head` and `linear` is set."""

    manifest: ModelManifest
    head: TaskHead | None
    linear: LinearText | LinearTokens | None
    adapter: Adapter | None
    backbone: Backbone | None
    max_length: int | None
    calibration: Calibration
    golden: tuple[GoldenRow, ...]

    @property
    def task(self) -> Task:
        return TASKS[self.manifest.task]

    @property
    def own_bytes(self) -> int:
        """What this version adds to the memory of its backbone."""
        parts = (self.head, self.linear, self.adapter)
        return sum(part.size_bytes for part in parts if part is not None)


def write_version_files(
    folder: Path,
    *,
    head: TaskHead | None = None,
    linear: LinearText | LinearTokens | None = None,
    labels: Sequence[str],
    max_length: int | None,
    temperature: float,
    calibration: dict[str, Any] | None = None,
    golden: Sequence[GoldenRow],
    task: str = DEFAULT_TASK,
    thresholds: Sequence[float] | None = None,
) -> None:
    """Writes what `read_version` reads, but for `adapter/` and `full/`, which their own modules write.

    `thresholds` are for several labels, one per label; left out, each is the task's default. Raises `ValueError` if
    they, the labels or the temperature do not fit the task.
    """
    given = {"temperature": temperature, "thresholds": thresholds}
    fitted = TASKS[task].calibration(given, labels, None)
    TASKS[task].outputs(labels)
    limits = {"thresholds": list(fitted.thresholds)} if fitted.thresholds else {}
    folder.mkdir(parents=True, exist_ok=True)
    if head is not None:
        (folder / "head.safetensors").write_bytes(head.to_bytes())
    for name, data in (linear.files() if linear is not None else {}).items():
        (folder / name).write_bytes(data)
    key, to_json = TASKS[task].modality, MODALITIES[TASKS[task].modality].to_json
    documents = {
        "labels.json": list(labels),
        "preprocess.json": {"schema": 1, "max_length": max_length},
        "calibration.json": {"temperature": temperature, **limits, **(calibration or {})},
        "golden.json": {"rows": [{key: to_json(row.example), "logits": row.logits} for row in golden]},
    }
    for name, document in documents.items():
        content = json.dumps(document, indent=1)
        if len(content) > _MAX_JSON_BYTES:  # it could never be read again
            raise ValueError(f"{name} would have {len(content):,} bytes, more than {_MAX_JSON_BYTES:,}")
        (folder / name).write_text(content)


def read_version(store: ArtifactStore, manifest: ModelManifest) -> VersionParts:
    """Checks every file against the manifest, then reads them.

    Raises `ArtifactError`, `WeightsInvalid`, `AdapterMismatch`, `BackboneUnavailable`.
    """
    verify_files(store, manifest.prefix, manifest.files)
    folder = store.local_path(manifest.prefix)
    if manifest.task not in TASKS:
        raise ManifestUnsupported(f"manifest.json: task {manifest.task!r} is none of {', '.join(TASKS)}")
    kind, task = manifest.kind, TASKS[manifest.task]
    labels = tuple(_json(store, manifest, "labels.json"))
    if labels != manifest.labels:
        raise WeightsInvalid("labels.json contradicts the manifest")
    try:
        outputs = task.outputs(labels)
        calibration = task.calibration(_json(store, manifest, "calibration.json"), labels, _reference(store, manifest))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsInvalid(f"calibration.json or {REFERENCE_STATS}: {error}") from error
    parts = VersionParts(
        manifest=manifest,
        head=None
        if kind == "baseline"
        else TaskHead.read(folder / "head.safetensors", temperature=calibration.temperature),
        linear=_linear(folder, task) if kind == "baseline" else None,
        adapter=read_adapter(store, manifest) if kind == "lora" else None,
        backbone=Backbone.open(folder / "full") if kind == "full" else None,
        max_length=_json(store, manifest, "preprocess.json")["max_length"],
        calibration=calibration,
        golden=tuple(_golden(row, task.modality) for row in _json(store, manifest, "golden.json")["rows"]),
    )
    given = parts.head.labels if parts.head else len(parts.linear.bias) if parts.linear else 0
    if given != outputs:
        raise WeightsInvalid(f"the weights give {given} outputs; {task.name} with {len(labels)} labels needs {outputs}")
    return parts


def _linear(folder: Path, task: Task) -> LinearText | LinearTokens:
    return LinearTokens.read(folder) if task.needs == "states" else LinearText.read(folder)


def read_adapter(store: ArtifactStore, manifest: ModelManifest) -> Adapter:
    """The LoRA weights of a version of kind `lora`, as its files say. Raises `AdapterMismatch`, `WeightsInvalid`."""
    return Adapter.read(store.local_path(manifest.prefix) / "adapter")


def check_golden(
    parts: VersionParts,
    logits_of: Callable[[Sequence[Example]], Sequence[FloatArray] | FloatArray],
    *,
    precision: str = "fp32",
) -> None:
    """Runs the golden rows in one go and compares. Raises `GoldenRowsDiffer`."""
    compare_golden(parts, logits_of([row.example for row in parts.golden]), precision=precision)


def compare_golden(parts: VersionParts, logits: Sequence[FloatArray] | FloatArray, *, precision: str = "fp32") -> None:
    """Raise `GoldenRowsDiffer` if the golden rows' logits, float32[outputs] or [positions, outputs] for each, are not
    the stored ones, as the task judges it (`Task.same`)."""
    if not parts.golden:
        raise GoldenRowsDiffer("the version stores no golden rows")
    stored, given = (
        [np.atleast_2d(np.asarray(row, np.float32)) for row in rows]
        for rows in ([row.logits for row in parts.golden], logits)
    )
    shapes, stored_shapes = [row.shape for row in given], [row.shape for row in stored]
    if shapes != stored_shapes:
        raise GoldenRowsDiffer(f"golden rows give logits of shapes {shapes}, stored are {stored_shapes}")
    wanted, got = np.concatenate(stored), np.concatenate(given)
    if not parts.task.same(wanted, got, parts.calibration, precision=precision):
        worst = float(np.abs(got - wanted).max())
        raise GoldenRowsDiffer(f"golden rows differ from their stored logits by {worst:.2g} in {precision}")


def _reference(store: ArtifactStore, manifest: ModelManifest) -> Any:
    """The answers on validation, if the version brings them."""
    has_any = any(entry.path == REFERENCE_STATS for entry in manifest.files)
    return _json(store, manifest, REFERENCE_STATS) if has_any else None


def _json(store: ArtifactStore, manifest: ModelManifest, name: str) -> Any:
    try:
        return json.loads(store.get_bytes(f"{manifest.prefix}/{name}", max_bytes=_MAX_JSON_BYTES))
    except ValueError as error:
        raise WeightsInvalid(f"{name} is not JSON") from error


def _golden(row: dict[str, Any], modality: str) -> GoldenRow:
    return GoldenRow(MODALITIES[modality].from_json(row[modality]), tuple(row["logits"]))
