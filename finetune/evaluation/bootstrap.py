"""Bootstrap of figures that are functions of sums over rows: a resample is a weighted sum, no row is ever copied.

`parts` are float64[rows, sums], what each row adds; `figures(sums)` gives each figure float64[samples] of float64
[samples, sums].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.targets import Metric
from finetune.evaluation.intervals import SAMPLES, around, percentiles

Values = npt.NDArray[np.float64]
Figures = Callable[[Values], Mapping[str, Values]]
_WEIGHTS_AT_ONCE = 4_000_000


def measured(parts: Values, figures: Figures) -> dict[str, float]:
    return {name: float(values[0]) for name, values in figures(parts.sum(0, keepdims=True)).items()}


def intervals(
    parts: Values, figures: Figures, *, seed: int, samples: int = SAMPLES, added: Values | None = None
) -> dict[str, list[float]]:
    """95 % percentile intervals [low, high] of every figure; empty without rows. `added` rows are drawn, too, as in
    `intervals.resampled`."""
    if not len(parts):
        return {}
    drawn = parts if added is None else np.concatenate([parts, added])
    values, found = measured(parts, figures), figures(_sums(drawn, seed, samples))
    return {name: around(values[name], percentiles(found[name])) for name in found}


def paired(
    parts: Values, others: Values, figures: Figures, *, metric: Metric, seed: int, samples: int = SAMPLES
) -> dict[str, Any]:
    """How the first differs from the second in `metric` on the same rows, and a two-sided p-value by the share of
    resamples on the other side of zero (Efron and Tibshirani, An introduction to the bootstrap, 1993)."""
    width = parts.shape[1]
    both = _sums(np.concatenate([parts, others], axis=1), seed, samples)
    drawn = figures(both[:, :width])[metric.name] - figures(both[:, width:])[metric.name]
    difference = measured(parts, figures)[metric.name] - measured(others, figures)[metric.name]
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    # Few rows that differ show nothing, however much alike they are: as if each were the toss of a coin.
    least = 2 * 0.5 ** min(1000, int((parts != others).any(1).sum()))
    return {
        "metric": metric.name,
        "rows": len(parts),
        "difference": difference,
        "gain": metric.gain(difference),
        "interval_95": percentiles(drawn),
        "p_value": min(1.0, max(least, 2 * (tail + 1) / (samples + 1))),
    }


def _sums(parts: Values, seed: int, samples: int) -> Values:
    """float64[samples, sums]: each sample draws as many rows as there are, with replacement."""
    rows = len(parts)
    random = np.random.default_rng(seed)
    at_once = max(1, _WEIGHTS_AT_ONCE // rows)
    sizes = [min(at_once, samples - start) for start in range(0, samples, at_once)]
    chances = np.full(rows, 1 / rows)
    return np.concatenate([random.multinomial(rows, chances, size=size) @ parts for size in sizes])
