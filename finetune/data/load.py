"""The rows of a job from its files to its three sides: what a run begins with, and what a dry run looks at."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from finetune.data.canonical import column_names, read_batches
from finetune.data.errors import ColumnMissing
from finetune.data.labelled import LabelledRows, load_labelled
from finetune.data.options import AUTO, Columns, RareClasses, SplitOptions, modality_of
from finetune.data.records import Finding, has_errors, row_finding
from finetune.data.sides import Sides, divide, with_extras
from finetune.data.targets import Target, target_of
from modeling.tasks import DEFAULT_TASK

NOTHING = LabelledRows(np.zeros(0, np.int64), [], [])


def load_sides(
    files: Mapping[str, Path],
    *,
    columns: Columns | Mapping[str, Columns],
    options: SplitOptions,
    seed: int,
    task: str = DEFAULT_TASK,
    rare: RareClasses = RareClasses(),
    exclude: Collection[int] = (),
) -> Sides:
    """The sides out of the tables `train` and perhaps `validation` and `test`; what is not given is split off. The
    tables' columns may have names of their own, by side. Rows of `train` whose numbers are in `exclude` are left out.

    With an error among the findings the rows mean nothing. Every side has the columns of `columns.slices`.
    """
    rows: dict[str, LabelledRows] = {}
    findings: list[Finding] = []
    named = dict.fromkeys(files, columns) if isinstance(columns, Columns) else columns
    target = find_target(files, named, task)
    for side, file in files.items():
        rows[side], found = _load(file, named[side], options, target, is_divided=side == "train")
        findings += found
    if exclude and not has_errors(findings):
        rows["train"], found = _without(rows["train"], exclude)
        findings += found
    if has_errors(findings):
        return Sides(NOTHING, NOTHING, NOTHING, findings)
    sides = divide(rows["train"], rows.get("validation"), rows.get("test"), options=options, seed=seed, rare=rare)
    train, validation, test = (
        with_extras(side, named["train"].slices) for side in (sides.train, sides.validation, sides.test)
    )
    return Sides(train, validation, test, [*findings, *sides.findings])


def _without(rows: LabelledRows, numbers: Collection[int]) -> tuple[LabelledRows, list[Finding]]:
    wanted = np.array(sorted(set(numbers)), np.int64)
    left = rows.take(np.flatnonzero(~np.isin(rows.row_numbers, wanted)))
    unknown = wanted[~np.isin(wanted, rows.row_numbers)].tolist()
    if not unknown:
        return left, []
    message = f"exclude_rows names {len(unknown):,} rows that are not among the training data, the first {unknown[0]}"
    fix = "nothing to do if they had no text or label; else name rows by their numbers in the training dataset"
    return left, [row_finding(code="unknown_row", severity="warning", message=message, rows=unknown, fix=fix)]


def find_target(files: Mapping[str, Path], columns: Mapping[str, Columns], task: str) -> Target:
    """How the label column is read: `auto` goes by the training rows, a separator by all."""
    looked_at = ["train"] if task == AUTO else list(files)
    found = [(files[side], columns[side].label) for side in looked_at]
    return target_of(task, _LabelCells([(file, name) for file, name in found if name in column_names(file)]))


class _LabelCells:
    """The cells of a column of each of several tables, read anew each time."""

    def __init__(self, columns: Sequence[tuple[Path, str]]) -> None:
        self._columns = columns

    def __iter__(self) -> Iterator[str | None]:
        for file, name in self._columns:
            for batch in read_batches(file, [name]):
                yield from batch.columns[0]


def _answer_among_inputs(label: str) -> Finding:
    message = f"the label column {label!r} is among the columns to read, so a model would be given the answer"
    fix = "name another label column, or leave it out of the columns to read"
    return row_finding(code="label_among_inputs", severity="error", message=message, rows=[], column=label, fix=fix)


def _load(
    file: Path, columns: Columns, options: SplitOptions, target: Target, *, is_divided: bool
) -> tuple[LabelledRows, list[Finding]]:
    """The rows of one table with the columns that its split and its slices ask for."""
    if columns.label in [name for names in columns.inputs(modality_of(target.task)).values() for name in names]:
        return NOTHING, [_answer_among_inputs(columns.label)]
    wanted = [*columns.slices, *([options.column_read] if options.column_read else [])]
    available = column_names(file)
    # Only the rows to divide need the split's column; data given as a side may lack what it is sliced by.
    extras = wanted if is_divided else [name for name in wanted if name in available]
    try:
        rows, findings = load_labelled(file, columns, extra_columns=extras, target=target)
    except ColumnMissing as error:
        return NOTHING, [error.as_finding()]
    lacking = [ColumnMissing(name, available=available).as_finding() for name in columns.slices if name not in extras]
    return rows, findings + [finding.model_copy(update={"severity": "warning"}) for finding in lacking]
