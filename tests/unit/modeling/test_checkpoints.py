"""A published classifier taken apart, and versions read back from their files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from model_registry.manifest import BackboneRef, ModelManifest
from model_registry.store import FileStore, put_tree
from modeling.assemble import GoldenRow, check_golden, read_version, write_version_files
from modeling.checkpoints import import_classifier
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.errors import GoldenRowsDiffer, ModelingError, UnsupportedArchitecture
from modeling.heads import DenseLayer, TaskHead
from modeling.ingestion import READERS
from modeling.linear_text import LinearText, new_vectorizer
from modeling.tasks import NO_CALIBRATION, TASKS
from modeling.testing import write_tiny_checkpoint
from tests.support.rows import encoded_texts

TEXTS = ["a good film", "dull plot and a very bad actor", "wheat and oil"]


@pytest.mark.parametrize("model_type", sorted(READERS["text"].model_types - {"t5"}))
def test_the_parts_give_the_logits_of_the_whole(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "whole", model_type=model_type, labels=["x", "y", "z"])
    parts = import_classifier(folder, tmp_path / "parts", name="m", source="file:m")
    assert parts.labels == ("x", "y", "z")
    encoded = encoded_texts(parts.backbone.folder, TEXTS, limit=32)
    ours = parts.head.logits(TorchEngine(parts.backbone).run(EngineBatch(encoded)).pooled)
    whole = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for row, item in enumerate(encoded):
        inputs = {name: torch.from_numpy(array)[None] for name, array in item.arrays.items()}
        with torch.inference_mode():
            expected = whole(**inputs).logits[0].numpy()
        np.testing.assert_allclose(ours[row], expected, atol=1e-4)


def test_a_classifier_that_runs_a_decoder_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "whole", model_type="t5", labels=["x", "y"])
    with pytest.raises(UnsupportedArchitecture, match="'t5' cannot be imported: transformers runs its decoder too"):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"classifier_pooling": "mean"}, None), ({"classifier_activation": "relu"}, "other logits than as a whole")],
)
def test_a_modernbert_is_taken_as_its_configuration_says(tmp_path: Path, changes: Any, says: str | None) -> None:
    labels = ["x", "y", "z"]
    folder = write_tiny_checkpoint(tmp_path / "m", model_type="modernbert", labels=labels, norm_bias=True, **changes)
    if says is None:
        parts = import_classifier(folder, tmp_path / "parts", name="m", source="file:m")  # which compares the logits
        assert parts.backbone.info.pooling == "mean"
    else:
        with pytest.raises(GoldenRowsDiffer, match=says):
            import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


@pytest.mark.parametrize(
    ("labels", "problem", "task"),
    [
        (2, None, "text-classification"),
        (2, "single_label_classification", "text-classification"),
        (2, "multi_label_classification", "text-multi-label"),
        (1, "multi_label_classification", "text-multi-label"),
        (1, None, "text-regression"),
        (1, "regression", "text-regression"),
    ],
)
def test_the_problem_type_says_the_task(tmp_path: Path, labels: int, problem: str | None, task: str) -> None:
    names = [f"l{index}" for index in range(labels)]
    folder = write_tiny_checkpoint(tmp_path / "whole", labels=names, problem_type=problem)
    parts = import_classifier(folder, tmp_path / "parts", name="m", source="file:m")
    assert (parts.task.name, parts.head.labels) == (task, labels)
    assert parts.labels == (() if task == "text-regression" else tuple(names))


@pytest.mark.parametrize(("labels", "problem"), [(2, "regression"), (1, "single_label_classification"), (2, "ranking")])
def test_outputs_that_fit_no_task_are_refused(tmp_path: Path, labels: int, problem: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "w", labels=[f"l{i}" for i in range(labels)])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
    with pytest.raises(ModelingError, match=problem):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


@pytest.fixture
def version(tmp_path: Path) -> tuple[FileStore, ModelManifest, TaskHead]:
    head = TaskHead((DenseLayer(np.eye(2, 4, dtype=np.float32), np.zeros(2, np.float32)),))
    golden = [GoldenRow("a", (1.0, 0.0)), GoldenRow("b", (0.0, 1.0))]
    write_version_files(tmp_path / "v", head=head, labels=["p", "q"], max_length=16, temperature=1.5, golden=golden)
    store = FileStore(tmp_path / "store")
    base = BackboneRef(name="tiny", digest="0" * 64, source="x")
    draft = ModelManifest(
        tenant="t",
        name="m",
        version=1,
        kind="head",
        method="linear_probe",
        labels=("p", "q"),
        base=base,
        created_at=0.0,
        files=(),
    )
    return store, draft.model_copy(update={"files": put_tree(store, draft.prefix, tmp_path / "v")}), head


def test_a_version_is_read_back_as_it_was_written(version: tuple[FileStore, ModelManifest, TaskHead]) -> None:
    store, manifest, head = version
    parts = read_version(store, manifest)
    assert (parts.calibration.temperature, parts.max_length, parts.own_bytes) == (1.5, 16, head.size_bytes)
    check_golden(parts, lambda texts: np.asarray([[1, 0], [0, 1]], np.float32))
    for wrong in (np.asarray([[1, 0], [0, 1.01]], np.float32), np.full((2, 2), np.nan, np.float32), np.eye(3)):
        with pytest.raises(GoldenRowsDiffer):
            check_golden(parts, lambda texts, wrong=wrong: wrong)  # type: ignore[misc]


def test_a_lower_precision_may_differ_where_the_answer_is_close() -> None:
    golden = (GoldenRow("a", (2.0, 0.0)), GoldenRow("b", (0.02, 0.0)))
    parts = SimpleNamespace(golden=golden, task=TASKS["text-classification"], calibration=NO_CALIBRATION)
    check_golden(cast(Any, parts), lambda _: np.asarray([[1.9, 0], [0.0, 0.02]], np.float32), precision="bf16")
    with pytest.raises(GoldenRowsDiffer):
        check_golden(cast(Any, parts), lambda _: np.asarray([[0.0, 2.0], [0.02, 0.0]], np.float32), precision="bf16")


def test_any_altered_file_is_noticed(version: tuple[FileStore, ModelManifest, TaskHead]) -> None:
    from model_registry.errors import ArtifactError

    store, manifest, _ = version
    for entry in manifest.files:
        key = f"{manifest.prefix}/{entry.path}"
        content = store.get_bytes(key, max_bytes=1 << 20)
        for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
            store.put_bytes(key, damaged)
            with pytest.raises((ArtifactError, ModelingError)):
                read_version(store, manifest)
        store.put_bytes(key, content)
    read_version(store, manifest)


def test_the_baseline_serves_what_scikit_learn_trained(tmp_path: Path) -> None:
    from sklearn.svm import LinearSVC

    texts = [f"good film number {i}" if i % 2 else f"bad plot number {i}" for i in range(20)]
    vectorizer = new_vectorizer()
    features = vectorizer.fit_transform(texts)
    classifier = LinearSVC().fit(features, [i % 2 for i in range(20)])
    weight = np.concatenate([-classifier.coef_, classifier.coef_]).astype(np.float32)
    bias = np.concatenate([-classifier.intercept_, classifier.intercept_]).astype(np.float32)
    model = LinearText(tuple(vectorizer.get_feature_names_out()), vectorizer.idf_.astype(np.float32), weight, bias)
    for name, content in model.files().items():
        (tmp_path / name).write_bytes(content)
    margins = LinearText.read(tmp_path).margins(["good film", "bad plot", "unknown words"])
    expected = classifier.decision_function(vectorizer.transform(["good film", "bad plot", "unknown words"]))
    np.testing.assert_allclose(margins[:, 1], expected, atol=1e-5)
    np.testing.assert_allclose(margins[:, 0], -expected, atol=1e-5)
