"""How good the answers are for each value of a metadata column, the worst first. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evaluation import score_answers
from finetune.judgement.intervals import intervals
from modeling.weights import IntArray

LEAST_ROWS = 20
MOST_VALUES = 50
_NO_VALUE = "(none)"


def slices(
    extras: Mapping[str, Sequence[str | None]], labels: IntArray, answers: IntArray, *, metric: str, seed: int = 0
) -> list[dict[str, Any]]:
    """Per column: the values with at least 20 rows, at most 50 of them, and how many rows that leaves out.

    The most frequent values are kept; they stand in order of `metric`, the lowest first.
    """
    return [
        {"column": column, **_column(values, labels, answers, metric=metric, seed=seed)}
        for column, values in extras.items()
        if len(values) == len(labels) and len(labels)
    ]


def _column(
    values: Sequence[str | None], labels: IntArray, answers: IntArray, *, metric: str, seed: int
) -> dict[str, Any]:
    named = np.asarray([_NO_VALUE if value is None else value for value in values], dtype=object)
    found, counts = np.unique(named, return_counts=True)
    order = np.lexsort((found, -counts))
    enough = [index for index in order if counts[index] >= LEAST_ROWS]
    kept = enough[:MOST_VALUES]
    rows = [_one(str(found[index]), named == found[index], labels, answers, metric, seed) for index in kept]
    return {
        "metric": metric,
        "values": sorted(rows, key=lambda row: (row[metric], row["value"])),
        "left_out": {
            "too_few_rows": {"values": len(found) - len(enough), "rows": int(counts.sum() - counts[enough].sum())},
            "too_many_values": {
                "values": len(enough) - len(kept),
                "rows": int(counts[enough].sum() - counts[kept].sum()),
            },
        },
    }


def _one(value: str, inside: Any, labels: IntArray, answers: IntArray, metric: str, seed: int) -> dict[str, Any]:
    own, said = labels[inside], answers[inside]
    return {
        "value": value[:200],
        "rows": len(own),
        metric: score_answers(metric, said, own),
        "interval_95": intervals(own, said, seed=seed)[metric],
    }
