"""Any number of labels per input: those whose probability reaches the label's threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from modeling.heads import sigmoid
from modeling.tasks.base import Answer, Calibration, Embedding, Options, RowOutput, Score, Task
from modeling.tasks.parity import is_near_in_fp32, temperature_of
from modeling.weights import FloatArray

DEFAULT_THRESHOLD: Final = 0.5
"""The probability from which a label without a threshold of its own is given."""


class ManyLabels(Answer, omit_defaults=True):
    """`labels` and `scores` are most probable first."""

    labels: list[str]
    scores: list[Score]
    embedding: Embedding = UNSET


@dataclass(frozen=True, slots=True)
class MultiLabel(Task):
    """A request's `threshold` replaces all of the version's own."""

    kind: ClassVar[str] = "multi_label"
    options: ClassVar[frozenset[str]] = frozenset({"top_k", "threshold"})
    observes: ClassVar[tuple[str, ...]] = ("confidence", "labels")
    answer_type: ClassVar[type[Answer]] = ManyLabels

    def calibration(
        self, document: Mapping[str, Any], labels: Sequence[str], reference: Mapping[str, Any] | None
    ) -> Calibration:
        given = document.get("thresholds")
        thresholds = [DEFAULT_THRESHOLD] * len(labels) if given is None else [float(value) for value in given]
        if len(thresholds) != len(labels) or not all(0 <= value <= 1 for value in thresholds):
            raise ValueError(f"thresholds must be {len(labels)} numbers from 0 to 1, one per label")
        return Calibration(temperature_of(document), tuple(thresholds))

    def scores(self, logits: FloatArray, calibration: Calibration) -> FloatArray:
        """A probability of its own per label, float32[rows, labels]; NaN for a logit that is not finite, whose
        probability would look like any other."""
        scaled = logits / np.float32(calibration.temperature)
        return np.where(np.isfinite(scaled), sigmoid(scaled), np.float32(np.nan))

    def answers(self, scores: FloatArray, calibration: Calibration) -> npt.NDArray[np.bool_]:
        """The labels that are given, bool[rows, labels]."""
        return reached(scores, calibration.thresholds or DEFAULT_THRESHOLD)

    def reduce(
        self, rows: Sequence[RowOutput], labels: Sequence[str], calibration: Calibration, options: Options
    ) -> ManyLabels:
        scores = rows[0].scores if len(rows) == 1 else np.mean(np.stack([row.scores for row in rows]), axis=0)
        order = np.argsort(-scores, kind="stable")
        is_given = reached(scores, calibration.thresholds if options.threshold is None else options.threshold)
        best = order[: options.top_k]
        return ManyLabels(
            0,
            [labels[index] for index in order[is_given[order]].tolist()],
            list(starmap(Score, zip([labels[index] for index in best.tolist()], scores[best].tolist(), strict=True))),
        )

    def observed(self, answers: Sequence[ManyLabels], calibration: Calibration) -> Sequence[Sequence[float]]:
        return [answer.scores[0].score for answer in answers], [len(answer.labels) for answer in answers]

    def same(self, wanted: FloatArray, got: FloatArray, calibration: Calibration, *, precision: str) -> bool:
        """In fp32 by logits; else no probability is far off, and so no label far from its threshold changes."""
        if precision == "fp32":
            return is_near_in_fp32(wanted, got)
        return bool(np.abs(self.scores(wanted, calibration) - self.scores(got, calibration)).max() <= 0.05)


def reached(probabilities: FloatArray, thresholds: float | Sequence[float] | FloatArray) -> npt.NDArray[np.bool_]:
    """Say which labels are given, bool[rows, labels]: those whose probability reaches the threshold, one for all or
    one per label. Both sides are compared as float32, as they are served."""
    return np.asarray(probabilities, np.float32) >= np.asarray(thresholds, np.float32)
