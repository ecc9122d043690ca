"""How a label column is read, by the kind of task: a new kind is a file here and an entry below."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from finetune.data.options import AUTO
from finetune.data.targets.base import Keys, Target, parse_list
from finetune.data.targets.metric import Metric, MetricName
from finetune.data.targets.multi_label import LabelSetTarget
from finetune.data.targets.regression import NumberTarget
from finetune.data.targets.single_label import ClassTarget
from finetune.data.targets.spans import SpanTarget
from modeling.tasks import DEFAULT_MODALITY, DEFAULT_TASK, TASKS, task_of_kind

__all__ = [
    "AUTO",
    "DEFAULT_TARGET",
    "TARGETS",
    "Keys",
    "Metric",
    "MetricName",
    "Target",
    "metric_of",
    "parse_list",
    "target_of",
    "target_type",
]

TARGETS: Final[dict[str, type[Target]]] = {
    "single_label": ClassTarget,
    "multi_label": LabelSetTarget,
    "regression": NumberTarget,
    "token_labels": SpanTarget,
}
DEFAULT_TARGET: Final = ClassTarget(DEFAULT_TASK)


def target_type(task: str) -> type[Target]:
    """The kind of target that a task trains on. Raises `KeyError` for an unknown task."""
    return TARGETS[TASKS[task].kind]


def target_of(task: str, cells: Iterable[str | None], *, modality: str = DEFAULT_MODALITY) -> Target:
    """Build the target of a task from the cells of its label column.

    `auto` is the task for several labels if every cell that is not empty holds a list, else the one for one label;
    `cells` are then read twice.
    """
    if task != AUTO:
        return target_type(task).of(task, cells)
    kind = "multi_label" if _are_lists(cells) else "single_label"
    return TARGETS[kind].of(task_of_kind(modality, kind).name, cells)


def metric_of(name: str) -> Metric:
    """Raises `KeyError`."""
    return next(metric for target in TARGETS.values() for metric in target.metrics if metric.name == name)


def _are_lists(cells: Iterable[str | None]) -> bool:
    """Say whether every filled cell holds a list; ends at the first that does not."""
    is_any = False
    for cell in cells:
        if cell is not None and cell.strip():
            if parse_list(cell) is None:
                return False
            is_any = True
    return is_any
