"""What a task means for a run, one object for each: the rest of the worker asks it instead of the task's name."""

from __future__ import annotations

from finetune.evaluation.tasks.multi_label import MultiLabel
from finetune.evaluation.tasks.regression import Regression
from finetune.evaluation.tasks.rules import TaskRules
from finetune.evaluation.tasks.single_label import SingleLabel
from model_registry.manifest import Task

_RULES: dict[Task, TaskRules] = {
    "text-classification": SingleLabel(),
    "text-multi-label": MultiLabel(),
    "text-regression": Regression(),
}


def rules_of(task: Task) -> TaskRules:
    return _RULES[task]
