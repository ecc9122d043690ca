"""The model card from a report: what it says, and that user text cannot break its tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.evaluation.classification import report
from finetune.evaluation.slices import slices
from finetune.evaluation.tasks.multi_label import LabelSetRules
from finetune.evaluation.tasks.regression import NumberRules
from finetune.evaluation.tasks.single_label import ClassRules
from model_registry.card import TaskTerms, render_card
from model_registry.manifest import ModelManifest

LABELS = ("good", "a|b\nc")


def card(*, with_test: bool = True, **changed: Any) -> str:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 200)
    logits = (np.eye(2)[truth] + random.normal(size=(200, 2))).astype(np.float32)
    side = report(logits, truth, LABELS, temperature=1.5)
    side["slices"] = slices({"site": ["x|y"] * 200}, truth, logits.argmax(1), metric="accuracy")
    evaluation = {
        "metric": "macro_f1",
        "temperature": 1.5,
        "validation": side,
        "test": side if with_test else None,
        "methods": [{"method": "lora", "seconds": 3.0, "validation": side}],
        "rows": {"train": 900, "validation": 200, "test": 200},
        "verdict": [{"code": "overfitting", "severity": "warning", "message": "It overfits.", "evidence": {}}],
    } | changed
    return rendered(manifest(), evaluation, ClassRules.card)


def rendered(of: ModelManifest, evaluation: dict[str, Any], terms: TaskTerms) -> str:
    return render_card(
        of,
        evaluation,
        terms,
        metadata={"team": "news"},
        files=["eval/residuals.svg", "eval/calibration.svg", "labels.json"],
        fingerprint={"datasets": {"train": {"id": "ds_1", "sha256": "ab" * 32}}},
        environment={},
    )


def manifest(**changed: Any) -> ModelManifest:
    values: dict[str, Any] = {"method": "lora", "labels": LABELS} | changed
    return ModelManifest(tenant="default", name="m", version=2, kind="head", created_at=0.0, files=(), **values)


def test_it_holds_verdict_intervals_pictures_and_data() -> None:
    text = card()
    assert "- **Warning.** It overfits." in text
    assert text.count(" to ") >= 4 and "| macro_f1 | 0." in text
    assert "![Calibration](eval/calibration.svg)\n![Residuals](eval/residuals.svg)" in text
    assert "risk_coverage.svg" not in text and "loss" not in text
    assert f"- train: ds_1, sha256 {'ab' * 32}" in text and "- team: news" in text


def test_labels_and_values_stay_in_their_cells() -> None:
    text = card()
    assert "| a\\|b c | 0." in text and "| x\\|y | 200 |" in text


def test_figures_of_validation_alone_are_named_as_such() -> None:
    text = card(with_test=False)
    assert "## Quality on the validation rows" in text and "flatter it" in text
    assert "flatter it" not in card()


def test_gates_and_abstention_are_told() -> None:
    gate = {"gate": "mcnemar", "status": "failed", "message": "too few rows", "figures": {}}
    judged = {"wanted": "if_better", "champion": 1, "is_passed": False, "gates": [gate]}
    found = {"aurc": 0.1, "target_accuracy": 0.9, "threshold": 0.8, "test": {"coverage": 0.5, "accuracy": 0.91}}
    text = card(promotion=judged, abstention=found)
    assert "Gates, against version 1: not passed" in text and "- mcnemar failed: too few rows" in text
    assert "`threshold` 0.8000 for the accuracy 0.9" in text and "50.0% of the rows are answered, 0.9100" in text


def test_a_value_has_its_own_figures_and_no_labels() -> None:
    side = {
        "rmse": 0.5,
        "mae": 0.25,
        "r2": 0.75,
        "rows": 40.0,
        "loss": 0.25,
        "intervals_95": {"rmse": (0.4, 0.6)},
        "residuals": {"mean": 0.125, "quantiles": {"0.05": -1.5, "0.95": 2}},
    }
    evaluation = {
        "metric": "rmse",
        "validation": side,
        "test": None,
        "rows": {"train": 90, "validation": 40, "test": 0},
        "methods": [{"method": "linear_probe", "seconds": 3.0, "validation": side}],
    }
    metrics = {name: value for name, value in side.items() if isinstance(value, float)}
    text = rendered(manifest(task="text-regression", labels=(), metrics=metrics), evaluation, NumberRules.card)
    assert "- Task: text-regression\n" in text and "chosen by rmse" in text
    assert "| rmse | 0.5000 | 0.4000 to 0.6000 |\n| mae | 0.2500 | – |\n| r2 | 0.7500 | – |" in text
    assert "| linear_probe | 0.5000 | 0.2500 | 0.7500 | 3.0 |" in text
    assert "mean +0.125; quantiles 5%: -1.5, 95%: +2." in text
    assert "extrapolated" in text and "| rows |" not in text
    for absent in ("Calibration error", "precision", "macro", "Labels with few rows"):
        assert absent not in text


def test_several_labels_have_a_table_of_each() -> None:
    row = {"label": "a|b", "precision": 0.5, "recall": 0.25, "f1": 0.333, "rows": 12, "threshold": 0.3}
    side = {"micro_f1": 0.5, "macro_f1": 0.4, "per_class": [row]}
    evaluation = {
        "metric": "micro_f1",
        "validation": side,
        "test": side,
        "rows": {"train": 90, "validation": 40, "test": 40},
        "methods": [{"method": "linear_probe", "seconds": 3.0, "validation": {"micro_f1": 0.5}}],
    }
    metrics = {"micro_f1": 0.5, "subset_accuracy": 0.3, "rows": 40.0}
    text = rendered(manifest(task="text-multi-label", metrics=metrics), evaluation, LabelSetRules.card)
    assert "| micro_f1 | 0.5000 | – |\n| subset_accuracy | 0.3000 | – |" in text
    assert "| a\\|b | 0.500 | 0.250 | 0.333 | 12 | 0.300 |" in text
    row |= {"precision": None, "recall": None, "f1": None, "rows": 0}
    evaluation |= {
        "not_judged": [{"label": "a|b", "train": 1, "validation": 0, "test": 0}],
        "failed_methods": [{"method": "lora", "reason": "the loss | became infinite"}],
    }
    text = rendered(manifest(task="text-multi-label", metrics=metrics), evaluation, LabelSetRules.card)
    assert "| a\\|b | – | – | – | 0 | 0.300 |" in text and "no test row has them: a\\|b." in text
    assert "lora failed: the loss" in text
    assert "| linear_probe | 0.5000 | – | 3.0 |" in text
