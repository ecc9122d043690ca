"""Hypothesis strategies for what a predictor answers, for every task and for a backbone."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from model_registry.manifest import TASKS
from service.inference.answering import LabelsPrediction, Prediction, ValuePrediction

ANY_TASK = ("feature-extraction", *TASKS)


def predictions_of(task: str, *, texts: Any, numbers: Any, vectors: Any) -> Any:
    """One row's answer; `vectors` draws arrays float32[width]."""
    embedding, scores = st.none() | vectors, st.lists(st.tuples(texts, numbers), max_size=3)
    if task == "text-multi-label":
        return st.builds(LabelsPrediction, labels=st.lists(texts, max_size=3), scores=scores, embedding=embedding)
    if task == "text-regression":
        return st.builds(ValuePrediction, value=numbers, embedding=embedding)
    if task == "feature-extraction":
        return st.builds(Prediction, label=st.none(), score=st.none(), scores=st.just([]), embedding=vectors)
    return st.builds(Prediction, label=st.none() | texts, score=numbers, scores=scores, embedding=embedding)


def rows_of_one_task(**parts: Any) -> Any:
    """Pairs of a task and up to four of its predictions."""
    return st.sampled_from(ANY_TASK).flatmap(
        lambda task: st.tuples(st.just(task), st.lists(predictions_of(task, **parts), max_size=4))
    )
