"""The tasks by name. A new one is a file here, an entry below, and one each in the dicts of its kind in training:
`finetune.data.targets` and `finetune.evaluation.tasks`. Nothing else compares a task's name with a string."""

from __future__ import annotations

from typing import Final

from modeling.tasks.base import NO_CALIBRATION, Answer, Answers, Calibration, Options, RowOutput, Score, Task
from modeling.tasks.feature_extraction import FeatureExtraction
from modeling.tasks.multi_label import DEFAULT_THRESHOLD, MultiLabel, reached
from modeling.tasks.regression import Regression
from modeling.tasks.single_label import SingleLabel
from modeling.tasks.token_labels import TokenLabels

__all__ = [
    "DEFAULT_MODALITY",
    "DEFAULT_TASK",
    "DEFAULT_THRESHOLD",
    "NO_CALIBRATION",
    "TASKS",
    "Answer",
    "Answers",
    "Calibration",
    "FeatureExtraction",
    "Options",
    "RowOutput",
    "Score",
    "Task",
    "TokenLabels",
    "reached",
    "task_of_kind",
]

TASKS: Final[dict[str, Task]] = {
    "text-classification": SingleLabel("text-classification", "text"),
    "text-multi-label": MultiLabel("text-multi-label", "text"),
    "text-regression": Regression("text-regression", "text"),
    "token-classification": TokenLabels("token-classification", "text"),
}
DEFAULT_TASK: Final = "text-classification"
DEFAULT_MODALITY: Final = TASKS[DEFAULT_TASK].modality


def task_of_kind(modality: str, kind: str) -> Task:
    """Raises `KeyError` if the modality has no task of this kind."""
    for task in TASKS.values():
        if (task.modality, task.kind) == (modality, kind):
            return task
    raise KeyError(f"{modality} has no task of kind {kind}")
