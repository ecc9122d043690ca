"""Intervals of every headline metric at once, and whether two models differ on the same rows.

Accuracy is a share, and has Wilson's interval. The others are resampled: a resample of rows is a multinomial draw of
the confusion matrix's cells, so no row is ever drawn, and the cost depends on the number of non-empty cells. Two right
and two wrong answers are added before (Agresti and Coull, 1998): without them, a model that answers two rows of two
right would be right in every resample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, norm

from modeling.weights import IntArray

SAMPLES = 1000
ADDED = 2  # answers of each kind
_Z = 1.96
_SAMPLES_AT_ONCE = 100
Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


def intervals(labels: IntArray, answers: IntArray, *, seed: int = 0, samples: int = SAMPLES) -> dict[str, list[float]]:
    """95 % intervals [low, high] of accuracy, macro_f1 and weighted_f1; empty without rows."""
    if len(labels) == 0:
        return {}
    drawn = resampled(labels, answers, seed=seed, samples=samples)
    measured = _metrics(*_confusion(labels, answers))
    found = {name: around(float(measured[name][0]), percentiles(values)) for name, values in drawn.items()}
    return {**found, "accuracy": wilson(int((labels == answers).sum()), len(labels))}


def wilson(hits: int, rows: int) -> list[float]:
    """The 95 % interval [low, high] of a share, of which `hits` of `rows` were seen (Wilson, 1927)."""
    centre, share = hits + _Z**2 / 2, hits / rows
    half = _Z * np.sqrt(rows * share * (1 - share) + _Z**2 / 4)
    low, high = (centre - half) / (rows + _Z**2), (centre + half) / (rows + _Z**2)
    return around(share, [max(0.0, float(low)), min(1.0, float(high))])


def around(value: float, interval: Sequence[float]) -> list[float]:
    """The interval, widened to hold what was measured."""
    return [min(value, interval[0]), max(value, interval[1])]


def resampled(labels: IntArray, answers: IntArray, *, seed: int, samples: int = SAMPLES) -> dict[str, Values]:
    """Each metric on `samples` resamples of the rows and the four added ones: float64[samples]."""
    (counts,), true, answered = _confusion(labels, answers)
    classes = max(2, int(max(true.max(), answered.max())) + 1)
    present, rows = np.unique(labels, return_counts=True)
    added = ADDED * rows / len(labels)
    # Of each class its part: right ones, and as many that are taken for the next class.
    counts = np.concatenate([counts, added, added])
    true = np.concatenate([true, present, present])
    answered = np.concatenate([answered, present, (present + 1) % classes])
    random, total = np.random.default_rng(seed), len(labels) + 2 * ADDED
    shares = counts / counts.sum()
    parts = [_metrics(random.multinomial(total, shares, size=size), true, answered) for size in _chunks(samples)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _confusion(labels: IntArray, answers: IntArray) -> tuple[Counts, Counts, Counts]:
    """Counts int64[1, cells] of the cells that are not empty, and their true and answered classes."""
    classes = int(max(labels.max(), answers.max())) + 1
    cells, counts = np.unique(labels.astype(np.int64) * classes + answers, return_counts=True)
    return counts[None], cells // classes, cells % classes


def percentiles(values: Values) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def paired_difference(
    is_right: npt.NDArray[np.bool_], other_is_right: npt.NDArray[np.bool_], *, seed: int = 0, samples: int = SAMPLES
) -> tuple[float, list[float]]:
    """How much more often the first is right than the second on the same rows, and the 95 % interval.

    Half a row is added to each of the four outcomes (Agresti and Min, 2005), or rows that both answer right would show
    that they are equal.
    """
    only_first = int((is_right & ~other_is_right).sum())
    only_second = int((other_is_right & ~is_right).sum())
    rows, total = len(is_right), len(is_right) + 2
    first, second = (only_first + 0.5) / total, (only_second + 0.5) / total
    drawn = np.random.default_rng(seed).multinomial(total, [first, second, 1 - first - second], size=samples)
    difference = (only_first - only_second) / rows
    return difference, around(difference, percentiles((drawn[:, 0] - drawn[:, 1]) / total))


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


def rows_that_would_show(rows: int, z: float, *, significance: float) -> int | None:
    """How many rows it takes to show a difference that is `z` standard errors on these; None if there is none."""
    if z <= 0:
        return None
    return int(np.ceil(rows * max(1.0, float(norm.isf(significance / 2)) / z) ** 2))


def mcnemar(is_right: npt.NDArray[np.bool_], other_is_right: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Rows, rows that only the first or only the second gets right, and the p-value."""
    only_first, only_second = int((is_right & ~other_is_right).sum()), int((other_is_right & ~is_right).sum())
    return {
        "rows": len(is_right),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": p_value(only_first, only_second),
    }
