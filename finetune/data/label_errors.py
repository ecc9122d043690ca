"""Rows whose label is probably wrong, by out-of-fold probabilities. Pure: numbers in, suspects out.

Confident learning (Northcutt, Jiang and Chuang 2021, "Confident learning: estimating uncertainty in dataset
labels", JAIR 70), pruned by noise rate: the threshold of a class is the mean probability that its own rows give
it; a row counts for the likeliest of the classes whose threshold it reaches. The counts, scaled to the size of
each class, estimate how many rows labelled i are j in truth; as many with the largest margin of j over i are
suspect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.data.labelled import LabelledRows
from finetune.data.records import Finding, row_finding

_MANY = 0.02  # of the rows; above, the finding is a warning
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Suspects:
    """Rows whose label is suspect, the most suspect first, each array [suspects].

    `rows` are positions; `margins` say by how much the probability of the suggested class exceeds that of
    the given one, in (0, 1].
    """

    rows: npt.NDArray[np.int64]
    given: npt.NDArray[np.int64]
    suggested: npt.NDArray[np.int64]
    margins: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)


def suspected_label_errors(probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Suspects:
    """Suspects among rows with probabilities float32[rows, classes] (out of fold) and labels int64[rows].

    A class without a row is never suggested. Of equal margins, the first row comes first.
    """
    own = probabilities[np.arange(len(labels)), labels]
    wrong = _estimated_errors(probabilities, labels, own)
    best: dict[int, tuple[float, int]] = {}
    for given, suggested in np.argwhere(wrong > 0).tolist():
        rows = np.flatnonzero(labels == given)
        margins = probabilities[rows, suggested] - own[rows]
        chosen = np.argsort(-margins, kind="stable")[: wrong[given, suggested]]
        for row, margin in zip(rows[chosen].tolist(), margins[chosen].tolist(), strict=True):
            if margin > max(0.0, best.get(row, (0.0, 0))[0]):
                best[row] = (margin, suggested)
    ranked = sorted(best, key=lambda row: (-best[row][0], row))
    rows = np.array(ranked, np.int64)
    margins = np.array([best[row][0] for row in ranked], np.float32)
    return Suspects(rows, labels[rows], np.array([best[row][1] for row in ranked], np.int64), margins)


def _estimated_errors(
    probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], own: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    """How many rows labelled i are j in truth, int64[classes, classes] with a diagonal of zeros."""
    classes = probabilities.shape[1]
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    is_confident = probabilities >= thresholds
    confident = np.where(is_confident, probabilities, -1.0).argmax(1)
    counted = is_confident.any(1)
    joint = np.zeros((classes, classes))
    np.add.at(joint, (labels[counted], confident[counted]), 1)
    np.fill_diagonal(joint, np.maximum(joint.diagonal(), 1))
    estimated = np.rint(joint / joint.sum(1, keepdims=True) * counts[:, None]).astype(np.int64)
    np.fill_diagonal(estimated, 0)
    return np.asarray(estimated)


def suspect_finding(rows: LabelledRows, suspects: Suspects, names: Sequence[str]) -> Finding:
    """What to tell of them; `names` are the classes' labels."""
    numbers = rows.row_numbers[suspects.rows].tolist()
    first = "; ".join(
        f"row {number}: {names[given][:100]!r}, rather {names[suggested][:100]!r}"
        for number, given, suggested in zip(numbers[:_SHOWN], suspects.given, suspects.suggested, strict=False)
    )
    return row_finding(
        code="suspected_label_error",
        severity="warning" if len(suspects) > _MANY * len(rows) else "info",
        message=f"{len(suspects):,} rows may have a wrong label ({first})",
        rows=numbers,
        fix="look at these rows, the most suspect first; correct those that are wrong, or name them in exclude_rows",
    )


def not_searched(train: LabelledRows, classes: int, *, most_rows: int) -> Finding:
    return row_finding(
        code="suspected_label_error",
        severity="info",
        message=f"wrong labels were not searched for: {len(train):,} rows of {classes:,} classes are too many",
        rows=[],
        fix=f"nothing to do; up to {most_rows:,} rows of few classes are searched",
    )
