"""Would more rows help? A cheap method fitted on growing parts of the training rows, and what follows from it.

Error is taken to fall as a power of the number of rows, `error = a · rows^-b` (Hestness et al., 2017),
fitted by least squares to the logarithms. Four points carry no further than the next doubling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finetune.evaluation.intervals import paired_difference
from modeling.weights import FloatArray, IntArray

FRACTIONS = (0.125, 0.25, 0.5)
_LEAST_PART = 40  # below this many rows a point says more about the draw than about the data

Fit = Callable[[IntArray], FloatArray]


def data_curve(
    labels: IntArray, validation_labels: IntArray, whole: FloatArray, fit: Fit, *, method: str, seed: int
) -> dict[str, Any] | None:
    """The curve of `method`, or None where the rows are too few for one.

    `fit(rows)` trains on these training rows and gives the validation logits; `whole` are those after
    training on all of them.
    """
    parts = [part for part in nested_parts(labels, seed=seed) if len(part) >= _LEAST_PART]
    if not parts or not len(validation_labels):
        return None
    logits = [*(fit(part) for part in parts), whole]
    rows = [*(len(part) for part in parts), len(labels)]
    is_right = [one.argmax(1) == validation_labels for one in logits]
    accuracy = [float(right.mean()) for right in is_right]
    gain, interval = paired_difference(is_right[-1], is_right[-2], seed=seed)
    return {
        "method": method,
        "points": [{"rows": count, "accuracy": value} for count, value in zip(rows, accuracy, strict=True)],
        "last_doubling": {"from_rows": rows[-2], "to_rows": rows[-1], "gain": gain, "interval_95": interval},
        "next_doubling": extrapolated(rows, accuracy, validation_rows=len(validation_labels)),
    }


def nested_parts(labels: IntArray, *, seed: int) -> list[IntArray]:
    """Row positions of an eighth, a quarter and a half of the rows, each part of the next, every class in each."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    # Ranks within the class, in that order: cutting by them keeps the classes' shares and one row of each at least.
    rank = np.zeros(len(labels))
    for label in np.unique(labels):
        own = order[labels[order] == label]
        rank[own] = np.arange(len(own)) / len(own)
    return [np.flatnonzero(rank < fraction).astype(np.int64) for fraction in FRACTIONS]


def extrapolated(rows: Sequence[int], accuracy: Sequence[float], *, validation_rows: int) -> dict[str, Any]:
    """Accuracy expected with twice the rows, with the range that the fit's residuals leave open."""
    # Half a wrong row counts for none: the logarithm of no error at all would decide the fit alone.
    errors = np.maximum(1 - np.asarray(accuracy), 0.5 / validation_rows)
    x, y = np.log(np.asarray(rows, dtype=np.float64)), np.log(errors)
    slope, intercept = (float(value) for value in np.polyfit(x, y, 1))
    slope = min(slope, 0.0)  # more rows do not make it worse; what looks so is noise
    residuals = y - (slope * x + intercept)
    spread = float(np.sqrt((residuals**2).sum() / max(1, len(rows) - 2)))
    # Twice the rows multiply the error by 2^slope; it starts from what is measured, not from the line.
    expected = float(np.exp(y[-1] + slope * np.log(2)))
    return {
        "rows": 2 * rows[-1],
        "accuracy": 1 - expected,
        "range": [1 - min(1.0, expected * float(np.exp(2 * spread))), 1 - expected * float(np.exp(-2 * spread))],
        "exponent": slope,
    }
