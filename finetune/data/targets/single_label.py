"""One class per row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from finetune.data.records import Finding, row_finding
from finetune.data.spellings import NUMBER, label_name
from finetune.data.targets.base import FEW_ROWS, Keys, Target, listed, looks_like_list, parse_list, with_sizes
from finetune.data.targets.metric import Metric
from modeling.inputs import BadCell

if TYPE_CHECKING:
    from finetune.data.labelled import LabelledRows

_NOTHING = frozenset({"nan", "NaN", "NAN", "None", "NULL", "null", "<NA>", "NaT", "#N/A"})
_IMBALANCE_RATIO = 20
_LEAST_OF_A_QUANTITY = 10  # rows


@dataclass(frozen=True, slots=True)
class ClassTarget(Target):
    kind: ClassVar[str] = "single_label"
    losses: ClassVar[tuple[str, ...]] = ("cross_entropy", "bce", "focal", "contrastive", "triplet", "mnrl", "cosent")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("macro_f1", "macro F1"),
        Metric("accuracy", "accuracy"),
        Metric("weighted_f1", "weighted F1"),
    )
    methods: ClassVar[frozenset[str] | None] = None
    # Keeps the head from growing without end on rows that are right already; see docs/log.md.
    label_smoothing: ClassVar[float] = 0.05
    has_suspects: ClassVar[bool] = True

    def read(self, cell: str) -> str:
        if parse_list(cell) is not None:
            fix = "choose the task for several labels, or write one label as plain text"
            what = f"holds a list of labels, and {self.task} takes one"
            raise BadCell(what, code="unexpected_list", fix=fix)
        return label_name(cell.strip())

    def names_of(self, label: str) -> tuple[str, ...]:
        return (label,)

    def relabelled(self, label: str, names: Mapping[str, str | None]) -> str | None:
        return names.get(label, label)

    def strata(self, labels: Sequence[str]) -> list[str]:
        return list(labels)

    def findings(self, rows: LabelledRows, groups: Keys, needed: int) -> list[Finding]:
        if quantity := _quantity(rows):
            return quantity
        return [
            *_single_class(rows),
            *_written_nothing(rows),
            *_unread_lists(rows),
            *_class_sizes(rows, groups, needed),
            *_imbalance(rows),
        ]


def _single_class(rows: LabelledRows) -> list[Finding]:
    label = rows.labels[0]
    if any(other != label for other in rows.labels):
        return []
    what = "there is only 1 row, of" if len(rows) == 1 else f"all {len(rows):,} rows are of"
    message = f"{what} class {label!r}; a classifier needs two classes"
    fix = "add rows of at least one other class, or choose another label column"
    every_row = rows.row_numbers.tolist()
    return [row_finding(code="single_class", severity="error", message=message, rows=every_row, fix=fix)]


def _written_nothing(rows: LabelledRows) -> list[Finding]:
    """Classes that are called as programs write a value that is missing."""
    found = _NOTHING & set(rows.labels)
    if not found:
        return []
    numbers = rows.numbers_with(set(found))
    message = (
        f"{len(numbers):,} rows are of class {listed(map(repr, sorted(found)))}, which programs write for no value"
    )
    fix = "nothing to do if it is a class; else leave the cell empty"
    return [row_finding(code="empty_value", severity="warning", message=message, rows=numbers, fix=fix)]


def _quantity(rows: LabelledRows) -> list[Finding]:
    """Measured numbers are no long tail of classes: most rows have one of their own, with a fraction."""
    labels = set(rows.labels)
    if len(rows) < _LEAST_OF_A_QUANTITY or len(labels) <= len(rows) / 2 or not all(map(NUMBER.fullmatch, labels)):
        return []
    if all(float(label).is_integer() for label in labels):
        return []
    message = f"the {len(rows):,} rows have {len(labels):,} different numbers as labels: a quantity, not classes"
    fix = "choose the regression task, or write classes as words"
    every_row = rows.row_numbers.tolist()
    return [row_finding(code="class_too_small", severity="error", message=message, rows=every_row, fix=fix)]


def _unread_lists(rows: LabelledRows) -> list[Finding]:
    """Most classes have the brackets of a list, and are none that can be read."""
    labels = set(rows.labels)
    lists = {label for label in labels if looks_like_list(label)}
    if 2 * len(lists) < len(labels):
        return []
    message = (
        f"{len(lists):,} of {len(labels):,} classes look like lists that cannot be read, such as {min(lists)[:60]!r}"
    )
    fix = 'nothing to do if they are classes; for several labels a row write JSON lists, ["price", "battery"]'
    numbers = rows.numbers_with(lists)
    return [row_finding(code="unexpected_list", severity="warning", message=message, rows=numbers, fix=fix)]


def _class_sizes(rows: LabelledRows, keys: Keys, needed: int) -> list[Finding]:
    inputs: defaultdict[str, set[int]] = defaultdict(set)
    for label, key in zip(rows.labels, keys, strict=True):
        inputs[label].add(key)
    # Equal and nearly equal inputs stay on one side of a split, so different ones are what counts.
    rare = {label: len(own) for label, own in inputs.items() if len(own) < needed}
    small = {label: len(own) for label, own in inputs.items() if needed <= len(own) < FEW_ROWS}
    what = rows.modality.plural
    kept = f"fewer than {needed} different {what} (near duplicates count once): their rows train and are not held "
    kept += "out, so these classes cannot be judged"
    poor = f"fewer than {FEW_ROWS} different {what}; expect poor results for them"
    fix = "add rows; or set rare_classes to drop, which leaves them out, or to other, which merges them"
    return [
        *_too_small(rows, rare, kept, fix),
        *_too_small(rows, small, poor, "add rows, merge these classes into others, or remove them"),
    ]


def _too_small(rows: LabelledRows, sizes: dict[str, int], consequence: str, fix: str) -> list[Finding]:
    if not sizes:
        return []
    verb = "has" if len(sizes) == 1 else "have"
    message = f"{len(sizes):,} of {len(set(rows.labels)):,} classes {verb} {consequence}: {with_sizes(sizes)}"
    affected = rows.numbers_with(set(sizes))
    return [
        row_finding(
            code="class_too_small", severity="warning", message=message, rows=affected, count=len(sizes), fix=fix
        )
    ]


def _imbalance(rows: LabelledRows) -> list[Finding]:
    counts = Counter(rows.labels).most_common()
    (largest, most), (smallest, fewest) = counts[0], counts[-1]
    if most <= _IMBALANCE_RATIO * fewest:
        return []
    message = f"class {largest!r} has {most:,} rows, class {smallest!r} {fewest:,}: {most / fewest:.0f} times as many"
    fix = "add rows of the small classes, or set `class_weights` to balanced, and judge by macro F1"
    return [row_finding(code="imbalance", severity="warning", message=message, rows=[], count=1, fix=fix)]
