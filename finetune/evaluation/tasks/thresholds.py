"""From which probability a label is given: the threshold with the highest F1 on validation rows. Pure."""

from __future__ import annotations

import numpy as np

from modeling.tasks import DEFAULT_THRESHOLD
from modeling.weights import FloatArray

LEAST_POSITIVES = 10  # of fewer, the best threshold is a matter of chance
LOWEST, HIGHEST = 0.05, 0.95


def fit_thresholds(probabilities: FloatArray, targets: FloatArray) -> tuple[float, ...]:
    """One for each label of float32[rows, labels]; `DEFAULT_THRESHOLD` for labels with fewer than ten rows, or with
    no row without them."""
    return tuple(_best(column, due > 0) for column, due in zip(probabilities.T, targets.T, strict=True))


def _best(scores: FloatArray, is_due: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
    """Between two rows' probabilities, so that one served with other last digits falls on the same side; of equally
    good thresholds the one nearest to the default."""
    if not LEAST_POSITIVES <= int(is_due.sum()) < len(is_due):
        return DEFAULT_THRESHOLD
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    hits = np.cumsum(is_due[order])
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + int(is_due.sum()))
    between = (ranked + np.append(ranked[1:], 0.0)) / 2
    is_end = np.append(np.diff(ranked) != 0, True)
    usable = is_end & (between >= LOWEST) & (between <= HIGHEST)
    said = scores >= np.float32(DEFAULT_THRESHOLD)
    default = 2 * int((said & is_due).sum()) / max(1, int(said.sum()) + int(is_due.sum()))
    if not usable.any() or f1[usable].max() <= default:
        return DEFAULT_THRESHOLD
    best = between[usable & (f1 == f1[usable].max())]
    return float(best[np.argmin(np.abs(best - DEFAULT_THRESHOLD))])
