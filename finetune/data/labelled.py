"""Texts and labels out of a canonical table. Knows which rows cannot be trained on, and says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.data.canonical import read_batches
from finetune.data.record_batches import FindingLog
from finetune.data.records import Finding
from finetune.data.targets import DEFAULT_TARGET, Misfit, Target


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Rows to train on. `row_numbers` is int64[n] and says where in the file each row stands.

    `labels` are as `target` writes them. `extras` holds further columns by name, n values each: what a split or an
    evaluation asks for.
    """

    row_numbers: npt.NDArray[np.int64]
    texts: list[str]
    labels: list[str]
    extras: dict[str, list[str | None]] = field(default_factory=dict)
    target: Target = DEFAULT_TARGET

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: npt.NDArray[np.int64]) -> LabelledRows:
        """The rows at these positions, in this order."""
        positions = indices.tolist()
        return LabelledRows(
            self.row_numbers[indices],
            [self.texts[position] for position in positions],
            [self.labels[position] for position in positions],
            {name: [values[position] for position in positions] for name, values in self.extras.items()},
            self.target,
        )

    def most_of_a_label(self) -> int:
        """How many rows the most frequent label has."""
        return max(Counter(self.labels).values(), default=0)

    def names(self) -> set[str]:
        """The classes or labels that stand in these rows."""
        return {name for label in set(self.labels) for name in self.target.names_of(label)}

    def numbers_with(self, names: set[str]) -> list[int]:
        """The numbers of the rows whose label gives any of these names."""
        has = {label: not names.isdisjoint(self.target.names_of(label)) for label in set(self.labels)}
        return [row for row, label in zip(self.row_numbers.tolist(), self.labels, strict=True) if has[label]]


def load_labelled(
    rows_parquet: Path,
    *,
    text_column: str,
    label_column: str,
    extra_columns: Sequence[str] = (),
    target: Target = DEFAULT_TARGET,
) -> tuple[LabelledRows, list[Finding]]:
    """The rows that have a text and a label; labels lose surrounding whitespace, texts stand as given.

    The values of `extra_columns` come along as they are, None where a cell is empty.

    Rows without a text or a label are left out and reported (as `empty_value` for most targets): a warning, or an
    error when no row is left. A label that `target` cannot read is an error. Raises `ColumnMissing`.
    """
    names = list(dict.fromkeys([text_column, label_column, *extra_columns]))
    row_numbers: list[int] = []
    labels: list[str] = []
    held: dict[str, list[str | None]] = {name: [] for name in dict.fromkeys([text_column, *extra_columns])}
    known: dict[str, str] = {}  # one object for equal values: labels and extras repeat, texts seldom do
    cells = _Cells(text_column, label_column, target)
    for batch in read_batches(rows_parquet, names):
        columns = dict(zip(names, batch.columns, strict=True))
        kept = []
        for place, row in enumerate(batch.row_numbers):
            label = cells.label(row, columns[text_column][place], columns[label_column][place])
            if label is not None:
                kept.append(place)
                labels.append(_shared(known, label))
        row_numbers += [batch.row_numbers[place] for place in kept]
        for name, values in held.items():
            values += [columns[name][place] for place in kept]
    texts = [text for text in held[text_column] if text is not None]
    extras = {name: [_filled(known, cell) for cell in held[name]] for name in dict.fromkeys(extra_columns)}
    rows = LabelledRows(np.array(row_numbers, dtype=np.int64), texts, labels, extras, target)
    findings = cells.log.findings()
    if texts:
        return rows, [*findings, *target.told(label_column)]
    return rows, _without_rows(findings, text_column=text_column, label_column=label_column)


class _Cells:
    """Reads the label of each row, and notes the rows that cannot be used."""

    def __init__(self, text_column: str, label_column: str, target: Target) -> None:
        self.log = FindingLog()
        self._text_column, self._label_column, self._target = text_column, label_column, target

    def label(self, row: int, text: str | None, label: str | None) -> str | None:
        """None where the row has no text, no label, or one that does not fit the task."""
        if text is None or not text.strip():
            self._note_empty(row, self._text_column, "empty_value")
            return None
        if label is None or not label.strip():
            self._note_empty(row, self._label_column, self._target.empty_code)
            return None
        try:
            return self._target.read(label)
        except Misfit as error:
            message = f"row {row}, column {self._label_column!r} {error}"
            self.log.note("misfit", message, code=error.code, row=row, column=self._label_column, fix=error.fix)
            return None

    def _note_empty(self, row: int, column: str, code: str) -> None:
        message = f"rows without a value in column {column!r} are left out"
        fix = f"fill in {column!r}, or remove the rows"
        self.log.note("empty", message, code=code, severity="warning", row=row, column=column, fix=fix)


def _shared(known: dict[str, str], value: str) -> str:
    return known.setdefault(value, value)


def _filled(known: dict[str, str], cell: str | None) -> str | None:
    return None if cell is None or not cell.strip() else _shared(known, cell)


def _without_rows(findings: list[Finding], *, text_column: str, label_column: str) -> list[Finding]:
    if any(finding.severity == "error" for finding in findings):
        return findings
    message = f"no row has a value both in {text_column!r} and in {label_column!r}"
    if not findings:
        fix = "add rows with a text and a label"
        return [Finding(code="empty_value", severity="error", message=message, count=0, fix=fix)]
    return [finding.model_copy(update={"severity": "error", "message": message}) for finding in findings]
