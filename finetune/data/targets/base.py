"""How a column becomes targets, and what may be asked of a training on them: the protocol, one object per kind.

A row's label is one string from here on, so that equal labels are equal strings: the class, the sorted labels as a
JSON list, or the number. Pure; knows no file.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from finetune.data.records import Finding, row_finding
from finetune.data.targets.metric import Metric

if TYPE_CHECKING:
    from finetune.data.labelled import LabelledRows

FEW_ROWS = 10  # fewer rows of a label can hardly be learnt or measured
_NAMES_SHOWN = 5
_LIST_START = re.compile(r"\s*\[")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)

Keys = Sequence[int]
"""A number for each row's input, or for its near duplicates."""


@dataclass(frozen=True, slots=True)
class Target(Protocol):
    """`task` is the task's name. `empty_code` is the finding for a row without a value. The first of `losses` and of
    `metrics` is what `auto` becomes; `methods` None means all of them, and `refuses` names hyperparameters that mean
    nothing for the kind, each with the reason. `label_smoothing` is what `auto` becomes."""

    task: str
    kind: ClassVar[str]
    empty_code: ClassVar[str] = "empty_value"
    losses: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[Metric, ...]]
    methods: ClassVar[frozenset[str] | None] = frozenset({"auto", "baseline", "linear_probe", "lora", "full"})
    refuses: ClassVar[dict[str, str]] = {}
    label_smoothing: ClassVar[float] = 0.0
    has_suspects: ClassVar[bool] = False

    @classmethod
    def of(cls, task: str, cells: Iterable[str | None]) -> Self:
        """Build the target of a column; `cells` may be looked at to see how values are written."""
        return cls(task)

    def read(self, cell: str) -> str:
        """Return the label of a cell that is not empty. Raises `BadCell`."""

    def names_of(self, label: str) -> tuple[str, ...]:
        """Return the classes or labels that a label names; none for a number."""

    def strata(self, labels: Sequence[str]) -> list[str]:
        """Return for each row the kind of which every side of a split should have its share."""

    def told(self, column: str) -> list[Finding]:
        """Say how cells were read, if a glance at the file does not tell."""
        return []

    def findings(self, rows: LabelledRows, groups: Keys, needed: int) -> list[Finding]:
        """Say what keeps these rows from being trained on. `needed` counts the sides of the split."""

    def conflicts(self, rows: LabelledRows, keys: Keys) -> list[Finding]:
        """Report equal inputs with different labels."""
        return conflicting_labels(rows, keys)


def parse_list(cell: str) -> list[str] | None:
    """Return the strings of a JSON list of strings, None for anything else."""
    if not _LIST_START.match(cell):
        return None
    try:
        value: Any = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return value if is_list else None


def conflicting_labels(rows: LabelledRows, keys: Keys) -> list[Finding]:
    """Report equal inputs whose labels differ."""
    labels: defaultdict[int, set[str]] = defaultdict(set)
    for key, label in zip(keys, rows.labels, strict=True):
        labels[key].add(label)
    conflicting = {key for key, own in labels.items() if len(own) > 1}
    if not conflicting:
        return []
    numbers = rows.row_numbers.tolist()
    positions = [position for position, key in enumerate(keys) if key in conflicting]
    pair = [repr(label) for label in sorted(labels[keys[positions[0]]])]
    message = (
        f"{len(conflicting):,} {rows.modality.plural} have different labels, "
        f"the first (row {numbers[positions[0]]}) has {listed(pair)}"
    )
    affected = [numbers[position] for position in positions]
    fix = f"keep one label per {rows.modality.name}"
    return [row_finding(code="conflicting_labels", severity="warning", message=message, rows=affected, fix=fix)]


def listed(names: Iterable[str]) -> str:
    """Join the first five, and count the rest."""
    everything = list(names)
    more = len(everything) - _NAMES_SHOWN
    return ", ".join(everything[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
