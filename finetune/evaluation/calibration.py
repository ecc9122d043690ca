"""Temperature scaling and how well probabilities match outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from modeling.heads import sigmoid, softmax
from modeling.weights import FloatArray, IntArray


def fit_temperature(logits: FloatArray, labels: IntArray) -> float:
    """The temperature with the least negative log-likelihood of `labels` (Guo et al., 2017); 1.0 where none helps.

    The labels are smoothed by one row in n + 2, as in Platt's scaling: on rows that are all answered
    right the plain likelihood has no minimum and would make every answer certain.
    """
    if len(labels) == 0:
        return 1.0
    smoothing = 1.0 / (len(labels) + 2)

    def loss(log_temperature: float) -> float:
        scaled = logits / np.float32(np.exp(log_temperature))
        likely, uniform = negative_log_likelihood(scaled, labels), _uniform_negative_log_likelihood(scaled)
        return (1 - smoothing) * likely + smoothing * uniform

    return _best_temperature(loss)


def fit_binary_temperature(logits: FloatArray, targets: FloatArray) -> float:
    """The same for labels that are decided one by one: one temperature for all, targets float32[rows, labels]."""
    if targets.size == 0:
        return 1.0
    smoothing = 1.0 / (targets.size + 2)
    smoothed = targets * np.float32(1 - smoothing) + np.float32(smoothing / 2)

    def loss(log_temperature: float) -> float:
        return mean_binary_log_loss(logits / np.float32(np.exp(log_temperature)), smoothed)

    return _best_temperature(loss)


def _best_temperature(loss: Callable[[float], float]) -> float:
    """Of a loss by the temperature's logarithm; 1.0 where none is better."""
    found = minimize_scalar(loss, bounds=(np.log(0.01), np.log(100.0)), method="bounded")
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


def mean_binary_log_loss(logits: FloatArray, targets: FloatArray) -> float:
    """Binary cross-entropy, the mean over rows and labels."""
    wide = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, wide) - wide * targets)) if wide.size else 0.0


def negative_log_likelihood(logits: FloatArray, labels: IntArray) -> float:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    picked = shifted[np.arange(len(labels)), labels]
    return float(np.mean(np.log(np.exp(shifted).sum(1)) - picked))


def _uniform_negative_log_likelihood(logits: FloatArray) -> float:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(1)) - shifted.mean(1)))


def expected_calibration_error(
    logits: FloatArray, labels: IntArray, *, temperature: float = 1.0, bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins, weighted by rows."""
    probabilities = softmax(logits / np.float32(temperature))
    return _mean_gap(probabilities.max(1), probabilities.argmax(1) == labels, bins)


def binary_calibration_error(
    logits: FloatArray, targets: FloatArray, *, temperature: float = 1.0, bins: int = 15
) -> float:
    """Mean gap between probability and frequency over equal-width bins of all rows and labels, weighted by size."""
    return _mean_gap(sigmoid(logits / np.float32(temperature)).ravel(), targets.ravel(), bins)


def _mean_gap(probabilities: FloatArray, outcomes: npt.NDArray[Any], bins: int) -> float:
    wide = probabilities.astype(np.float64)
    index = np.minimum((wide * bins).astype(int), bins - 1)
    sums = np.bincount(index, weights=wide - outcomes, minlength=bins)
    return float(np.abs(sums).sum() / max(1, len(wide)))
