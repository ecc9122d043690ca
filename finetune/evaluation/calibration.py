"""Temperature scaling and how well probabilities match outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from modeling.heads import sigmoid, softmax
from modeling.weights import FloatArray, IntArray

Losses = npt.NDArray[np.float64]
_BINS = 15
_CHANCES = 1000
_FOLDS = 5
_LEAST_FOLDED = 10  # rows, below which nothing can be told


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


def if_it_helps(
    fit: Callable[[FloatArray, Any], float],
    losses: Callable[[FloatArray, Any], Losses],
    outputs: FloatArray,
    targets: Any,
) -> float:
    """What `fit` gives, if temperatures fitted without a row make the losses of these rows less, beyond chance (one
    standard error); else 1.0. `losses` gives float64[rows]."""
    rows = len(outputs)
    if rows < _LEAST_FOLDED:
        return 1.0
    folds = np.random.default_rng(0).permutation(rows) % min(_FOLDS, rows)
    gains = np.zeros(rows)
    for fold in np.unique(folds):
        held = folds == fold
        temperature = np.float32(fit(outputs[~held], targets[~held]))
        gains[held] = losses(outputs[held], targets[held]) - losses(outputs[held] / temperature, targets[held])
    is_shown = gains.mean() > gains.std(ddof=1) / np.sqrt(rows)
    return fit(outputs, targets) if is_shown else 1.0


def row_losses(logits: FloatArray, labels: IntArray) -> Losses:
    """Negative log-likelihood of each row's label: float64[rows]."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels], np.float64)


def binary_row_losses(logits: FloatArray, targets: FloatArray) -> Losses:
    """Binary cross-entropy of each row, the mean over its labels: float64[rows]."""
    wide = logits.astype(np.float64)
    return np.asarray((np.logaddexp(0.0, wide) - wide * targets).mean(1), np.float64)


def _best_temperature(loss: Callable[[float], float]) -> float:
    """Of a loss by the temperature's logarithm; 1.0 where none is better."""
    found = minimize_scalar(loss, bounds=(np.log(0.01), np.log(100.0)), method="bounded")
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


def mean_binary_log_loss(logits: FloatArray, targets: FloatArray) -> float:
    """Binary cross-entropy, the mean over rows and labels."""
    wide = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, wide) - wide * targets)) if wide.size else 0.0


def negative_log_likelihood(logits: FloatArray, labels: IntArray) -> float:
    return float(np.mean(row_losses(logits, labels)))


def _uniform_negative_log_likelihood(logits: FloatArray) -> float:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(1)) - shifted.mean(1)))


def expected_calibration_error(
    logits: FloatArray, labels: IntArray, *, temperature: float = 1.0, bins: int = _BINS
) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins, weighted by rows."""
    probabilities = softmax(logits / np.float32(temperature))
    return _mean_gap(probabilities.max(1), probabilities.argmax(1) == labels, bins)


def binary_calibration_error(
    logits: FloatArray, targets: FloatArray, *, temperature: float = 1.0, bins: int = _BINS
) -> float:
    """Mean gap between probability and frequency over equal-width bins of all rows and labels, weighted by size."""
    return _mean_gap(sigmoid(logits / np.float32(temperature)).ravel(), targets.ravel(), bins)


def error_by_chance(logits: FloatArray, *, temperature: float = 1.0, is_binary: bool = False) -> float:
    """The calibration error that probabilities without any fault stay below on this number of rows, 19 times of 20.

    Each bin's gap is a sum of independent outcomes, and taken for normal.
    """
    scaled = logits / np.float32(temperature)
    likely = sigmoid(scaled).ravel() if is_binary else softmax(scaled).max(1)
    wide = likely.astype(np.float64)
    if not len(wide):
        return 0.0
    variance = np.bincount(_bin_of(wide, _BINS), weights=wide * (1 - wide), minlength=_BINS)
    drawn = np.random.default_rng(0).standard_normal((_CHANCES, _BINS)) * np.sqrt(variance)
    return float(np.percentile(np.abs(drawn).sum(1) / len(wide), 95))


def _bin_of(probabilities: Losses, bins: int) -> npt.NDArray[np.int64]:
    return np.minimum((probabilities * bins).astype(np.int64), bins - 1)


def _mean_gap(probabilities: FloatArray, outcomes: npt.NDArray[Any], bins: int) -> float:
    wide = probabilities.astype(np.float64)
    index = _bin_of(wide, bins)
    sums = np.bincount(index, weights=wide - outcomes, minlength=bins)
    return float(np.abs(sums).sum() / max(1, len(wide)))
