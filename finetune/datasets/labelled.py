"""Texts and labels out of a canonical table. Knows which rows cannot be trained on, and says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.datasets.batches import FindingLog
from finetune.datasets.canonical import read_batches
from finetune.datasets.records import Finding


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Rows to train on. `row_numbers` is int64[n] and says where in the file each row stands.

    `extras` holds further columns by name, n values each: what a split or an evaluation asks for.
    """

    row_numbers: npt.NDArray[np.int64]
    texts: list[str]
    labels: list[str]
    extras: dict[str, list[str | None]] = field(default_factory=dict)

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
        )


def load_labelled(
    rows_parquet: Path, *, text_column: str, label_column: str, extra_columns: Sequence[str] = ()
) -> tuple[LabelledRows, list[Finding]]:
    """The rows that have a text and a label; labels lose surrounding whitespace, texts stand as given.

    The values of `extra_columns` come along as they are, None where a cell is empty.

    Rows without a text or a label are left out and reported as `empty_value`: a warning, or an error
    when no row is left. Raises `ColumnMissing`.
    """
    names = list(dict.fromkeys([text_column, label_column, *extra_columns]))
    row_numbers: list[int] = []
    held: dict[str, list[str | None]] = {name: [] for name in names}
    log = FindingLog()
    for batch in read_batches(rows_parquet, names):
        columns = dict(zip(names, batch.columns, strict=True))
        cells = zip(batch.row_numbers, columns[text_column], columns[label_column], strict=True)
        kept = [
            place
            for place, (row, text, label) in enumerate(cells)
            if _is_filled(log, row, {text_column: text, label_column: label})
        ]
        row_numbers += [batch.row_numbers[place] for place in kept]
        for name, column in columns.items():
            held[name] += [column[place] for place in kept]
    texts = [text for text in held[text_column] if text is not None]
    known: dict[str, str] = {}  # one object for equal values: labels and extras repeat, texts seldom do
    labels = [_shared(known, label.strip()) for label in held[label_column] if label is not None]
    extras = {name: [_filled(known, cell) for cell in held[name]] for name in dict.fromkeys(extra_columns)}
    rows = LabelledRows(np.array(row_numbers, dtype=np.int64), texts, labels, extras)
    return rows, _concluded(log.findings(), has_rows=bool(texts), text_column=text_column, label_column=label_column)


def _is_filled(log: FindingLog, row: int, cells: dict[str, str | None]) -> bool:
    for column, cell in cells.items():
        if cell is None or not cell.strip():
            _note_empty(log, row, column)
            return False
    return True


def _shared(known: dict[str, str], value: str) -> str:
    return known.setdefault(value, value)


def _filled(known: dict[str, str], cell: str | None) -> str | None:
    return None if cell is None or not cell.strip() else _shared(known, cell)


def _note_empty(log: FindingLog, row: int, column: str) -> None:
    message = f"rows without a value in column {column!r} are left out"
    fix = f"fill in {column!r}, or remove the rows"
    log.note("empty", message, code="empty_value", severity="warning", row=row, column=column, fix=fix)


def _concluded(findings: list[Finding], *, has_rows: bool, text_column: str, label_column: str) -> list[Finding]:
    if has_rows:
        return findings
    message = f"no row has a value both in {text_column!r} and in {label_column!r}"
    if not findings:
        fix = "add rows with a text and a label"
        return [Finding(code="empty_value", severity="error", message=message, count=0, fix=fix)]
    return [finding.model_copy(update={"severity": "error", "message": message}) for finding in findings]
