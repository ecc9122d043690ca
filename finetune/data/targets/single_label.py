"""One class per row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from finetune.data.records import Finding, Severity, row_finding
from finetune.data.targets.base import FEW_ROWS, Keys, Target, listed, parse_list
from finetune.data.targets.metric import Metric
from modeling.inputs import BadCell

if TYPE_CHECKING:
    from finetune.data.labelled import LabelledRows

_IMBALANCE_RATIO = 20


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
        return cell.strip()

    def names_of(self, label: str) -> tuple[str, ...]:
        return (label,)

    def strata(self, labels: Sequence[str]) -> list[str]:
        return list(labels)

    def findings(self, rows: LabelledRows, groups: Keys, needed: int) -> list[Finding]:
        return [*_single_class(rows), *_class_sizes(rows, groups, needed), *_imbalance(rows)]


def _single_class(rows: LabelledRows) -> list[Finding]:
    label = rows.labels[0]
    if any(other != label for other in rows.labels):
        return []
    what = "there is only 1 row, of" if len(rows) == 1 else f"all {len(rows):,} rows are of"
    message = f"{what} class {label!r}; a classifier needs two classes"
    fix = "add rows of at least one other class, or choose another label column"
    every_row = rows.row_numbers.tolist()
    return [row_finding(code="single_class", severity="error", message=message, rows=every_row, fix=fix)]


def _class_sizes(rows: LabelledRows, keys: Keys, needed: int) -> list[Finding]:
    inputs: defaultdict[str, set[int]] = defaultdict(set)
    for label, key in zip(rows.labels, keys, strict=True):
        inputs[label].add(key)
    # Equal and nearly equal inputs stay on one side of a split, so different ones are what counts.
    too_small = {label: len(own) for label, own in inputs.items() if len(own) < needed}
    small = {label: len(own) for label, own in inputs.items() if needed <= len(own) < FEW_ROWS}
    fix = "add rows, merge these classes into others, or remove them"
    what = rows.modality.plural
    error = f"fewer than {needed} different {what} (near duplicates count once), so they cannot be in every split"
    warning = f"fewer than {FEW_ROWS} different {what}; expect poor results for them"
    return [
        *_too_small(rows, too_small, "error", error, fix + _number_hint(rows, inputs)),
        *_too_small(rows, small, "warning", warning, fix),
    ]


def _too_small(
    rows: LabelledRows, sizes: dict[str, int], severity: Severity, consequence: str, fix: str
) -> list[Finding]:
    if not sizes:
        return []
    smallest_first = sorted(sizes, key=lambda label: (sizes[label], label))
    named = listed([f"{label!r} ({sizes[label]})" for label in smallest_first])
    verb = "has" if len(sizes) == 1 else "have"
    message = f"{len(sizes):,} of {len(set(rows.labels)):,} classes {verb} {consequence}: {named}"
    affected = rows.numbers_with(set(sizes))
    return [
        row_finding(
            code="class_too_small", severity=severity, message=message, rows=affected, count=len(sizes), fix=fix
        )
    ]


def _number_hint(rows: LabelledRows, inputs: dict[str, set[int]]) -> str:
    looks_continuous = len(inputs) > len(rows) / 2 and all(_is_number(label) for label in inputs)
    return "; if the label is a quantity, choose the regression task" if looks_continuous else ""


def _imbalance(rows: LabelledRows) -> list[Finding]:
    counts = Counter(rows.labels).most_common()
    (largest, most), (smallest, fewest) = counts[0], counts[-1]
    if most <= _IMBALANCE_RATIO * fewest:
        return []
    message = f"class {largest!r} has {most:,} rows, class {smallest!r} {fewest:,}: {most / fewest:.0f} times as many"
    fix = "add rows of the small classes, or set `class_weights` to balanced, and judge by macro F1"
    return [row_finding(code="imbalance", severity="warning", message=message, rows=[], count=1, fix=fix)]


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
