"""Hypothesis strategies for what a task answers, for every task and for a backbone."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from modeling.tasks import TASKS, Score
from modeling.tasks.multi_label import ManyLabels
from modeling.tasks.regression import Value
from modeling.tasks.single_label import OneLabel
from modeling.tasks.token_labels import Entities, Entity

ANY_TASK = ("feature-extraction", *TASKS)


def answers_of(task: str, *, texts: Any, numbers: Any) -> Any:
    """One input's answer."""
    scores, index = st.lists(st.builds(Score, texts, numbers), max_size=3), st.just(0)
    if task == "feature-extraction":
        return st.builds(OneLabel, index, st.none(), st.none(), st.just([]))
    kind = TASKS[task].kind
    if kind == "multi_label":
        return st.builds(ManyLabels, index, st.lists(texts, max_size=3), scores)
    if kind == "regression":
        return st.builds(Value, index, numbers)
    if kind == "token_labels":
        places = st.integers(0, 1 << 20)
        return st.builds(
            Entities, index, st.lists(st.builds(Entity, places, places, texts, numbers, texts), max_size=3)
        )
    return st.builds(OneLabel, index, st.none() | texts, numbers, scores)


def rows_of_one_task(*, vectors: Any, **parts: Any) -> Any:
    """Triples of a task, up to four of its answers, and their vectors float32[width], or none."""

    def drawn(task: str) -> Any:
        rows = st.lists(st.tuples(answers_of(task, **parts), vectors), max_size=4)
        keeps = st.just(True) if task == "feature-extraction" else st.booleans()
        return st.tuples(st.just(task), rows, keeps).map(
            lambda found: (found[0], [answer for answer, _ in found[1]], [v for _, v in found[1]] if found[2] else [])
        )

    return st.sampled_from(ANY_TASK).flatmap(drawn)
