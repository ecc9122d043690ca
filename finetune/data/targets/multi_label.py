"""Any number of labels per row."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from finetune.data.records import Finding, row_finding
from finetune.data.spellings import ListSpelling, label_name, read_list
from finetune.data.targets.base import FEW_ROWS, Keys, Target, listed, looks_like_list, with_sizes
from finetune.data.targets.metric import Metric
from modeling.inputs import BadCell

if TYPE_CHECKING:
    from finetune.data.labelled import LabelledRows

SEPARATORS = ("|", ";")
NO_LABEL = "(none)"


@dataclass(frozen=True, slots=True)
class LabelSetTarget(Target):
    """A cell is a list, or labels with `separator` between them; `spelling` is that of the lists."""

    separator: str | None = None
    spelling: ListSpelling | None = None
    kind: ClassVar[str] = "multi_label"
    losses: ClassVar[tuple[str, ...]] = ("bce", "focal")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("micro_f1", "micro F1"),
        Metric("macro_f1", "macro F1"),
        Metric("subset_accuracy", "subset accuracy"),
    )
    refuses: ClassVar[dict[str, str]] = {
        name: f"{name} is for one label per row; leave it out" for name in ("oversample", "label_smoothing", "abstain")
    }

    @classmethod
    def of(cls, task: str, cells: Iterable[str | None]) -> Self:
        return cls(task, *_separator(cells))

    def read(self, cell: str) -> str:
        found = read_list(cell)
        if found is None and self.separator is None and looks_like_list(cell.strip()):
            fix = 'write a JSON list, ["price", "battery"], or labels with | between them'
            raise BadCell(f"holds {cell.strip()[:60]!r}, a list that cannot be read", code="unexpected_list", fix=fix)
        names = found.items if found else cell.split(self.separator) if self.separator else [cell]
        named = {label_name(name) for part in names if (name := part.strip())}
        return json.dumps(sorted(named), ensure_ascii=False)

    def names_of(self, label: str) -> tuple[str, ...]:
        return tuple(json.loads(label))

    def relabelled(self, label: str, names: Mapping[str, str | None]) -> str | None:
        """A row that has other labels keeps those; one that never had any stays without."""
        own = self.names_of(label)
        left = {new for name in own if (new := names.get(name, name)) is not None}
        return None if own and not left else json.dumps(sorted(left), ensure_ascii=False)

    def strata(self, labels: Sequence[str]) -> list[str]:
        return iterative_strata([self.names_of(label) for label in labels])

    def told(self, column: str) -> list[Finding]:
        if self.spelling == "python":
            message = f"the labels in column {column!r} are lists as Python prints them, and were read as lists"
            fix = "nothing to do; JSON, jsonl and parquet have lists of their own"
            return [Finding(code="label_list", severity="info", message=message, column=column, fix=fix)]
        if self.separator is None:
            return []
        message = f"the labels in column {column!r} are separated by {self.separator!r}"
        fix = "nothing to do; a JSON list of strings in every row needs no separator"
        return [Finding(code="label_separator", severity="info", message=message, column=column, fix=fix)]

    def findings(self, rows: LabelledRows, groups: Keys, needed: int) -> list[Finding]:
        """No label at all is an error; labels that are too rare to be learnt or measured are a warning."""
        names = [self.names_of(label) for label in rows.labels]
        inputs: defaultdict[str, set[int]] = defaultdict(set)
        for own, group in zip(names, groups, strict=True):
            for name in own:
                inputs[name].add(group)
        if not inputs:
            return [
                row_finding(
                    code="single_class",
                    severity="error",
                    rows=rows.row_numbers.tolist(),
                    message=f"none of the {len(rows):,} rows has a label",
                    fix="give rows labels, or choose another label column",
                )
            ]
        found = [*rare_labels(rows, inputs, needed), *_everywhere(names)]
        if max(map(len, names)) == 1:
            found.append(
                row_finding(
                    code="single_class",
                    severity="info",
                    rows=[],
                    count=1,
                    message="no row has more than one label",
                    fix="nothing to do; if every row has one label by nature, the task for one label fits better",
                )
            )
        return found


def iterative_strata(names: Sequence[Sequence[str]]) -> list[str]:
    """Return one of each row's labels, in the order of iterative stratification (Sechidis, Tsoumakas and Vlahavas, On
    the stratification of multi-label data, ECML PKDD 2011): the label with the fewest rows left takes all of them,
    until none is left."""
    left: defaultdict[str, set[int]] = defaultdict(set)
    for row, own in enumerate(names):
        for name in own:
            left[name].add(row)
    strata = [NO_LABEL] * len(names)
    while left:
        rarest = min(left, key=lambda name: (len(left[name]), name))
        for row in left.pop(rarest):
            strata[row] = rarest
            for name in names[row]:
                left.get(name, set()).discard(row)
        left = defaultdict(set, {name: rows for name, rows in left.items() if rows})
    return strata


def _separator(cells: Iterable[str | None]) -> tuple[str | None, ListSpelling | None]:
    """`|` where any cell has one, else `;` where any has; none where a cell holds a list, which needs none, but has a
    spelling."""
    found: set[str] = set()
    for cell in cells:
        if cell is None:
            continue
        if (items := read_list(cell)) is not None:
            return None, items.spelling
        found.update(separator for separator in SEPARATORS if separator in cell)
    return next((separator for separator in SEPARATORS if separator in found), None), None


def rare_labels(rows: LabelledRows, inputs: Mapping[str, set[int]], needed: int) -> list[Finding]:
    """Warn of labels that are too rare to be learnt or measured."""
    sizes = {name: len(own) for name, own in inputs.items() if len(own) < FEW_ROWS}
    if not sizes:
        return []
    absent = sum(size < needed for size in sizes.values())
    consequence = f"; {absent:,} of them train and are not held out, so they cannot be judged" if absent else ""
    return [
        row_finding(
            code="class_too_small",
            severity="warning",
            rows=rows.numbers_with(set(sizes)),
            count=len(sizes),
            message=f"{len(sizes):,} of {len(inputs):,} labels have fewer than {FEW_ROWS} different "
            f"{rows.modality.plural} (near duplicates count once); expect poor results for them{consequence}: "
            f"{with_sizes(sizes)}",
            fix="add rows; or set rare_classes to drop, which leaves them out, or to other, which merges them",
        )
    ]


def _everywhere(names: Sequence[tuple[str, ...]]) -> list[Finding]:
    constant = set(names[0]).intersection(*names)
    if not constant:
        return []
    return [
        row_finding(
            code="single_class",
            severity="warning",
            rows=[],
            count=len(constant),
            message=f"every row has the label {listed([repr(name) for name in sorted(constant)])}, so nothing is "
            "learnt of it",
            fix="remove the label, or add rows without it",
        )
    ]
