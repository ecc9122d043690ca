"""One label per input: the most probable one, or none if the model is unsure and the request lets it abstain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, ClassVar

import numpy as np
from msgspec import UNSET

from modeling.heads import softmax
from modeling.tasks.base import Answer, Answers, Calibration, Embedding, Options, RowOutput, Score, Task
from modeling.tasks.parity import is_near_in_fp32, temperature_of
from modeling.weights import FloatArray


class OneLabel(Answer, omit_defaults=True):
    """`label` is null if the model abstains; a backbone answers nothing but an embedding. `scores` are best first."""

    label: str | None
    score: float | None
    scores: list[Score]
    embedding: Embedding = UNSET


@dataclass(frozen=True, slots=True)
class SingleLabel(Task):
    kind: ClassVar[str] = "single_label"
    options: ClassVar[frozenset[str]] = frozenset({"top_k", "threshold"})
    observes: ClassVar[tuple[str, ...]] = ("confidence",)
    answer_type: ClassVar[type[Answer]] = OneLabel

    def calibration(
        self, document: Mapping[str, Any], labels: Sequence[str], reference: Mapping[str, Any] | None
    ) -> Calibration:
        if document.get("thresholds") is not None:
            raise ValueError(f"thresholds are for several labels, not for {self.name}")
        return Calibration(temperature_of(document))

    def scores(self, logits: FloatArray, calibration: Calibration) -> FloatArray:
        """Probabilities float32[rows, labels] that share 1 among the labels."""
        return softmax(logits / np.float32(calibration.temperature))

    def answers(self, scores: FloatArray, calibration: Calibration) -> Answers:
        """The most probable label's index, int64[rows]; the first of equals."""
        return np.asarray(scores.argmax(axis=1), np.int64)

    def reduce(
        self, rows: Sequence[RowOutput], labels: Sequence[str], calibration: Calibration, options: Options
    ) -> OneLabel:
        scores = rows[0].scores if len(rows) == 1 else np.mean(np.stack([row.scores for row in rows]), axis=0)
        order = np.argsort(-scores, kind="stable")[: options.top_k]
        best = list(zip([labels[index] for index in order.tolist()], scores[order].tolist(), strict=True))
        label, score = best[0]
        is_unsure = options.threshold is not None and score < options.threshold
        return OneLabel(0, None if is_unsure else label, score, list(starmap(Score, best)))

    def observed(self, answers: Sequence[OneLabel], calibration: Calibration) -> Sequence[Sequence[float]]:
        return ([answer.scores[0].score for answer in answers],)

    def same(self, wanted: FloatArray, got: FloatArray, calibration: Calibration, *, precision: str) -> bool:
        """In fp32 by logits; else no probability is far off, and a clear winner stays the winner."""
        if precision == "fp32":
            return is_near_in_fp32(wanted, got)
        p, q = self.scores(wanted, calibration), self.scores(got, calibration)
        ordered = np.sort(p, axis=1)
        is_clear = ordered[:, -1] - ordered[:, -2] > 0.05
        return bool(np.abs(p - q).max() <= 0.05 and not (p.argmax(1) != q.argmax(1))[is_clear].any())
