"""One number per input, in the units of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from msgspec import UNSET

from modeling.tasks.base import Answer, Answers, Calibration, Embedding, Options, RowOutput, Task
from modeling.weights import FloatArray


class Value(Answer, omit_defaults=True):
    value: float
    embedding: Embedding = UNSET


@dataclass(frozen=True, slots=True)
class Regression(Task):
    """A head's output is the value; there are no labels, and no temperature but 1."""

    kind: ClassVar[str] = "regression"
    options: ClassVar[frozenset[str]] = frozenset()
    observes: ClassVar[tuple[str, ...]] = ("quantile",)
    answer_type: ClassVar[type[Answer]] = Value

    def outputs(self, labels: Sequence[str]) -> int:
        if labels:
            raise ValueError(f"{self.name} has no labels")
        return 1

    def calibration(
        self, document: Mapping[str, Any], labels: Sequence[str], reference: Mapping[str, Any] | None
    ) -> Calibration:
        if float(document["temperature"]) != 1 or document.get("thresholds") is not None:
            raise ValueError(f"values have no temperature and no thresholds, and {self.name} answers values")
        return Calibration(value_shares=_shares((reference or {}).get("value_histogram")))

    def scores(self, logits: FloatArray, calibration: Calibration) -> FloatArray:
        """The values as they are, float32[rows, 1]."""
        return logits

    def answers(self, scores: FloatArray, calibration: Calibration) -> Answers:
        """float32[rows]"""
        return np.asarray(scores[:, 0], np.float32)

    def reduce(
        self, rows: Sequence[RowOutput], labels: Sequence[str], calibration: Calibration, options: Options
    ) -> Value:
        return Value(0, float(np.mean([row.scores[0] for row in rows])))

    def observed(self, answers: Sequence[Value], calibration: Calibration) -> Sequence[Sequence[float]]:
        if not calibration.value_shares:
            return ([],)
        values, shares = zip(*calibration.value_shares, strict=True)
        return (np.interp([answer.value for answer in answers], values, shares).tolist(),)

    def same(self, wanted: FloatArray, got: FloatArray, calibration: Calibration, *, precision: str) -> bool:
        """Values have units of their own: within 1e-4 of the largest and, of what they span, 1e-3 in fp32 and a tenth
        in lower precision."""
        span = (1e-3 if precision == "fp32" else 0.1) * float(np.ptp(wanted))
        return bool(np.abs(got - wanted).max() <= 1e-4 * float(np.abs(wanted).max()) + span)


def _shares(histogram: Mapping[str, Any] | None) -> tuple[tuple[float, float], ...]:
    if histogram is None or not sum(histogram["counts"]):
        return ()
    edges, counts = np.asarray(histogram["edges"], np.float64), np.asarray(histogram["counts"], np.float64)
    is_ordered = np.isfinite(edges).all() and (np.diff(edges) > 0).all() and (counts >= 0).all()
    if edges.shape != (len(counts) + 1,) or not is_ordered:
        raise ValueError("value_histogram needs rising edges and a count between each two")
    shares = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    return tuple(zip(edges.tolist(), shares.tolist(), strict=True))
