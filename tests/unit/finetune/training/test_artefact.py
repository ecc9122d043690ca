"""What a version stores can be read back, whatever the texts and the labels were."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from finetune.data.labelled import LabelledRows
from finetune.evaluation.tasks import RULES
from finetune.training.artefact import _golden_examples
from model_registry.errors import ManifestUnsupported
from model_registry.manifest import MAX_LABELS, MAX_LABELS_BYTES, MAX_MANIFEST_BYTES, ModelManifest, too_many_labels
from model_registry.store import FileStore, put_tree
from modeling.assemble import GOLDEN_ROWS, GoldenRow, read_version, write_version_files
from modeling.heads import DenseLayer, TaskHead
from modeling.inputs import MODALITIES

LONG = "x" * 900_000


def run(texts: list[str]) -> Any:
    labels: Any = np.arange(len(texts)) % 2
    rows = LabelledRows(np.arange(len(texts)), texts, labels)
    return cast(Any, SimpleNamespace(validation=rows, rules=RULES["single_label"], modality=MODALITIES["text"]))


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        (["a", "b", "c"], ["a", "b", "c"]),
        ([LONG, "b", "c", LONG], ["b", "c"]),
        ([str(number) for number in range(20)], [str(number) for number in range(GOLDEN_ROWS)]),
    ],
)
def test_golden_rows_are_those_that_can_be_read_back(texts: list[str], kept: list[str]) -> None:
    assert _golden_examples(run(texts)) == kept


def test_texts_that_are_all_too_long_leave_a_version_with_golden_rows() -> None:
    found = _golden_examples(run([LONG] * 10))
    assert len(found) == GOLDEN_ROWS and all(0 < len(text) < 10_000 for text in found)


def manifest(labels: tuple[str, ...], **files: Any) -> ModelManifest:
    values: dict[str, Any] = {"files": (), **files}
    return ModelManifest(
        tenant="t", name="m", version=1, kind="head", method="linear_probe", labels=labels, created_at=0.0, **values
    )


def largest_labels() -> tuple[str, ...]:
    """As many, as long, and as costly to write in JSON as labels may be."""
    names = [f"{number:x}\x01".rjust(MAX_LABELS_BYTES // MAX_LABELS, "\x01") for number in range(MAX_LABELS)]
    assert too_many_labels(names) is None
    return tuple(names)


def test_a_version_with_the_largest_labels_is_read_back(tmp_path: Path) -> None:
    labels = largest_labels()
    head = TaskHead((DenseLayer(np.zeros((MAX_LABELS, 4), np.float32), np.zeros(MAX_LABELS, np.float32)),))
    logits = np.random.default_rng(0).normal(size=MAX_LABELS).astype(np.float32).astype(float) * 1e-5
    golden = [GoldenRow(chr(1) * 100_000, logits.tolist()) for _ in range(GOLDEN_ROWS)]
    write_version_files(tmp_path / "v", head=head, labels=labels, max_length=16, temperature=1.0, golden=golden)
    store = FileStore(tmp_path / "store")
    draft = manifest(labels)
    entries = put_tree(store, draft.prefix, tmp_path / "v")
    again = ModelManifest.from_bytes(draft.model_copy(update={"files": entries}).to_bytes())
    assert read_version(store, again).manifest.labels == labels


def test_a_manifest_that_could_not_be_read_again_is_not_written() -> None:
    with pytest.raises(ManifestUnsupported, match="more than"):
        manifest(tuple(str(number) * 40 for number in range(30_000))).to_bytes()
    assert len(manifest(largest_labels()).to_bytes()) < MAX_MANIFEST_BYTES / 2


def test_a_file_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    golden = [GoldenRow(LONG * 20, (1.0, 0.0))]
    with pytest.raises(ValueError, match=r"golden\.json would have"):
        write_version_files(tmp_path, labels=["a", "b"], max_length=16, temperature=1.0, golden=golden)
    assert json.loads((tmp_path / "labels.json").read_text()) == ["a", "b"]
