"""Texts and labels out of a canonical table. Knows which rows cannot be trained on, and says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.datasets.batches import FindingLog
from finetune.datasets.canonical import read_batches
from finetune.datasets.records import Finding


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Rows to train on. `row_numbers` is int64[n] and says where in the file each row stands."""

    row_numbers: npt.NDArray[np.int64]
    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: npt.NDArray[np.int64]) -> LabelledRows:
        """The rows at these positions, in this order."""
        positions = indices.tolist()
        return LabelledRows(
            self.row_numbers[indices],
            [self.texts[position] for position in positions],
            [self.labels[position] for position in positions],
        )


def load_labelled(rows_parquet: Path, *, text_column: str, label_column: str) -> tuple[LabelledRows, list[Finding]]:
    """The rows that have a text and a label; labels lose surrounding whitespace, texts stand as given.

    Rows without a text or a label are left out and reported as `empty_value`: a warning, or an error
    when no row is left. Raises `ColumnMissing`.
    """
    row_numbers: list[int] = []
    texts: list[str] = []
    labels: list[str] = []
    log = FindingLog()
    for batch in read_batches(rows_parquet, [text_column, label_column]):
        for row, text, label in zip(batch.row_numbers, *batch.columns, strict=True):
            if text is None or not text.strip():
                _note_empty(log, row, text_column)
            elif label is None or not label.strip():
                _note_empty(log, row, label_column)
            else:
                row_numbers.append(row)
                texts.append(text)
                labels.append(label.strip())
    rows = LabelledRows(np.array(row_numbers, dtype=np.int64), texts, labels)
    return rows, _concluded(log.findings(), has_rows=bool(texts), text_column=text_column, label_column=label_column)


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
