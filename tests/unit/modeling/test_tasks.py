"""From logits to answers for each task, and what a version of each task keeps in its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier

from model_registry.errors import ManifestUnsupported
from model_registry.manifest import FileEntry, ModelManifest, sha256_hex
from model_registry.store import FileStore, put_tree
from modeling.assemble import (
    REFERENCE_STATS,
    GoldenRow,
    VersionParts,
    compare_golden,
    read_version,
    write_version_files,
)
from modeling.errors import GoldenRowsDiffer, WeightsInvalid
from modeling.heads import DenseLayer, TaskHead
from modeling.linear_text import LinearText, new_vectorizer
from modeling.tasks import NO_CALIBRATION, TASKS, Calibration, reached
from modeling.weights import FloatArray

logits_of = arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-200, 200, width=32))
TORCH: dict[str, Any] = {
    "text-classification": lambda x: x.softmax(1),
    "text-multi-label": torch.sigmoid,
    "text-regression": lambda x: x,
    "token-classification": lambda x: x.softmax(-1),
}


@given(logits=logits_of)
@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_torch(task: str, logits: FloatArray) -> None:
    ours = TASKS[task].scores(logits, NO_CALIBRATION)
    assert ours.dtype == np.float32 and ours.shape == logits.shape
    np.testing.assert_allclose(ours, TORCH[task](torch.from_numpy(logits)).numpy(), rtol=1e-5, atol=1e-7)


@given(logits=logits_of, temperature=st.floats(0.1, 10))
def test_a_temperature_divides_logits_and_leaves_values_alone(logits: FloatArray, temperature: float) -> None:
    for task in ("text-classification", "text-multi-label"):
        expected = TASKS[task].scores(logits / np.float32(temperature), NO_CALIBRATION)
        np.testing.assert_array_equal(TASKS[task].scores(logits, Calibration(temperature)), expected)
    np.testing.assert_array_equal(TASKS["text-regression"].scores(logits, Calibration(temperature)), logits)


def test_each_task_has_an_answer_of_its_own() -> None:
    scores = np.asarray([[0.2, 0.7, 0.7], [0.5, 0.1, 0.4]], np.float32)
    one, many, value, _ = TASKS.values()
    assert one.answers(scores, NO_CALIBRATION).tolist() == [1, 0]
    assert many.answers(scores, NO_CALIBRATION).tolist() == [[False, True, True], [True, False, False]]
    chosen = many.answers(scores, Calibration(thresholds=(0.1, 0.8, 0.4)))
    assert chosen.tolist() == [[True, False, True], [True, False, True]]
    assert value.answers(scores[:, :1], NO_CALIBRATION).tolist() == scores[:, 0].tolist()
    assert [one.outputs(["a", "b"]), many.outputs(["a", "b"]), value.outputs([])] == [2, 2, 1]
    with pytest.raises(ValueError, match="no labels"):
        value.outputs(["a"])


@given(st.floats(0, 1, width=32))
def test_a_probability_reaches_a_threshold_of_the_same_size(value: float) -> None:
    assert reached(np.asarray([[value]], np.float32), value).all()
    assert reached(np.asarray([[value]], np.float32), [float(f"{value:.9g}")]).all()  # as JSON would carry it


def test_the_baselines_margins_are_probabilities_and_values_of_scikit_learn() -> None:
    texts = [f"{'good' if i % 2 else 'bad'} {'film' if i % 3 else 'play'} number {i}" for i in range(24)]
    targets = np.asarray([[i % 2, i % 3 == 0] for i in range(24)])
    values = np.asarray([1000.0 + i % 2 * 50 for i in range(24)])
    vectorizer = new_vectorizer()
    features = vectorizer.fit_transform(texts)
    several = OneVsRestClassifier(LogisticRegression(C=100)).fit(features, targets)
    ridge = Ridge(alpha=0.1).fit(features, values)
    weight = np.concatenate([one.coef_ for one in several.estimators_])
    bias = np.concatenate([one.intercept_ for one in several.estimators_])

    def margins(weight: Any, bias: Any) -> FloatArray:
        terms = tuple(vectorizer.get_feature_names_out())
        idf, plain = vectorizer.idf_.astype(np.float32), np.atleast_1d(bias).astype(np.float32)
        return LinearText(terms, idf, np.atleast_2d(weight).astype(np.float32), plain).margins(texts)

    many, value = TASKS["text-multi-label"], TASKS["text-regression"]
    probabilities = many.scores(margins(weight, bias), NO_CALIBRATION)
    np.testing.assert_allclose(probabilities, several.predict_proba(features), atol=1e-5)
    np.testing.assert_array_equal(many.answers(probabilities, NO_CALIBRATION), several.predict(features))
    answered = value.answers(value.scores(margins(ridge.coef_, ridge.intercept_), NO_CALIBRATION), NO_CALIBRATION)
    np.testing.assert_allclose(answered, ridge.predict(features), rtol=1e-5)
    assert answered.max() - answered.min() > 10


# Files

HEAD = TaskHead((DenseLayer(np.eye(2, 4, dtype=np.float32), np.zeros(2, np.float32)),))
ONE = TaskHead((DenseLayer(np.ones((1, 4), np.float32), np.full(1, 2000, np.float32)),))


def staged(folder: Path, task: str, logits: Sequence[tuple[float, ...]], **options: Any) -> tuple[FileStore, Any]:
    labels = [] if task == "text-regression" else ["p", "q"]
    head = ONE if task == "text-regression" else HEAD
    golden = [GoldenRow(f"text {row}", values) for row, values in enumerate(logits)]
    write_version_files(
        folder / "v", head=head, labels=labels, max_length=16, temperature=1.0, golden=golden, task=task, **options
    )
    store = FileStore(folder / "store")
    draft = ModelManifest(
        tenant="t",
        name="m",
        version=1,
        kind="head",
        task=task,
        method="linear_probe",
        labels=tuple(labels),
        created_at=0.0,
        files=(),
    )
    return store, draft.model_copy(update={"files": put_tree(store, draft.prefix, folder / "v")})


def parts_of(folder: Path, task: str, logits: Sequence[tuple[float, ...]], **options: Any) -> VersionParts:
    return read_version(*staged(folder, task, logits, **options))


def test_thresholds_come_back_and_are_half_where_none_are_given(tmp_path: Path) -> None:
    rows = [(1.0, 0.0)]
    assert parts_of(tmp_path / "a", "text-multi-label", rows, thresholds=[0.3, 0.25]).calibration.thresholds == (
        0.3,
        0.25,
    )
    assert parts_of(tmp_path / "b", "text-multi-label", rows).calibration.thresholds == (0.5, 0.5)
    assert parts_of(tmp_path / "c", "text-classification", rows).calibration.thresholds == ()
    assert parts_of(tmp_path / "d", "text-regression", [(2001.5,)]).calibration.thresholds == ()


@pytest.mark.parametrize("thresholds", [[0.5], [0.5, 1.5], [0.5, float("nan")], []])
def test_thresholds_that_fit_no_labels_are_refused(tmp_path: Path, thresholds: list[float]) -> None:
    with pytest.raises(ValueError, match="one per label"):
        staged(tmp_path, "text-multi-label", [(1.0, 0.0)], thresholds=thresholds)


def test_files_of_another_task_are_refused(tmp_path: Path) -> None:
    store, manifest = staged(tmp_path, "text-classification", [(1.0, 0.0)])
    with pytest.raises(WeightsInvalid, match="labels"):
        read_version(store, manifest.model_copy(update={"task": "text-regression"}))
    for options in ({"thresholds": [0.5]}, {"labels": ["p"]}, {"temperature": 2.0}):
        with pytest.raises(ValueError, match="regression"):
            values: dict[str, Any] = {"labels": [], "max_length": None, "temperature": 1.0, "golden": []} | options
            write_version_files(tmp_path / "w", head=ONE, task="text-regression", **values)


def test_values_may_differ_by_their_own_size_alone(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, "text-regression", [(2000.0,), (2010.0,)])
    compare_golden(parts, np.asarray([[2000.1], [2010.0]], np.float32))
    close = np.asarray([[2000.5], [2010.0]], np.float32)
    compare_golden(parts, close, precision="bf16")
    with pytest.raises(GoldenRowsDiffer):
        compare_golden(parts, close)
    for precision in ("fp32", "bf16"):
        with pytest.raises(GoldenRowsDiffer):
            compare_golden(parts, np.asarray([[2010.0], [2000.0]], np.float32), precision=precision)
        with pytest.raises(GoldenRowsDiffer):
            compare_golden(parts, np.full((2, 1), np.nan, np.float32), precision=precision)
    small = parts_of(tmp_path / "small", "text-regression", [(2e-6,), (3e-6,)])
    with pytest.raises(GoldenRowsDiffer):
        compare_golden(small, np.asarray([[3e-6], [2e-6]], np.float32))


def test_in_lower_precision_no_probability_moves_far(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, "text-multi-label", [(2.0, -2.0), (0.9, 0.0)], thresholds=[0.7, 0.5])
    compare_golden(parts, np.asarray([[2.1, -2.1], [0.8, 0.1]], np.float32), precision="bf16")  # 0.69 is close to 0.7
    for wrong in ([[-2.0, -2.0], [0.9, 0.0]], [[2.0, 2.0], [0.9, 0.0]], [[2.0, -2.0], [0.9, np.nan]]):
        with pytest.raises(GoldenRowsDiffer):
            compare_golden(parts, np.asarray(wrong, np.float32), precision="bf16")


def reference(folder: Path, document: dict[str, Any]) -> VersionParts:
    store, manifest = staged(folder, "text-regression", [(1.0,)])
    store.put_bytes(f"{manifest.prefix}/{REFERENCE_STATS}", json.dumps(document).encode())
    content = json.dumps(document).encode()
    entry = FileEntry(path=REFERENCE_STATS, size=len(content), sha256=sha256_hex(content))
    return read_version(store, manifest.model_copy(update={"files": (*manifest.files, entry)}))


def test_the_values_of_validation_come_as_shares(tmp_path: Path) -> None:
    found = reference(tmp_path / "a", {"value_histogram": {"edges": [-1.0, 0.0, 2.0], "counts": [1, 3]}})
    assert found.calibration.value_shares == ((-1.0, 0.0), (0.0, 0.25), (2.0, 1.0))
    assert reference(tmp_path / "b", {"rows": 0}).calibration.value_shares == ()
    assert (
        reference(tmp_path / "c", {"value_histogram": {"edges": [0.0, 1.0], "counts": [0]}}).calibration.value_shares
        == ()
    )
    assert parts_of(tmp_path / "d", "text-regression", [(1.0,)]).calibration.value_shares == ()


@pytest.mark.parametrize("edges", [[0.0], [0.0, 1.0, 1.0], [0.0, float("nan"), 2.0], [2.0, 1.0, 0.0]])
def test_a_histogram_that_does_not_rise_is_refused(tmp_path: Path, edges: list[float]) -> None:
    with pytest.raises(WeightsInvalid, match="rising edges"):
        reference(tmp_path, {"value_histogram": {"edges": edges, "counts": [1, 3]}})


# Manifests


def manifest(**values: Any) -> ModelManifest:
    given_values = {"tenant": "t", "name": "m", "version": 1, "kind": "head", "method": "x", "labels": ("a",)} | values
    return ModelManifest(**given_values, created_at=0.0, files=())


@pytest.mark.parametrize(("task", "problem"), [("text-multi-label", "multi_label"), ("text-regression", "regression")])
def test_manifests_of_earlier_releases_are_read(task: Any, problem: str) -> None:
    labels = () if task == "text-regression" else ("a",)
    content = json.loads(manifest(task=task, labels=labels, method="ia3").to_bytes())
    former = json.dumps(content | {"problem": problem, "parent": None}).encode()
    assert ModelManifest.from_bytes(former) == manifest(task=task, labels=labels, method="ia3")


def test_a_manifest_that_says_what_no_version_says_is_refused() -> None:
    content = manifest(task="text-multi-label").to_bytes()
    for old, new in ((b"text-multi-label", b"Text Multi"), (b'"method"', b'"methods"')):
        with pytest.raises(ManifestUnsupported):
            ModelManifest.from_bytes(content.replace(old, new, 1))


def test_an_unknown_task_is_named_with_the_known_ones(tmp_path: Path) -> None:
    store, known = staged(tmp_path, "text-classification", [(1.0, 0.0)])
    with pytest.raises(ManifestUnsupported, match="'smell-classification' is none of text-classification, "):
        read_version(store, known.model_copy(update={"task": "smell-classification"}))
