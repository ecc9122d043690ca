"""The pictures: valid, the same bytes twice, and safe whatever the labels are."""

from __future__ import annotations

import importlib.util
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra finetune")

from finetune.evaluation import plots
from finetune.evaluation.classification import report
from finetune.evaluation.curves import precision_recall, reliability, risk_coverage

HISTORY = [
    {"step": 10 * step, "epoch": step, "train_loss": 1 / step, "loss": 0.5 + 0.02 * step, "macro_f1": 0.8}
    for step in range(1, 6)
]


def drawn(labels: list[str], *, history: list[dict[str, Any]] = HISTORY) -> dict[str, bytes]:
    random = np.random.default_rng(0)
    truth = random.integers(0, len(labels), 300)
    logits = (2 * np.eye(len(labels))[truth] + random.normal(size=(300, len(labels)))).astype(np.float32)
    curves = {
        "test": {
            "precision_recall": precision_recall(logits, truth, labels),
            "reliability": {name: reliability(logits, truth, temperature=1.0) for name in ("before", "after")},
            "risk_coverage": risk_coverage(logits, truth, temperature=1.0),
        },
        "history": {
            "method": "lora",
            "metric": "macro_f1",
            "entries": history,
            "best_step": 20,
            "overfits_after_step": 10,
        },
    }
    evaluation = {
        "test": report(logits, truth, labels, temperature=1.0),
        "abstention": {
            "threshold": 0.7,
            "target_accuracy": 0.9,
            "test": {"coverage": 0.8, "accuracy": 0.91},
        },
    }
    return plots.draw(evaluation, curves, labels)


def texts(svg: bytes) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_all_pictures_are_drawn_and_the_same_figures_give_the_same_bytes() -> None:
    first = drawn(["a", "b", "c"])
    assert set(first) == {
        "learning_curves.svg",
        "confusion_matrix.svg",
        "precision_recall.svg",
        "calibration.svg",
        "risk_coverage.svg",
    }
    assert first == drawn(["a", "b", "c"])
    assert {"best, kept", "overfitting"} <= set(texts(first["learning_curves.svg"]))
    assert any("threshold 0.700" in text for text in texts(first["risk_coverage.svg"]))


def test_one_evaluation_makes_no_curve() -> None:
    assert "learning_curves.svg" not in drawn(["a", "b"], history=HISTORY[:1])


def test_labels_are_text_and_nothing_else() -> None:
    hostile = ["<script>alert(1)</script>", "a $x_1$ b", "bell \x07 and \x00", "x" * 300, "新聞"]
    for svg in drawn(hostile).values():
        tree = ElementTree.fromstring(svg)  # not well-formed XML would raise
        assert not [node for node in tree.iter() if node.tag.endswith("script")]
    shown = texts(drawn(hostile)["confusion_matrix.svg"])
    assert "<script>alert(1)</scr…" in shown and "a $x_1$ b" in shown and "bell ? and ?" in shown


def test_many_classes_are_thinned_to_the_most_frequent() -> None:
    pictures = drawn([f"c{number}" for number in range(60)])
    assert any("40 most frequent of 60" in text for text in texts(pictures["confusion_matrix.svg"]))
    assert sum(text.startswith("c") for text in texts(pictures["precision_recall.svg"])) == 8


def test_without_matplotlib_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert drawn(["a", "b"]) == {}
