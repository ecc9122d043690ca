"""What labelled rows reveal before any training: classes, duplicates, contradictions, leaks between splits.

Pure: rows in, findings out. Knows no file, no model and no tokenizer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from finetune.data.duplicates import Duplicates, Indices, find_duplicates
from finetune.data.labelled import LabelledRows, rows_with
from finetune.data.records import ROWS_SHOWN, Finding, Severity
from finetune.data.target_findings import conflicting_numbers, label_set_findings, number_findings
from finetune.data.text_identity import normalise
from model_registry.manifest import Task

_FEW_ROWS = 10
_IMBALANCE_RATIO = 20
_MANY_DUPLICATES = 0.1
_MANY_CUT = 0.05
_NAMES_SHOWN = 5

_Keys = list[int]  # a number for each row's text, or for its near duplicates


def inspect_rows(
    train: LabelledRows,
    validation: LabelledRows | None = None,
    test: LabelledRows | None = None,
    *,
    min_rows_per_class: int = 3,
    duplicates: Duplicates | None = None,
) -> list[Finding]:
    """Findings for the task of `train`, errors first.

    `train` holds everything that is still to be split. `min_rows_per_class` is the number of sides each
    class must stand on: 3, or fewer where validation or test data is given. `duplicates` are those among
    the rows of train, validation and test, in this order; they are found where they are not given.
    """
    if len(train) == 0:
        return [_no_rows()]
    held_out = {name: rows for name, rows in (("validation", validation), ("test", test)) if rows is not None}
    everything = [train, *held_out.values()]
    found = duplicates or find_duplicates([text for rows in everything for text in rows.texts])
    keys = found.text_of[: len(train)].tolist()
    findings = [
        *_OF_TASK[train.target.task](train, held_out, found.group_of[: len(train)].tolist(), min_rows_per_class),
        *_duplicates(train, keys),
        *_near_duplicates(train, found),
        *_CONFLICTS_OF_TASK[train.target.task](train, keys),
    ]
    start = len(train)
    for name, rows in held_out.items():
        findings += _unknown_labels(name, rows, known=train.names())
        findings += _overlap(name, rows, found, slice(start, start + len(rows)), trained=slice(0, len(train)))
        start += len(rows)
    return sorted(findings, key=lambda finding: ("error", "warning", "info").index(finding.severity))


def too_long(rows: LabelledRows, lengths: Sequence[int], max_length: int) -> list[Finding]:
    """Texts of more tokens than are read of them; `lengths` in tokens, special ones included."""
    cut = np.flatnonzero(np.asarray(lengths) > max_length)
    if len(cut) == 0:
        return []
    severity: Severity = "warning" if len(cut) > _MANY_CUT * len(rows) else "info"
    message = f"{len(cut):,} training texts have more than {max_length} tokens; what comes after is not read"
    fix = "set a larger max_length, if the backbone reads as much, or shorten the texts to what matters"
    return [_finding("too_long", severity, message, rows=rows.row_numbers[cut].tolist(), fix=fix)]


def _no_rows() -> Finding:
    return Finding(
        code="single_class",
        severity="error",
        message="there is no row to train on",
        count=0,
        fix="add rows of at least two classes",
    )


def _of_classes(train: LabelledRows, held_out: dict[str, LabelledRows], groups: _Keys, needed: int) -> list[Finding]:
    return [
        *_single_class(train),
        *_label_case_collision(train, held_out),
        *_class_sizes(train, groups, needed),
        *_imbalance(train),
    ]


def _of_label_sets(train: LabelledRows, held_out: dict[str, LabelledRows], groups: _Keys, needed: int) -> list[Finding]:
    return [*_label_case_collision(train, held_out), *label_set_findings(train, groups, needed)]


def _of_numbers(train: LabelledRows, held_out: dict[str, LabelledRows], groups: _Keys, needed: int) -> list[Finding]:
    return number_findings(train, groups, needed)


def _single_class(rows: LabelledRows) -> list[Finding]:
    label = rows.labels[0]
    if any(other != label for other in rows.labels):
        return []
    what = "there is only 1 row, of" if len(rows) == 1 else f"all {len(rows):,} rows are of"
    message = f"{what} class {label!r}; a classifier needs two classes"
    fix = "add rows of at least one other class, or choose another label column"
    every_row = rows.row_numbers.tolist()
    return [_finding("single_class", "error", message, rows=every_row, fix=fix)]


def _label_case_collision(train: LabelledRows, held_out: dict[str, LabelledRows]) -> list[Finding]:
    everything = [train, *held_out.values()]
    counts = Counter(name for rows in everything for label in rows.labels for name in rows.target.names_of(label))
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for label, _ in counts.most_common():
        spellings[normalise(label)].append(label)
    collisions = [labels for labels in spellings.values() if len(labels) > 1]
    if not collisions:
        return []
    rarer = {label for labels in collisions for label in labels[1:]}
    affected = [row for rows in everything for row in rows_with(rows, rarer)]
    message = (
        f"labels that differ only in case or whitespace: {_listed([' / '.join(map(repr, c)) for c in collisions])}"
    )
    return [_finding("label_case_collision", "error", message, rows=affected, fix="write each label in one way")]


def _class_sizes(rows: LabelledRows, keys: _Keys, needed: int) -> list[Finding]:
    texts: defaultdict[str, set[int]] = defaultdict(set)
    for label, key in zip(rows.labels, keys, strict=True):
        texts[label].add(key)
    # Equal and nearly equal texts stay on one side of a split, so different texts are what counts.
    too_small = {label: len(own) for label, own in texts.items() if len(own) < needed}
    small = {label: len(own) for label, own in texts.items() if needed <= len(own) < _FEW_ROWS}
    fix = "add rows, merge these classes into others, or remove them"
    error = f"fewer than {needed} different texts (near duplicates count once), so they cannot stand in every split"
    warning = f"fewer than {_FEW_ROWS} different texts; expect poor results for them"
    return [
        *_too_small(rows, too_small, "error", error, fix + _number_hint(rows, texts)),
        *_too_small(rows, small, "warning", warning, fix),
    ]


def _too_small(
    rows: LabelledRows, sizes: dict[str, int], severity: Severity, consequence: str, fix: str
) -> list[Finding]:
    if not sizes:
        return []
    smallest_first = sorted(sizes, key=lambda label: (sizes[label], label))
    named = _listed([f"{label!r} ({sizes[label]})" for label in smallest_first])
    verb = "has" if len(sizes) == 1 else "have"
    message = f"{len(sizes):,} of {len(set(rows.labels)):,} classes {verb} {consequence}: {named}"
    affected = rows_with(rows, set(sizes))
    return [_finding("class_too_small", severity, message, rows=affected, count=len(sizes), fix=fix)]


def _number_hint(rows: LabelledRows, texts: dict[str, set[int]]) -> str:
    looks_continuous = len(texts) > len(rows) / 2 and all(_is_number(label) for label in texts)
    return "; if the label is a quantity, choose the task regression" if looks_continuous else ""


def _imbalance(rows: LabelledRows) -> list[Finding]:
    counts = Counter(rows.labels).most_common()
    (largest, most), (smallest, fewest) = counts[0], counts[-1]
    if most <= _IMBALANCE_RATIO * fewest:
        return []
    message = f"class {largest!r} has {most:,} rows, class {smallest!r} {fewest:,}: {most / fewest:.0f} times as many"
    fix = "add rows of the small classes, or set `class_weights` to balanced, and judge by macro F1"
    return [_finding("imbalance", "warning", message, rows=[], count=1, fix=fix)]


def _duplicates(rows: LabelledRows, keys: _Keys) -> list[Finding]:
    seen: set[tuple[int, str]] = set()
    copies: list[int] = []
    for row, pair in zip(rows.row_numbers.tolist(), zip(keys, rows.labels, strict=True), strict=True):
        if pair in seen:
            copies.append(row)
        seen.add(pair)
    if not copies:
        return []
    severity: Severity = "warning" if len(copies) > _MANY_DUPLICATES * len(rows) else "info"
    message = f"{len(copies):,} rows repeat an earlier text (case and whitespace aside) with the same label"
    fix = "remove the copies, unless their weight is meant; copies never part in a split"
    return [_finding("duplicate_row", severity, message, rows=copies, fix=fix)]


def _near_duplicates(rows: LabelledRows, found: Duplicates) -> list[Finding]:
    groups, texts = found.group_of[: len(rows)], found.text_of[: len(rows)]
    is_near = _texts_per_group(groups, texts)[groups] > 1
    if not is_near.any():
        return []
    numbers = rows.row_numbers[is_near].tolist()
    message = f"{len(numbers):,} rows are near duplicates of others (four fifths of their runs of three words agree)"
    if found.is_cut:
        message += "; one kind makes up so much of the data that it may stand on several sides"
    fix = "nothing to do: they stay on one side of a split; thin them out if their weight is not meant"
    return [_finding("near_duplicate_row", "info", message, rows=numbers, fix=fix)]


def _texts_per_group(groups: Indices, texts: Indices) -> Indices:
    """How many different texts each group has, by its number."""
    _, firsts = np.unique(texts, return_index=True)
    return np.bincount(groups[firsts], minlength=int(groups.max()) + 1)


def _conflicts(rows: LabelledRows, keys: _Keys) -> list[Finding]:
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
        f"{len(conflicting):,} texts stand under different labels, the first (row {numbers[positions[0]]}) "
        f"under {_listed(pair)}"
    )
    affected = [numbers[position] for position in positions]
    return [_finding("conflicting_labels", "warning", message, rows=affected, fix="keep one label for each text")]


def _unknown_labels(split: str, rows: LabelledRows, *, known: set[str]) -> list[Finding]:
    unknown = rows.names() - known
    if not unknown:
        return []
    named = _listed([repr(label) for label in sorted(unknown)])
    message = f"the {split} data has labels that the training data lacks: {named}"
    fix = f"add such rows to the training data, or remove them from the {split} data"
    return [_finding("unknown_label", "error", message, rows=rows_with(rows, unknown), fix=fix)]


def _overlap(split: str, rows: LabelledRows, found: Duplicates, own: slice, *, trained: slice) -> list[Finding]:
    """Rows of a side whose text, or a near duplicate of it, is trained on."""
    is_near = np.isin(found.group_of[own], found.group_of[trained])
    is_exact = np.isin(found.text_of[own], found.text_of[trained])
    fix = f"remove them from one of the two (split.leaks drop does); scores on {split} come out too high otherwise"
    findings = []
    if is_exact.any():
        shared = rows.row_numbers[is_exact].tolist()
        message = f"{len(shared):,} of {len(rows):,} rows of the {split} data also stand in the training data"
        findings.append(_finding("split_overlap", "warning", message, rows=shared, fix=fix))
    is_near &= ~is_exact
    if is_near.any():
        shared = rows.row_numbers[is_near].tolist()
        message = f"{len(shared):,} of {len(rows):,} rows of the {split} data are near duplicates of training rows"
        findings.append(_finding("near_duplicate_across_splits", "warning", message, rows=shared, fix=fix))
    return findings


def _finding(
    code: str, severity: Severity, message: str, *, rows: Sequence[int], fix: str, count: int | None = None
) -> Finding:
    shown = list(rows[:ROWS_SHOWN])
    total = len(rows) if count is None else count
    return Finding(code=code, severity=severity, message=message, rows=shown, count=total, fix=fix)


def _listed(names: Iterable[str]) -> str:
    everything = list(names)
    more = len(everything) - _NAMES_SHOWN
    return ", ".join(everything[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


_OF_TASK: dict[Task, Callable[[LabelledRows, dict[str, LabelledRows], _Keys, int], list[Finding]]] = {
    "text-classification": _of_classes,
    "text-multi-label": _of_label_sets,
    "text-regression": _of_numbers,
}
_CONFLICTS_OF_TASK: dict[Task, Callable[[LabelledRows, _Keys], list[Finding]]] = {
    "text-classification": _conflicts,
    "text-multi-label": _conflicts,
    "text-regression": conflicting_numbers,
}
