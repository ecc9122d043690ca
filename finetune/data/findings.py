"""What labelled rows reveal before any training: classes, duplicates, contradictions, leaks between splits.

Pure: rows in, findings out. Knows no file and no model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from finetune.data.duplicates import SHINGLINGS, Duplicates, Indices, find_duplicates
from finetune.data.labelled import LabelledRows
from finetune.data.records import Finding, Severity, row_finding
from finetune.data.spellings import one_label, side_by_side
from finetune.data.targets.base import Keys, listed
from model_registry.manifest import too_many_labels

_MANY_DUPLICATES = 0.1
_MANY_CUT = 0.05


def inspect_rows(
    train: LabelledRows,
    validation: LabelledRows | None = None,
    test: LabelledRows | None = None,
    *,
    min_rows_per_class: int = 3,
    duplicates: Duplicates | None = None,
    cut: Collection[str] = (),
) -> list[Finding]:
    """Findings for the task of `train`, errors first.

    `train` holds everything that is still to be split. A class with fewer than `min_rows_per_class` different inputs
    is not held out. `duplicates` are those among the rows of train, validation and test, in this order; they are
    found where they are not given. Sides in `cut` were cut off the training rows: a label that only they have is no
    mistake of the data.
    """
    if len(train) == 0:
        return [_no_rows()]
    held_out = {name: rows for name, rows in (("validation", validation), ("test", test)) if rows is not None}
    everything = [train, *held_out.values()]
    found = duplicates or find_duplicates([example for rows in everything for example in rows.examples], train.modality)
    keys = found.input_of[: len(train)].tolist()
    findings = [
        *too_many(train.names()),
        *_label_case_collision(train, held_out),
        *train.target.findings(train, found.group_of[: len(train)].tolist(), min_rows_per_class),
        *_duplicates(train, keys),
        *_near_duplicates(train, found),
        *train.target.conflicts(train, keys),
    ]
    start = len(train)
    for name, rows in held_out.items():
        findings += _unknown_labels(name, rows, known=train.names(), is_cut=name in cut)
        findings += _overlap(name, rows, found, slice(start, start + len(rows)), trained=slice(0, len(train)))
        start += len(rows)
    return sorted(findings, key=lambda finding: ("error", "warning", "info").index(finding.severity))


def too_long(rows: LabelledRows, lengths: Sequence[int], max_length: int) -> list[Finding]:
    """Inputs longer than what is read of them; `lengths` and `max_length` in the modality's unit."""
    cut = np.flatnonzero(np.asarray(lengths) > max_length)
    if len(cut) == 0:
        return []
    severity: Severity = "warning" if len(cut) > _MANY_CUT * len(rows) else "info"
    what, unit = rows.modality.plural, rows.modality.unit
    message = f"{len(cut):,} training {what} have more than {max_length} {unit}s; what comes after is not read"
    fix = f"set a larger max_length, if the backbone reads as much, or shorten the {what} to what matters"
    return [
        row_finding(code="too_long", severity=severity, message=message, rows=rows.row_numbers[cut].tolist(), fix=fix)
    ]


def foreign_to_backbone(foreign: LabelledRows, *, of: int, pieces_per_word: float, unknown_share: float) -> Finding:
    """Texts that the backbone's tokenizer does not know the words of, among `of` that were looked at."""
    message = (
        f"{len(foreign):,} of {of:,} training texts that were looked at are foreign to the backbone: it reads them "
    )
    message += (
        f"as {pieces_per_word:.1f} tokens a word, {unknown_share:.0%} of them unknown. In its own language that is "
    )
    message += "1.0 to 1.5, and hardly any"
    fix = "choose a backbone of this language, or a multilingual one, and compare with method baseline, which reads "
    fix += "characters"
    return row_finding(
        code="texts_foreign_to_backbone",
        severity="warning",
        message=message,
        rows=foreign.row_numbers.tolist(),
        fix=fix,
    )


def too_many(names: Iterable[str]) -> list[Finding]:
    """An error if a version could not hold these labels."""
    return [excessive(excess)] if (excess := too_many_labels(names)) is not None else []


def excessive(excess: str, *, column: str | None = None) -> Finding:
    return Finding(
        code="too_many_labels",
        severity="error",
        message=f"{excess}; a model may have no more",
        column=column,
        count=1,
        fix="choose another label column, merge rare labels, or shorten their names; numbers are for text-regression",
    )


def _no_rows() -> Finding:
    return Finding(
        code="single_class",
        severity="error",
        message="there is no row to train on",
        count=0,
        fix="add rows of at least two classes",
    )


def _label_case_collision(train: LabelledRows, held_out: dict[str, LabelledRows]) -> list[Finding]:
    everything = [train, *held_out.values()]
    counts = Counter(name for rows in everything for label in rows.labels for name in rows.target.names_of(label))
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for label, _ in counts.most_common():
        spellings[one_label(label)].append(label)
    collisions = [labels for labels in spellings.values() if len(labels) > 1]
    if not collisions:
        return []
    rarer = {label for labels in collisions for label in labels[1:]}
    affected = [row for rows in everything for row in rows.numbers_with(rarer)]
    message = (
        f"labels that differ only in case, whitespace or signs that look alike: {listed(map(side_by_side, collisions))}"
    )
    return [
        row_finding(
            code="label_case_collision",
            severity="error",
            message=message,
            rows=affected,
            fix="write each label in one way",
        )
    ]


def _duplicates(rows: LabelledRows, keys: Keys) -> list[Finding]:
    seen: set[tuple[int, str]] = set()
    copies: list[int] = []
    for row, pair in zip(rows.row_numbers.tolist(), zip(keys, rows.labels, strict=True), strict=True):
        if pair in seen:
            copies.append(row)
        seen.add(pair)
    if not copies:
        return []
    severity: Severity = "warning" if len(copies) > _MANY_DUPLICATES * len(rows) else "info"
    aside = f" ({rows.modality.ignores} aside)" if rows.modality.ignores else ""
    message = f"{len(copies):,} rows repeat an earlier {rows.modality.name}{aside} with the same label"
    fix = "remove the copies, unless their weight is meant; copies never part in a split"
    return [row_finding(code="duplicate_row", severity=severity, message=message, rows=copies, fix=fix)]


def _near_duplicates(rows: LabelledRows, found: Duplicates) -> list[Finding]:
    groups, inputs = found.group_of[: len(rows)], found.input_of[: len(rows)]
    is_near = _inputs_per_group(groups, inputs)[groups] > 1
    if not is_near.any():
        return []
    numbers = rows.row_numbers[is_near].tolist()
    holds = SHINGLINGS[rows.modality.name].holds
    message = f"{len(numbers):,} rows are near duplicates of others (four fifths of their {holds} agree)"
    if found.is_cut:
        message += "; one kind makes up so much of the data that it may be on several sides"
    fix = "nothing to do: they stay on one side of a split; thin them out if their weight is not meant"
    return [row_finding(code="near_duplicate_row", severity="info", message=message, rows=numbers, fix=fix)]


def _inputs_per_group(groups: Indices, inputs: Indices) -> Indices:
    """How many different inputs each group has, by its number."""
    _, firsts = np.unique(inputs, return_index=True)
    return np.bincount(groups[firsts], minlength=int(groups.max()) + 1)


def _unknown_labels(split: str, rows: LabelledRows, *, known: set[str], is_cut: bool) -> list[Finding]:
    unknown = rows.names() - known
    if not unknown:
        return []
    named = listed([repr(label) for label in sorted(unknown)])
    message = f"the {split} data has labels that the training data lacks: {named}"
    fix = f"add such rows to the training data, or remove them from the {split} data"
    severity: Severity = "error"
    if is_cut:
        severity, message = "warning", f"{message}; they are never answered, so their rows count as wrong"
        fix = "add such rows to the training side, or choose another split.strategy"
    return [
        row_finding(code="unknown_label", severity=severity, message=message, rows=rows.numbers_with(unknown), fix=fix)
    ]


def _overlap(split: str, rows: LabelledRows, found: Duplicates, own: slice, *, trained: slice) -> list[Finding]:
    """Rows of a side whose input, or a near duplicate of it, is trained on."""
    is_near = np.isin(found.group_of[own], found.group_of[trained])
    is_exact = np.isin(found.input_of[own], found.input_of[trained])
    fix = f"remove them from one of the two (split.leaks drop does); scores on {split} come out too high otherwise"
    findings = []
    if is_exact.any():
        shared = rows.row_numbers[is_exact].tolist()
        message = f"{len(shared):,} of {len(rows):,} rows of the {split} data are in the training data too"
        findings.append(row_finding(code="split_overlap", severity="warning", message=message, rows=shared, fix=fix))
    is_near &= ~is_exact
    if is_near.any():
        shared = rows.row_numbers[is_near].tolist()
        message = f"{len(shared):,} of {len(rows):,} rows of the {split} data are near duplicates of training rows"
        findings.append(
            row_finding(code="near_duplicate_across_splits", severity="warning", message=message, rows=shared, fix=fix)
        )
    return findings
