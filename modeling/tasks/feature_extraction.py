"""A bare backbone: no answers but vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from modeling.tasks.base import Answer, Answers, Calibration, Options, RowOutput, Task
from modeling.tasks.single_label import OneLabel
from modeling.weights import FloatArray


@dataclass(frozen=True, slots=True)
class FeatureExtraction(Task):
    kind: ClassVar[str] = "vectors"
    options: ClassVar[frozenset[str]] = frozenset({"top_k", "threshold"})
    observes: ClassVar[tuple[str, ...]] = ()
    has_answers: ClassVar[bool] = False
    answer_type: ClassVar[type[Answer]] = OneLabel

    def outputs(self, labels: Sequence[str]) -> int:
        return 0

    def calibration(
        self, document: Mapping[str, Any], labels: Sequence[str], reference: Mapping[str, Any] | None
    ) -> Calibration:
        return Calibration()

    def scores(self, logits: FloatArray, calibration: Calibration) -> FloatArray:
        return logits

    def answers(self, scores: FloatArray, calibration: Calibration) -> Answers:
        return scores

    def reduce(
        self, rows: Sequence[RowOutput], labels: Sequence[str], calibration: Calibration, options: Options
    ) -> OneLabel:
        return OneLabel(0, None, None, [])

    def observed(self, answers: Sequence[OneLabel], calibration: Calibration) -> Sequence[Sequence[float]]:
        return ()

    def same(self, wanted: FloatArray, got: FloatArray, calibration: Calibration, *, precision: str) -> bool:
        return True
