"""Curves that a number would hide: precision-recall per class, reliability, risk against coverage. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from modeling.heads import softmax
from modeling.weights import FloatArray, IntArray

MOST_POINTS = 100
BINS = 15
_LEAST_ANSWERED = 20  # an accuracy over fewer answers says too little to set a threshold by
Values = npt.NDArray[np.float64]


def precision_recall(logits: FloatArray, labels: IntArray, names: Sequence[str]) -> list[dict[str, Any]]:
    """One against the rest for each class with rows: average precision, and the curve in at most 100 points.

    The score of a row is its probability of the class; average precision is the sum of precision over
    the steps of recall, without interpolation.
    """
    probabilities = softmax(logits)
    present = [index for index in range(len(names)) if (labels == index).any()]
    return [{"label": names[index], **one_against_rest(probabilities[:, index], labels == index)} for index in present]


def one_against_rest(scores: npt.NDArray[np.floating[Any]], is_positive: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """The precision-recall curve of scores [rows], at least one of them positive, in at most 100 points."""
    ranked: Values = scores.astype(np.float64)
    order = np.argsort(-ranked, kind="stable")
    ranked = ranked[order]
    found = np.cumsum(is_positive[order])
    ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # rows with equal scores come in together
    hits = found[ends]
    precision, recall = hits / (ends + 1), hits / found[-1]
    average = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    # Evenly over the steps of recall: over the rows, a rare class would keep one point or two.
    steps = np.flatnonzero(np.diff(hits, prepend=0) > 0)
    kept = steps[thinned(len(steps))]
    return {
        "average_precision": average,
        "precision": _rounded(precision[kept]),
        "recall": _rounded(recall[kept]),
        "threshold": _rounded(ranked[ends][kept]),
    }


def reliability(logits: FloatArray, labels: IntArray, *, temperature: float) -> dict[str, Any]:
    """Confidence against accuracy in equal-width bins, as served: empty bins are left out."""
    probabilities = softmax(logits / np.float32(temperature))
    confidence = probabilities.max(1).astype(np.float64)
    is_right = probabilities.argmax(1) == labels
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = []
    for bin_ in np.unique(index):
        inside = index == bin_
        bins.append(
            {
                "low": bin_ / BINS,
                "high": (bin_ + 1) / BINS,
                "rows": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(is_right[inside].mean()),
            }
        )
    return {"temperature": temperature, "bins": bins}


def risk_coverage(logits: FloatArray, labels: IntArray, *, temperature: float) -> dict[str, Any]:
    """Accuracy of the most confident answers by the share of rows answered, in at most 100 points.

    `aurc` is the mean error over all coverages (Geifman and El-Yaniv, 2017): 0 would be perfect.
    """
    confidence, accuracy = _selective(logits, labels, temperature)
    kept = thinned(len(confidence))
    return {
        "aurc": float(np.mean(1 - accuracy)) if len(accuracy) else None,
        "coverage": _rounded((kept + 1) / max(1, len(confidence))),
        "accuracy": _rounded(accuracy[kept]),
        "threshold": _rounded(confidence[kept]),
    }


def abstention(logits: FloatArray, labels: IntArray, *, temperature: float, target_accuracy: float) -> dict[str, Any]:
    """The lowest confidence from which answers reach `target_accuracy`; `threshold` None where none is found.

    It is between two rows' confidences, so that a served probability that differs in its last digits
    falls on the same side. At least 20 rows must be answered.
    """
    confidence, accuracy = _selective(logits, labels, temperature)
    is_last_of_equals = np.append(np.diff(confidence) != 0, True) if len(confidence) else np.zeros(0, bool)
    answered = np.arange(1, len(confidence) + 1)
    reached = np.flatnonzero((accuracy >= target_accuracy) & is_last_of_equals & (answered >= _LEAST_ANSWERED))
    if not len(reached):
        return {"target_accuracy": target_accuracy, "threshold": None, "coverage": 0.0, "accuracy": None}
    last = int(reached[-1])
    below = confidence[last + 1] if last + 1 < len(confidence) else 0.0
    return {
        "target_accuracy": target_accuracy,
        "threshold": float((confidence[last] + below) / 2),
        "coverage": (last + 1) / len(confidence),
        "accuracy": float(accuracy[last]),
    }


def at_threshold(
    logits: FloatArray, labels: IntArray, *, temperature: float, threshold: float
) -> dict[str, float | None]:
    """Coverage and accuracy of the answers whose confidence reaches `threshold`."""
    probabilities = softmax(logits / np.float32(temperature))
    is_answered = probabilities.max(1) >= threshold
    is_right = probabilities.argmax(1) == labels
    return {
        "coverage": float(is_answered.mean()) if len(labels) else 0.0,
        "accuracy": float(is_right[is_answered].mean()) if is_answered.any() else None,
    }


def _selective(logits: FloatArray, labels: IntArray, temperature: float) -> tuple[Values, Values]:
    """Confidences in falling order, and the accuracy of all rows up to each."""
    probabilities = softmax(logits / np.float32(temperature))
    confidence = probabilities.max(1).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    is_right = (probabilities.argmax(1) == labels)[order]
    return confidence[order], np.cumsum(is_right) / np.arange(1, len(is_right) + 1)


def thinned(points: int, most: int = MOST_POINTS) -> npt.NDArray[np.int64]:
    """Positions of at most `most` of `points`, evenly spread, both ends among them."""
    if points <= most:
        return np.arange(points)
    return np.unique(np.linspace(0, points - 1, most).round().astype(np.int64))


def _rounded(values: Values) -> list[float]:
    return [float(value) for value in np.round(values, 5)]
