"""The rows of a job from its files to its three sides: what a run begins with, and what a dry run looks at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from finetune.data.canonical import column_names, read_batches
from finetune.data.errors import ColumnMissing
from finetune.data.labelled import LabelledRows, load_labelled
from finetune.data.options import AUTO, Columns, SplitOptions
from finetune.data.records import Finding, has_errors
from finetune.data.sides import Sides, divide, with_extras
from finetune.data.targets import Target, target_of
from modeling.tasks import DEFAULT_TASK

NOTHING = LabelledRows(np.zeros(0, np.int64), [], [])


def load_sides(
    files: Mapping[str, Path],
    *,
    columns: Columns,
    options: SplitOptions,
    seed: int,
    task: str = DEFAULT_TASK,
) -> Sides:
    """The sides out of the tables `train` and perhaps `validation` and `test`; what is not given is split off.

    With an error among the findings the rows mean nothing. Every side has the columns of `columns.slices`.
    """
    rows: dict[str, LabelledRows] = {}
    findings: list[Finding] = []
    target = find_target(files, columns, task)
    for side, file in files.items():
        rows[side], found = _load(file, columns, options, target, is_divided=side == "train")
        findings += found
    if has_errors(findings):
        return Sides(NOTHING, NOTHING, NOTHING, findings)
    sides = divide(rows["train"], rows.get("validation"), rows.get("test"), options=options, seed=seed)
    train, validation, test = (
        with_extras(side, columns.slices) for side in (sides.train, sides.validation, sides.test)
    )
    return Sides(train, validation, test, [*findings, *sides.findings])


def find_target(files: Mapping[str, Path], columns: Columns, task: str) -> Target:
    """How the label column is read: `auto` goes by the training rows, a separator by all."""
    looked_at = [files["train"]] if task == AUTO else list(files.values())
    with_label = [file for file in looked_at if columns.label in column_names(file)]
    return target_of(task, (cell for file in with_label for cell in _cells(file, columns.label)))


def _cells(file: Path, column: str) -> Iterator[str | None]:
    for batch in read_batches(file, [column]):
        yield from batch.columns[0]


def _load(
    file: Path, columns: Columns, options: SplitOptions, target: Target, *, is_divided: bool
) -> tuple[LabelledRows, list[Finding]]:
    """The rows of one table with the columns that its split and its slices ask for."""
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
