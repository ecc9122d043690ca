"""What is answered for a row, by task. Chosen once, when a model is loaded: the path of a request only calls it.

Knows scores and options; knows no queue, no engine and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

import numpy as np

from modeling.assemble import VersionParts
from modeling.tasks import link_of, reached
from modeling.weights import FloatArray
from service.inference.errors import ParameterUnfit
from service.metrics import ModelSeries


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """`top_k` bounds the scores returned; `threshold` is where a model abstains, or from where a label is given;
    embeddings only if asked for."""

    top_k: int | None = None
    threshold: float | None = None
    truncate: bool = True
    max_length: int | None = None
    return_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """One label a text. `label` is None where the model abstains or has no labels. `scores` stand best first."""

    label: str | None
    score: float | None
    scores: list[tuple[str, float]]
    embedding: FloatArray | None


@dataclass(frozen=True, slots=True)
class LabelsPrediction:
    """Any number of labels a text. `labels` and `scores` stand most probable first."""

    labels: list[str]
    scores: list[tuple[str, float]]
    embedding: FloatArray | None


@dataclass(frozen=True, slots=True)
class ValuePrediction:
    """A number, in the units of the data."""

    value: float
    embedding: FloatArray | None


class Answering(Protocol):
    """What a task does with a model's outputs."""

    @property
    def has_answers(self) -> bool:
        """Whether there is more than a vector."""

    def check(self, options: PredictOptions) -> None:
        """Raises `ParameterUnfit` where a parameter has no meaning here."""

    def scores(self, logits: FloatArray) -> FloatArray:
        """From logits float32[rows, outputs] to what `answer` takes, row by row. What is not finite stays so."""

    def answer(self, scores: FloatArray | None, options: PredictOptions, embedding: FloatArray | None) -> Any:
        """One row as the caller sees it. Pure."""

    def observe(self, series: ModelSeries, predictions: Sequence[Any]) -> None:
        """Counts what was answered."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """A backbone: no answers but vectors."""

    has_answers: ClassVar[bool] = False

    def check(self, options: PredictOptions) -> None: ...

    def scores(self, logits: FloatArray) -> FloatArray:
        return logits

    def answer(self, scores: FloatArray | None, options: PredictOptions, embedding: FloatArray | None) -> Prediction:
        return Prediction(label=None, score=None, scores=[], embedding=embedding)

    def observe(self, series: ModelSeries, predictions: Sequence[Any]) -> None: ...


VECTORS: Final = Vectors()


@dataclass(frozen=True, slots=True)
class OneLabel:
    """text-classification."""

    labels: tuple[str, ...]
    temperature: float = 1.0
    has_answers: ClassVar[bool] = True
    _link = staticmethod(link_of("text-classification"))

    def check(self, options: PredictOptions) -> None: ...

    def scores(self, logits: FloatArray) -> FloatArray:
        return self._link(logits / np.float32(self.temperature))

    def answer(self, scores: FloatArray | None, options: PredictOptions, embedding: FloatArray | None) -> Prediction:
        assert scores is not None
        order = np.argsort(-scores, kind="stable")[: options.top_k]
        labels = self.labels
        best = [(labels[index], value) for index, value in zip(order.tolist(), scores[order].tolist(), strict=True)]
        label, score = best[0]
        is_unsure = options.threshold is not None and score < options.threshold
        return Prediction(label=None if is_unsure else label, score=score, scores=best, embedding=embedding)

    def observe(self, series: ModelSeries, predictions: Sequence[Prediction]) -> None:
        (confidence,) = series.answers
        for prediction in predictions:
            confidence.observe(prediction.scores[0][1])


@dataclass(frozen=True, slots=True)
class ManyLabels:
    """text-multi-label. A request's `threshold` stands for all of the version's own."""

    labels: tuple[str, ...]
    thresholds: FloatArray
    temperature: float = 1.0
    has_answers: ClassVar[bool] = True
    _link = staticmethod(link_of("text-multi-label"))

    def check(self, options: PredictOptions) -> None: ...

    def scores(self, logits: FloatArray) -> FloatArray:
        scaled = logits / np.float32(self.temperature)
        # An infinite logit is a fault, and its probability would look like any other.
        return np.where(np.isfinite(scaled), self._link(scaled), np.float32(np.nan))

    def answer(
        self, scores: FloatArray | None, options: PredictOptions, embedding: FloatArray | None
    ) -> LabelsPrediction:
        assert scores is not None
        order = np.argsort(-scores, kind="stable")
        is_given = reached(scores, self.thresholds if options.threshold is None else options.threshold)
        labels, best = self.labels, order[: options.top_k]
        return LabelsPrediction(
            labels=[labels[index] for index in order[is_given[order]].tolist()],
            scores=[(labels[index], value) for index, value in zip(best.tolist(), scores[best].tolist(), strict=True)],
            embedding=embedding,
        )

    def observe(self, series: ModelSeries, predictions: Sequence[LabelsPrediction]) -> None:
        confidence, given = series.answers
        for prediction in predictions:
            confidence.observe(prediction.scores[0][1])
            given.observe(len(prediction.labels))


@dataclass(frozen=True, slots=True)
class Value:
    """text-regression. `shares` are `VersionParts.value_shares`; an imported version has none."""

    shares: tuple[tuple[float, float], ...] = ()
    has_answers: ClassVar[bool] = True

    def check(self, options: PredictOptions) -> None:
        for name in ("top_k", "threshold"):
            if getattr(options, name) is not None:
                raise ParameterUnfit(
                    f"{name} is for labels, and this model answers a value (text-regression); leave {name} out",
                    parameter=name,
                )

    def scores(self, logits: FloatArray) -> FloatArray:
        return logits

    def answer(
        self, scores: FloatArray | None, options: PredictOptions, embedding: FloatArray | None
    ) -> ValuePrediction:
        assert scores is not None
        return ValuePrediction(value=float(scores[0]), embedding=embedding)

    def observe(self, series: ModelSeries, predictions: Sequence[ValuePrediction]) -> None:
        if not self.shares:
            return
        (place,) = series.answers
        values, shares = zip(*self.shares, strict=True)
        for share in np.interp([prediction.value for prediction in predictions], values, shares).tolist():
            place.observe(share)


def answering_of(parts: VersionParts) -> Answering:
    """What the version's task does."""
    match parts.manifest.task:
        case "text-classification":
            return OneLabel(parts.manifest.labels, parts.temperature)
        case "text-multi-label":
            return ManyLabels(parts.manifest.labels, np.asarray(parts.thresholds, np.float32), parts.temperature)
        case "text-regression":
            return Value(parts.value_shares)
