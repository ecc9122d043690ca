"""Bootstrap intervals of every headline metric at once, and whether two models differ on the same rows.

A resample of rows is a multinomial draw of the confusion matrix's cells, so no row is ever drawn:
the cost depends on the number of non-empty cells, not on the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from modeling.weights import IntArray

SAMPLES = 1000
_SAMPLES_AT_ONCE = 100
Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


def intervals(labels: IntArray, answers: IntArray, *, seed: int = 0, samples: int = SAMPLES) -> dict[str, list[float]]:
    """95 % percentile intervals [low, high] of accuracy, macro_f1 and weighted_f1; empty without rows."""
    if len(labels) == 0:
        return {}
    drawn = resampled(labels, answers, seed=seed, samples=samples)
    return {name: percentiles(values) for name, values in drawn.items()}


def resampled(labels: IntArray, answers: IntArray, *, seed: int, samples: int = SAMPLES) -> dict[str, Values]:
    """Each metric on `samples` resamples of the rows: float64[samples]."""
    classes = int(max(labels.max(), answers.max())) + 1
    cells, counts = np.unique(labels.astype(np.int64) * classes + answers, return_counts=True)
    random = np.random.default_rng(seed)
    parts = [
        _metrics(random.multinomial(len(labels), counts / len(labels), size=size), cells // classes, cells % classes)
        for size in _chunks(samples)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def percentiles(values: Values) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def paired_difference(
    is_right: npt.NDArray[np.bool_], other_is_right: npt.NDArray[np.bool_], *, seed: int = 0, samples: int = SAMPLES
) -> tuple[float, list[float]]:
    """How much more often the first is right than the second on the same rows, and the 95 % interval."""
    only_first = int((is_right & ~other_is_right).sum())
    only_second = int((other_is_right & ~is_right).sum())
    rows = len(is_right)
    shares = [only_first / rows, only_second / rows, 1 - (only_first + only_second) / rows]
    drawn = np.random.default_rng(seed).multinomial(rows, shares, size=samples)
    return (only_first - only_second) / rows, percentiles((drawn[:, 0] - drawn[:, 1]) / rows)


def _chunks(samples: int) -> Sequence[int]:
    whole, rest = divmod(samples, _SAMPLES_AT_ONCE)
    return [_SAMPLES_AT_ONCE] * whole + ([rest] if rest else [])


def _metrics(drawn: Counts, true: Counts, answered: Counts) -> Mapping[str, Values]:
    """From cell counts int64[samples, cells]; `true` and `answered` are the cells' classes. F1 = 2 tp / (rows + said).

    Classes that a resample has no row of do not count in it, as in `finetune.evaluation.classification.score`.
    """
    is_hit = true == answered
    hits = _by_class(drawn * is_hit, true)
    rows, said = _by_class(drawn, true), _by_class(drawn, answered)
    classes = max(hits.shape[1], said.shape[1])
    hits, rows, said = (_widened(counts, classes) for counts in (hits, rows, said))
    f1 = 2 * hits / np.maximum(rows + said, 1)
    total = drawn.sum(1)
    return {
        "accuracy": hits.sum(1) / total,
        "macro_f1": (f1 * (rows > 0)).sum(1) / np.maximum((rows > 0).sum(1), 1),
        "weighted_f1": (f1 * rows).sum(1) / total,
    }


def _by_class(drawn: Counts, classes: Counts) -> Counts:
    """Sums of the cells of one class: int64[samples, classes]."""
    order = np.argsort(classes, kind="stable")
    present, starts = np.unique(classes[order], return_index=True)
    sums = np.zeros((len(drawn), int(classes.max()) + 1), dtype=np.int64)
    sums[:, present] = np.add.reduceat(drawn[:, order], starts, axis=1)
    return sums


def _widened(counts: Counts, classes: int) -> Counts:
    return np.pad(counts, ((0, 0), (0, classes - counts.shape[1])))


# The exact McNemar test


def p_value(only_first: int, only_second: int) -> float:
    """Two-sided, from the rows that only one of the two gets right: a fair coin as often or more unevenly."""
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    return float(min(1.0, 2 * binom.cdf(min(only_first, only_second), discordant, 0.5)))


def least_discordant(significance: float) -> int:
    """How few rows on which the two differ can show anything, were all of them for one side: 2 · 0.5^n ≤ p."""
    return int(np.ceil(np.log2(2 / significance)))


def mcnemar(is_right: npt.NDArray[np.bool_], other_is_right: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Rows, rows that only the first or only the second gets right, and the p-value."""
    only_first, only_second = int((is_right & ~other_is_right).sum()), int((other_is_right & ~is_right).sum())
    return {
        "rows": len(is_right),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": p_value(only_first, only_second),
    }
