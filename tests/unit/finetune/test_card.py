"""The model card from a report: what stands in it, and that user text cannot break its tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.evaluation import report
from finetune.judgement.slices import slices
from model_registry.card import CardContext, render_card
from model_registry.manifest import ModelManifest

LABELS = ("good", "a|b\nc")


def card(*, with_test: bool = True, **changed: Any) -> str:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 200)
    logits = (np.eye(2)[truth] + random.normal(size=(200, 2))).astype(np.float32)
    side = report(logits, truth, LABELS, temperature=1.5)
    side["slices"] = slices({"site": ["x|y"] * 200}, truth, logits.argmax(1), metric="accuracy")
    evaluation = {
        "metric": "macro_f1", "temperature": 1.5, "validation": side, "test": side if with_test else None,
        "methods": [{"method": "lora", "seconds": 3.0, "validation": side}],
        "rows": {"train": 900, "validation": 200, "test": 200},
        "verdict": [{"code": "overfitting", "severity": "warning", "message": "It overfits.", "evidence": {}}],
    } | changed  # fmt: skip
    manifest = ModelManifest(
        tenant="default", name="m", version=2, kind="head", method="lora", labels=LABELS, created_at=0.0, files=()
    )
    context = CardContext(
        metadata={"team": "news"}, files=["eval/calibration.svg", "labels.json"],
        fingerprint={"datasets": {"train": {"id": "ds_1", "sha256": "ab" * 32}}},
    )  # fmt: skip
    return render_card(manifest, evaluation, context)


def test_it_holds_verdict_intervals_pictures_and_data() -> None:
    text = card()
    assert "- **Warning.** It overfits." in text
    assert text.count(" to ") >= 4 and "| macro_f1 | 0." in text
    assert "![Calibration](eval/calibration.svg)" in text and "risk_coverage.svg" not in text
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
