"""How good the answers are for each value of a metadata column, the worst first. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.targets import Metric, metric_of
from finetune.evaluation.classification import score_answers
from finetune.evaluation.intervals import intervals
from modeling.weights import IntArray

LEAST_ROWS = 20
MOST_VALUES = 50
_NO_VALUE = "(none)"

Inside = npt.NDArray[np.bool_]
Figure = Callable[[Inside], tuple[float, list[float]]]


def slices(
    extras: Mapping[str, Sequence[str | None]], labels: IntArray, answers: IntArray, *, metric: str, seed: int = 0
) -> list[dict[str, Any]]:
    """Per column: the values with at least 20 rows, at most 50 of them, and how many rows that leaves out.

    The most frequent values are kept; they are in order of `metric`, the lowest first.
    """

    def figure(inside: Inside) -> tuple[float, list[float]]:
        own, said = labels[inside], answers[inside]
        return score_answers(metric, said, own), intervals(own, said, seed=seed)[metric]

    return slices_by(extras, len(labels), figure, metric=metric_of(metric))


def slices_by(
    extras: Mapping[str, Sequence[str | None]], rows: int, figure: Figure, *, metric: Metric
) -> list[dict[str, Any]]:
    """The same of any metric; `figure` gives its value and interval on some of the rows. The worst come first."""
    return [
        {"column": column, **_column(values, figure, metric)}
        for column, values in extras.items()
        if len(values) == rows and rows
    ]


def _column(values: Sequence[str | None], figure: Figure, metric: Metric) -> dict[str, Any]:
    named = np.asarray([_NO_VALUE if value is None else value for value in values], dtype=object)
    found, counts = np.unique(named, return_counts=True)
    enough = [index for index in np.lexsort((found, -counts)) if counts[index] >= LEAST_ROWS]
    kept = enough[:MOST_VALUES]
    rows = [_one(str(found[index]), named == found[index], figure, metric) for index in kept]
    return {
        "metric": metric.name,
        "values": sorted(rows, key=lambda row: (metric.gain(row[metric.name]), row["value"])),
        "left_out": {
            "too_few_rows": {"values": len(found) - len(enough), "rows": int(counts.sum() - counts[enough].sum())},
            "too_many_values": {
                "values": len(enough) - len(kept),
                "rows": int(counts[enough].sum() - counts[kept].sum()),
            },
        },
    }


def _one(value: str, inside: Inside, figure: Figure, metric: Metric) -> dict[str, Any]:
    found, interval = figure(inside)
    return {"value": value[:200], "rows": int(inside.sum()), metric.name: found, "interval_95": interval}
