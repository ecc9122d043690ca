"""Metrics and the evaluation report. Pure: logits and labels in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from finetune.evaluation.calibration import error_by_chance, expected_calibration_error, negative_log_likelihood
from finetune.evaluation.intervals import intervals
from modeling.weights import FloatArray, IntArray

_MOST_IN_MATRIX = 1000  # classes; its numbers grow with their square


def score(metric: str, logits: FloatArray, labels: IntArray) -> float:
    """The named metric of the largest logits: accuracy, macro_f1 or weighted_f1. Higher is better."""
    return score_answers(metric, logits.argmax(1), labels)


def score_answers(metric: str, answers: IntArray, labels: IntArray) -> float:
    """The same of answers that are chosen already."""
    if metric == "accuracy":
        return float(accuracy_score(labels, answers))
    average = {"macro_f1": "macro", "weighted_f1": "weighted"}[metric]
    present = np.unique(labels)  # classes without a row here have no F1
    return float(f1_score(labels, answers, labels=present, average=average, zero_division=0.0))


def summary(logits: FloatArray, labels: IntArray) -> dict[str, float]:
    """The metrics of one split."""
    return {
        "accuracy": score("accuracy", logits, labels),
        "macro_f1": score("macro_f1", logits, labels),
        "weighted_f1": score("weighted_f1", logits, labels),
        "loss": negative_log_likelihood(logits, labels),
        "rows": float(len(labels)),
    }


def report(
    logits: FloatArray, labels: IntArray, names: Sequence[str], *, temperature: float, seed: int = 0
) -> dict[str, Any]:
    """One split in full: per class, confusion matrix (rows true, columns answered; up to a thousand classes),
    intervals, calibration.

    A class without a row here has None for its figures: it cannot be judged.
    """
    answers = logits.argmax(1)
    index, is_small = list(range(len(names))), len(names) <= _MOST_IN_MATRIX
    found = intervals(labels, answers, seed=seed)
    precision, recall, f1, support = precision_recall_fscore_support(labels, answers, labels=index, zero_division=0.0)
    return {
        **summary(logits, labels),
        "per_class": [
            {
                "label": name,
                "precision": float(precision[i]) if support[i] else None,
                "recall": float(recall[i]) if support[i] else None,
                "f1": float(f1[i]) if support[i] else None,
                "rows": int(support[i]),
            }
            for i, name in enumerate(names)
        ],
        **({"confusion_matrix": confusion_matrix(labels, answers, labels=index).tolist()} if is_small else {}),
        "intervals_95": found,
        "accuracy_interval_95": found.get("accuracy"),
        "ece_before": expected_calibration_error(logits, labels),
        "ece_after": expected_calibration_error(logits, labels, temperature=temperature),
        "ece_by_chance": error_by_chance(logits, temperature=temperature),
    }
