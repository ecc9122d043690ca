"""Inputs and labels out of a canonical table. Knows which rows cannot be trained on, and says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.data.canonical import file_columns, read_batches
from finetune.data.options import JOINTS, Columns, modality_of
from finetune.data.record_batches import FindingLog
from finetune.data.records import Finding
from finetune.data.targets import DEFAULT_TARGET, Target
from modeling.inputs import BadCell, Cell, Example, FileReference, Modality


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Rows to train on. `row_numbers` is int64[n] and says where in the file each row is.

    `labels` are as `target` writes them. `extras` holds further columns by name, n values each: what a split or an
    evaluation asks for.
    """

    row_numbers: npt.NDArray[np.int64]
    examples: list[Example]
    labels: list[str]
    extras: dict[str, list[str | None]] = field(default_factory=dict)
    target: Target = DEFAULT_TARGET

    @property
    def modality(self) -> Modality:
        return modality_of(self.target.task)

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: npt.NDArray[np.int64]) -> LabelledRows:
        """The rows at these positions, in this order."""
        positions = indices.tolist()
        return LabelledRows(
            self.row_numbers[indices],
            [self.examples[position] for position in positions],
            [self.labels[position] for position in positions],
            {name: [values[position] for position in positions] for name, values in self.extras.items()},
            self.target,
        )

    def most_of_a_label(self) -> int:
        """How many rows the most frequent label has."""
        return max(Counter(self.labels).values(), default=0)

    def names(self) -> set[str]:
        """The classes or labels in these rows."""
        return {name for label in set(self.labels) for name in self.target.names_of(label)}

    def numbers_with(self, names: set[str]) -> list[int]:
        """The numbers of the rows whose label gives any of these names."""
        has = {label: not names.isdisjoint(self.target.names_of(label)) for label in set(self.labels)}
        return [row for row, label in zip(self.row_numbers.tolist(), self.labels, strict=True) if has[label]]


def load_labelled(
    rows_parquet: Path, columns: Columns, *, extra_columns: Sequence[str] = (), target: Target = DEFAULT_TARGET
) -> tuple[LabelledRows, list[Finding]]:
    """The rows that have an input and a label; labels lose surrounding whitespace, inputs stay as given.

    The values of `extra_columns` come along as they are, None where a cell is empty.

    Rows without an input or a label are left out and reported (as `empty_value` for most targets): a warning, or an
    error when no row is left. A cell that the modality or `target` cannot read is an error. Raises `ColumnMissing`.
    """
    rows = LabelledRows(np.zeros(0, np.int64), [], [], {name: [] for name in extra_columns}, target)
    inputs = columns.inputs(rows.modality)
    row_numbers: list[int] = []
    known: dict[str, str] = {}  # one object for equal values: labels and extras repeat, inputs seldom do
    cells = _Cells(inputs, columns.label, rows_parquet, target)
    names = list(dict.fromkeys([*cells.columns, *extra_columns]))
    for batch in read_batches(rows_parquet, names):
        found = dict(zip(names, batch.columns, strict=True))
        kept = []
        by_row = zip(*(found[name] for name in cells.columns), strict=True)
        for place, (row, own) in enumerate(zip(batch.row_numbers, by_row, strict=True)):
            read = cells.read(row, own)
            if read is not None:
                kept.append(place)
                rows.examples.append(read[0])
                rows.labels.append(known.setdefault(read[1], read[1]))
        row_numbers += [batch.row_numbers[place] for place in kept]
        for name, values in rows.extras.items():
            values += [_filled(known, found[name][place]) for place in kept]
    rows = replace(rows, row_numbers=np.array(row_numbers, dtype=np.int64))
    findings = cells.log.findings()
    if len(rows):
        return rows, [*findings, *target.told(columns.label)]
    return rows, _without_rows(findings, cells.columns, rows.modality.name)


class _Cells:
    """Reads the input and the label of each row, and notes the rows that cannot be used."""

    def __init__(self, inputs: Mapping[str, Sequence[str]], label: str, rows_parquet: Path, target: Target) -> None:
        self.log = FindingLog()
        self._folder, self._files = rows_parquet.parent, file_columns(rows_parquet)
        self.columns = (*(name for names in inputs.values() for name in names), label)
        self._inputs, self._target = inputs, target
        modality = modality_of(target.task)
        self._read, self._joint = modality.read, JOINTS.get(modality.name, "")

    def read(self, row: int, cells: Sequence[str | None]) -> tuple[Example, str] | None:
        """None where the row has no input, no label, or one that cannot be read."""
        filled: dict[str, Cell] = {}
        found = iter(cells)
        for role, names in self._inputs.items():
            own = [(name, cell) for name, cell in zip(names, found, strict=False) if cell is not None and cell.strip()]
            if not own:
                self._note_empty(row, " and ".join(names), "empty_value")
                return None
            filled[role] = self._cell(own)
        if not (cells[-1] or "").strip():
            self._note_empty(row, self.columns[-1], self._target.empty_code)
            return None
        column = self.columns[0]
        try:
            example = self._read(filled)
            column = self.columns[-1]
            label = self._target.fit(self._target.read(cells[-1] or ""), example)
            self._note_name(row, column, cells[-1] or "", label)
            return example, label
        except BadCell as error:
            message = f"row {row}, column {column!r} {error}"
            self.log.note("misfit", message, code=error.code, row=row, column=column, fix=error.fix)
            return None

    def _cell(self, own: Sequence[tuple[str, str]]) -> Cell:
        """The cell of a role: that of its column, or those of several that are filled, joined."""
        name, cell = own[0]
        if name in self._files:
            return FileReference(self._folder, cell)
        return cell if len(own) == 1 else self._joint.join(cell for _, cell in own)

    def _note_name(self, row: int, column: str, cell: str, label: str) -> None:
        """Of a class that is not called as it is written, so that it has one name in every format."""
        if self._target.kind == "single_label" and label != cell.strip():
            message = f"labels such as {cell.strip()[:60]!r} are called {label[:60]!r}, as in every other format"
            fix = "nothing to do"
            self.log.note("name", message, code="label_name", severity="info", row=row, column=column, fix=fix)

    def _note_empty(self, row: int, column: str, code: str) -> None:
        message = f"rows without a value in column {column!r} are left out"
        fix = f"fill in {column!r}, or remove the rows"
        self.log.note("empty", message, code=code, severity="warning", row=row, column=column, fix=fix)


def _filled(known: dict[str, str], cell: str | None) -> str | None:
    return None if cell is None or not cell.strip() else known.setdefault(cell, cell)


def _without_rows(findings: list[Finding], columns: Sequence[str], what: str) -> list[Finding]:
    if any(finding.severity == "error" for finding in findings):
        return findings
    first, *others = map(repr, columns)
    message = f"no row has a value both in {first} and in {' and in '.join(others)}"
    if not findings:
        fix = f"add rows with a {what} and a label"
        return [Finding(code="empty_value", severity="error", message=message, count=0, fix=fix)]
    return [finding.model_copy(update={"severity": "error", "message": message}) for finding in findings]
