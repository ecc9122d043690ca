"""What sets of labels and numbers reveal before any training; `findings` has what concerns classes. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from finetune.data.labelled import LabelledRows, rows_with
from finetune.data.records import Finding, row_finding

_FEW_ROWS = 10
_NAMES_SHOWN = 5

_Keys = Sequence[int]  # a number for each row's text, or for its near duplicates


def label_set_findings(rows: LabelledRows, groups: _Keys, needed: int) -> list[Finding]:
    """No label at all is an error; labels that are too rare to be learnt or measured are a warning."""
    names = [rows.target.names_of(label) for label in rows.labels]
    texts: defaultdict[str, set[int]] = defaultdict(set)
    for own, group in zip(names, groups, strict=True):
        for name in own:
            texts[name].add(group)
    if not texts:
        return [
            row_finding(
                code="single_class",
                severity="error",
                rows=rows.row_numbers.tolist(),
                message=f"none of the {len(rows):,} rows has a label",
                fix="give rows labels, or choose another label column",
            )
        ]
    found = [*_rare(rows, texts, needed), *_everywhere(names)]
    if max(map(len, names)) == 1:
        found.append(
            row_finding(
                code="single_class",
                severity="info",
                rows=[],
                count=1,
                message="no row has more than one label",
                fix="nothing to do; if every row has one label by nature, the task text-classification fits better",
            )
        )
    return found


def _rare(rows: LabelledRows, texts: dict[str, set[int]], needed: int) -> list[Finding]:
    sizes = {name: len(own) for name, own in texts.items() if len(own) < _FEW_ROWS}
    if not sizes:
        return []
    smallest_first = sorted(sizes, key=lambda name: (sizes[name], name))
    named = _listed([f"{name!r} ({sizes[name]})" for name in smallest_first])
    absent = sum(size < needed for size in sizes.values())
    consequence = f"; {absent:,} of them cannot stand on every side of the split" if absent else ""
    return [
        row_finding(
            code="class_too_small",
            severity="warning",
            rows=rows_with(rows, set(sizes)),
            count=len(sizes),
            message=f"{len(sizes):,} of {len(texts):,} labels have fewer than {_FEW_ROWS} different texts (near "
            f"duplicates count once); expect poor results for them{consequence}: {named}",
            fix="add rows, merge these labels into others, or remove them",
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
            message=f"every row has the label {_listed([repr(name) for name in sorted(constant)])}, so nothing is "
            "learnt of it",
            fix="remove the label, or add rows without it",
        )
    ]


def number_findings(rows: LabelledRows, groups: _Keys, needed: int) -> list[Finding]:
    """One value everywhere, and fewer different texts than sides, are errors."""
    if len(set(rows.labels)) == 1:
        return [
            row_finding(
                code="constant_target",
                severity="error",
                rows=rows.row_numbers.tolist(),
                message=f"all {len(rows):,} rows have the target {float(rows.labels[0]):g}; there is nothing to learn",
                fix="add rows with other values, or choose another label column",
            )
        ]
    texts = len(set(groups))
    if texts < needed:
        return [
            row_finding(
                code="class_too_small",
                severity="error",
                rows=rows.row_numbers.tolist(),
                count=texts,
                message=f"there are only {texts} different texts (near duplicates count once) for {needed} sides",
                fix="add rows, or bring validation and test data",
            )
        ]
    return []


def conflicting_numbers(rows: LabelledRows, keys: _Keys) -> list[Finding]:
    """Equal texts whose targets lie further apart than one standard deviation of all."""
    values = np.array([float(label) for label in rows.labels])
    _, text = np.unique(np.asarray(keys), return_inverse=True)
    low, high = np.full(text.max() + 1, np.inf), np.full(text.max() + 1, -np.inf)
    np.minimum.at(low, text, values)
    np.maximum.at(high, text, values)
    is_apart = high - low > values.std()
    if not is_apart.any():
        return []
    affected = np.flatnonzero(is_apart[text])
    first = int(affected[0])
    return [
        row_finding(
            code="conflicting_labels",
            severity="warning",
            rows=rows.row_numbers[affected].tolist(),
            message=f"{int(is_apart.sum()):,} texts stand with targets more than a standard deviation "
            f"({values.std():.3g}) apart, the first (row {rows.row_numbers[first]}) "
            f"with {low[text[first]]:g} and {high[text[first]]:g}",
            fix="keep one target for each text, their mean say",
        )
    ]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
