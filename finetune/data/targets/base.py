"""How a column becomes targets, and what may be asked of a training on them: the protocol, one object per kind.

A row's label is one string from here on, so that equal labels are equal strings: the class, the sorted labels as a
JSON list, or the number. Pure; knows no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from finetune.data.records import Finding, row_finding
from finetune.data.spellings import read_list
from finetune.data.targets.metric import Metric
from modeling.inputs import Example

if TYPE_CHECKING:
    from finetune.data.labelled import LabelledRows

FEW_ROWS = 10  # fewer rows of a label can hardly be learnt or measured
_NAMES_SHOWN = 5
_MOST_NAMED, _NAME_CHARACTERS, _LABEL_CHARACTERS = 200, 60, 200

Keys = Sequence[int]
"""A number for each row's input, or for its near duplicates."""


@dataclass(frozen=True, slots=True)
class Target(Protocol):
    """`task` is the task's name. `empty_code` is the finding for a row without a value. The first of `losses` and of
    `metrics` is what `auto` becomes; `methods` None means all of them, and `refuses` names hyperparameters that mean
    nothing for the kind, each with the reason. `label_smoothing` is what `auto` becomes. `names_words`: a label names
    words of its input."""

    task: str
    kind: ClassVar[str]
    empty_code: ClassVar[str] = "empty_value"
    losses: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[Metric, ...]]
    methods: ClassVar[frozenset[str] | None] = frozenset({"auto", "baseline", "linear_probe", "lora", "full"})
    refuses: ClassVar[dict[str, str]] = {}
    label_smoothing: ClassVar[float] = 0.0
    has_suspects: ClassVar[bool] = False
    names_words: ClassVar[bool] = False

    @classmethod
    def of(cls, task: str, cells: Iterable[str | None]) -> Self:
        """Build the target of a column; `cells` may be looked at to see how values are written."""
        return cls(task)

    def read(self, cell: str) -> str:
        """Return the label of a cell that is not empty. Raises `BadCell`."""

    def fit(self, label: str, example: Example) -> str:
        """Return the label as it is kept for its example. Raises `BadCell` if it does not fit it."""
        return label

    def names_of(self, label: str) -> tuple[str, ...]:
        """Return the classes or labels that a label names; none for a number."""

    def relabelled(self, label: str, names: Mapping[str, str | None]) -> str | None:
        """Return the label with classes or labels renamed, or left out if their new name is None; None if nothing is
        left of it."""
        return label

    def strata(self, labels: Sequence[str]) -> list[str]:
        """Return for each row the kind of which every side of a split should have its share."""

    def told(self, column: str) -> list[Finding]:
        """Say how cells were read, if a glance at the file does not tell."""
        return []

    def findings(self, rows: LabelledRows, groups: Keys, needed: int) -> list[Finding]:
        """Say what keeps these rows from being trained on. `needed` is how many different inputs a class must have to
        be held out at all, or the sides of the split if there are no classes."""

    def conflicts(self, rows: LabelledRows, keys: Keys) -> list[Finding]:
        """Report equal inputs with different labels."""
        return conflicting_labels(rows, keys)


def parse_list(cell: str) -> list[str] | None:
    """Return the items of a list as strings, None for anything else."""
    found = read_list(cell)
    return None if found is None else found.items


def looks_like_list(cell: str) -> bool:
    """Say whether a cell that is no list has its brackets."""
    return cell.startswith("[") and cell.endswith("]") and read_list(cell) is None


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
    pair = [repr(label[:_LABEL_CHARACTERS]) for label in sorted(labels[keys[positions[0]]])]
    message = (
        f"{len(conflicting):,} {rows.modality.plural} have different labels, "
        f"the first (row {numbers[positions[0]]}) has {listed(pair)}"
    )
    affected = [numbers[position] for position in positions]
    fix = f"keep one label per {rows.modality.name}"
    return [row_finding(code="conflicting_labels", severity="warning", message=message, rows=affected, fix=fix)]


def with_sizes(sizes: Mapping[str, int]) -> str:
    """List names with their sizes, the smallest first."""
    smallest_first = sorted(sizes, key=lambda name: (sizes[name], name))
    return all_named(smallest_first, [f" ({sizes[name]})" for name in smallest_first])


def all_named(names: Sequence[str], remarks: Sequence[str] = ()) -> str:
    """List all names, each with its remark, so that none is hidden: 200 of them, long ones cut."""
    told = [
        f"{name if len(name) <= _NAME_CHARACTERS else name[: _NAME_CHARACTERS - 1] + '…'!r}{remark}"
        for name, remark in zip_longest(names[:_MOST_NAMED], remarks[:_MOST_NAMED], fillvalue="")
    ]
    more = len(names) - _MOST_NAMED
    return ", ".join(told) + (f" and {more:,} more" if more > 0 else "")


def listed(names: Iterable[str]) -> str:
    """Join the first five, and count the rest."""
    everything = list(names)
    more = len(everything) - _NAMES_SHOWN
    return ", ".join(everything[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
