"""The tasks: how many outputs a head has, and the way from its logits to what is answered.

Evaluation and serving share these functions, so a row is answered as it was evaluated. Pure; knows no model and no
file. The names stand in `model_registry.manifest`, which imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, assert_never

import numpy as np
import numpy.typing as npt

from model_registry.manifest import TASKS, Task
from modeling.heads import sigmoid, softmax
from modeling.weights import FloatArray

__all__ = ["DEFAULT_THRESHOLD", "TASKS", "Task", "answers_of", "link_of", "outputs_of", "reached", "scores_of"]

DEFAULT_THRESHOLD: Final = 0.5
"""Of a multi-label label: the probability from which it is given."""

Answers = npt.NDArray[np.int64] | npt.NDArray[np.bool_] | npt.NDArray[np.float32]


def outputs_of(task: Task, labels: Sequence[str]) -> int:
    """How many values a head gives for a row; regression has one, and no labels."""
    return 1 if task == "text-regression" else len(labels)


def link_of(task: Task) -> Callable[[FloatArray], FloatArray]:
    """From logits float32[rows, outputs] to scores of the same shape: probabilities that share 1 among the labels,
    a probability of its own for each label, or the values as they are."""
    match task:
        case "text-classification":
            return softmax
        case "text-multi-label":
            return sigmoid
        case "text-regression":
            return _identity
    assert_never(task)


def scores_of(task: Task, logits: FloatArray, *, temperature: float = 1.0) -> FloatArray:
    """Probabilities float32[rows, labels] at `temperature`, or the values float32[rows, 1] of regression, which has
    no temperature."""
    if task == "text-regression":
        return logits
    return link_of(task)(logits / np.float32(temperature))


def reached(probabilities: FloatArray, thresholds: float | Sequence[float] | FloatArray) -> npt.NDArray[np.bool_]:
    """Which labels are given, bool[rows, labels]: those whose probability reaches the threshold, one for all labels or
    one for each. Both sides are compared as float32, as they are served."""
    return np.asarray(probabilities, np.float32) >= np.asarray(thresholds, np.float32)


def answers_of(
    task: Task, scores: FloatArray, *, thresholds: float | Sequence[float] | FloatArray = DEFAULT_THRESHOLD
) -> Answers:
    """What is answered for rows of `scores_of`: the index of the largest probability int64[rows] (the first of
    equals), the labels that reach their threshold bool[rows, labels], or the value float32[rows]."""
    match task:
        case "text-classification":
            return np.asarray(scores.argmax(axis=1), np.int64)
        case "text-multi-label":
            return reached(scores, thresholds)
        case "text-regression":
            return np.asarray(scores[:, 0], np.float32)
    assert_never(task)


def _identity(logits: FloatArray) -> FloatArray:
    return logits
