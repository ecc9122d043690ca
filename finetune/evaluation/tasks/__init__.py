"""What a kind of task means for a run, one object each: the rest of the worker asks it instead of the task's name."""

from __future__ import annotations

from typing import Final

from finetune.evaluation.tasks.multi_label import LabelSetRules
from finetune.evaluation.tasks.regression import NumberRules
from finetune.evaluation.tasks.rules import TaskRules
from finetune.evaluation.tasks.single_label import ClassRules
from finetune.evaluation.tasks.token_labels import EntityRules
from modeling.tasks import TASKS

RULES: Final[dict[str, TaskRules]] = {
    "single_label": ClassRules(),
    "multi_label": LabelSetRules(),
    "regression": NumberRules(),
    "token_labels": EntityRules(),
}


def rules_of(task: str) -> TaskRules:
    """The rules of a task's kind. Raises `KeyError` for an unknown task."""
    return RULES[TASKS[task].kind]
