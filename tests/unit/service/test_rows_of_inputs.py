"""An input may become several rows: a query against documents, a text in windows. It has one answer all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from msgspec import Struct

from modeling.tasks import Answer, Calibration, Options, RowOutput
from modeling.weights import FloatArray
from service.inference.capacity import AdmissionController
from service.inference.engine_worker import BatchLimits, Outputs
from service.inference.errors import EmptyInput, QueueFull
from service.inference.predictor import Predictor, PredictResult
from service.inference.queue import QueueEntry
from service.metrics import ServingMetrics
from tests.support.lanes import WordLane, WordModel, Words

WINDOW = 3
Query = tuple[str, tuple[str, ...]]


class WindowLane(WordLane):
    """Texts of more than three words are read in windows; the score of a row is how many words it has."""

    def preprocess(
        self, inputs: Sequence[str], *, truncate: bool, max_length: int | None, in_windows: bool = False
    ) -> list[list[Words]]:
        words = [item.split() for item in inputs]
        return [
            [Words(" ".join(item[at : at + WINDOW])) for at in range(0, max(1, len(item)), WINDOW)] for item in words
        ]

    def compute(self, entries: Sequence[QueueEntry]) -> Outputs:
        counts = np.asarray([[entry.length] for entry in entries], dtype=np.float32)
        self.seen.append([getattr(entry.work, "text", "") for entry in entries])
        return Outputs(counts, list(counts), [True] * len(entries))


class Ranked(Answer):
    scores: list[float]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Each document is a row behind the query; the answer has a score for each."""

    name: ClassVar[str] = "text-ranking"
    kind: ClassVar[str] = "ranking"
    modality: ClassVar[str] = "text"
    needs: ClassVar[Literal["pooled", "states"]] = "pooled"
    options: ClassVar[frozenset[str]] = frozenset()
    observes: ClassVar[tuple[str, ...]] = ()
    has_answers: ClassVar[bool] = True
    expands: ClassVar[bool] = True
    reads_windows: ClassVar[bool] = False
    answer_type: ClassVar[type[Struct]] = Ranked

    def expand(self, item: Query, options: Options) -> list[str]:
        query, documents = item
        return [f"{query} {document}" for document in documents]

    def reduce(
        self, rows: Sequence[RowOutput], labels: Sequence[str], calibration: Calibration, options: Options
    ) -> Ranked:
        return Ranked(0, [float(row.scores[0]) for row in rows])

    def observed(self, answers: Sequence[Any], calibration: Calibration) -> Sequence[Sequence[float]]:
        return ()


class Total:
    """The words of all windows, whatever their number."""

    reads_windows = False

    def __getattr__(self, name: str) -> Any:
        return getattr(Ranking, name)

    def expand(self, item: str, options: Options) -> list[str]:
        return [item]

    def reduce(self, rows: Sequence[RowOutput], *_: Any) -> Ranked:
        return Ranked(0, [float(sum(row.scores[0] for row in rows)), float(len(rows))])

    def observed(self, *_: Any) -> Sequence[Sequence[float]]:
        return ()


def ask(task: Any, inputs: Sequence[Any], *, max_inputs: int = 100, options: Options = Options()) -> Any:
    async def scenario() -> tuple[PredictResult, AdmissionController]:
        lane = WindowLane(BatchLimits(1000, 100))
        model: Any = WordModel(lane)
        model.task, model.metric_labels = task, ("m", "1", "text-ranking", "default")
        admission = AdmissionController(max_inputs=max_inputs, max_queue_delay_s=30)
        predictor = Predictor(admission, ServingMetrics(), max_inputs=100, preprocessor_threads=1)
        lane.worker.start()
        try:
            deadline = asyncio.get_running_loop().time() + 30
            return await predictor.predict(model, inputs, options, deadline=deadline), admission
        finally:
            await lane.worker.stop()
            predictor.close()

    return asyncio.run(scenario())


def scores_of(result: PredictResult) -> list[list[float]]:
    return [answer.scores for answer in result.answers]  # type: ignore[attr-defined]


def test_a_text_in_windows_has_one_answer() -> None:
    result, _ = ask(Total(), ["a b c d e f g", "a", "a b c"])
    assert scores_of(result) == [[7.0, 3.0], [1.0, 1.0], [3.0, 1.0]]
    assert result.input_tokens == 11


def test_one_query_against_several_documents() -> None:
    result, admission = ask(Ranking(), [("q", ("a", "b c")), ("q", ("d",))])
    assert scores_of(result) == [[2.0, 3.0], [2.0]]
    assert admission.inputs == 0, "what was admitted is given back"


@pytest.mark.parametrize("asked", [("q", ()), (" ", ("a", " "))])
def test_a_query_without_a_document_is_refused(asked: Query) -> None:
    with pytest.raises(EmptyInput, match="input 1 is empty"):
        ask(Ranking(), [("q", ("a",)), asked])


def test_an_embedding_is_the_mean_of_the_windows() -> None:
    result, _ = ask(Total(), ["a b c d"], options=Options(return_embedding=True))
    vectors: list[FloatArray] = result.vectors
    assert [vector.tolist() for vector in vectors] == [[2.0]]


def test_admission_counts_rows() -> None:
    asked = [("q", tuple("abcde"))]
    ask(Ranking(), asked, max_inputs=5)

    async def scenario() -> None:
        admission = AdmissionController(max_inputs=5, max_queue_delay_s=30)
        admission.inputs = 1
        lane = WindowLane(BatchLimits(1000, 100))
        model: Any = WordModel(lane)
        model.task, model.metric_labels = Ranking(), ("m", "1", "text-ranking", "default")
        predictor = Predictor(admission, ServingMetrics(), max_inputs=100, preprocessor_threads=1)
        lane.worker.start()
        try:
            with pytest.raises(QueueFull):
                await predictor.predict(model, asked, Options(), deadline=asyncio.get_running_loop().time() + 30)
        finally:
            await lane.worker.stop()
            predictor.close()

    asyncio.run(scenario())
