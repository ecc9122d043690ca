"""What is known about an uploaded dataset: its record, its report and the findings in it.

Knows no file format and no SQL. The store, the readers and the HTTP routes all speak in these types.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

FileFormat = Literal["csv", "jsonl", "json", "conll", "parquet", "xlsx", "zip", "tar"]
Severity = Literal["info", "warning", "error"]
ColumnType = Literal["text", "number", "boolean", "list", "other"]

ROWS_SHOWN = 20


class DatasetStatus(StrEnum):
    UPLOADED = "uploaded"
    VALIDATING = "validating"
    READY = "ready"
    INVALID = "invalid"


class Finding(BaseModel):
    """One thing worth telling about the data: what, where, and how to fix it.

    `rows` holds the first 20 row numbers, counted from 1 as a person sees them in the file: for csv,
    row 1 is the first record after the header (blank lines are not counted, a record with quoted line
    breaks counts once); for jsonl, the line number; for json, the place in the array; for conll, the line of
    a sentence's first token; for parquet, the row; for xlsx, the row of the sheet;
    for an archive of files, the place of the file in it, or the row of its metadata. `count` is the number of
    occurrences in all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    severity: Severity
    message: str
    column: str | None = None
    rows: list[int] = []
    count: int = 1
    fix: str


class ColumnReport(BaseModel):
    """One column as its values look: `number` or `list` where every value reads as one, `other` where all are empty.

    `empty` counts nulls and values of whitespace only; `distinct` is None above a thousand values. `counts` holds
    the rows of each value, of lists of each item, the most frequent first, up to 100; None where there are more.
    `excess_as_labels` says why its values are too many or too long for labels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    type: ColumnType
    empty: int
    distinct: int | None
    example: str | None
    counts: dict[str, int] | None = None
    excess_as_labels: str | None = None


class DatasetReport(BaseModel):
    """The outcome of checking one upload. `rows` counts the rows that could be read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    columns: list[ColumnReport]
    findings: list[Finding]

    @property
    def is_valid(self) -> bool:
        return not has_errors(self.findings)


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """One row of the table `datasets`. Times are seconds since the epoch."""

    id: str
    tenant: str
    filename: str
    format: FileFormat
    status: DatasetStatus
    sha256: str
    bytes: int
    rows: int | None
    columns: list[ColumnReport] | None
    report: DatasetReport | None
    created_at: float
    updated_at: float
    deleted_at: float | None


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def row_finding(
    *,
    code: str,
    severity: Severity,
    message: str,
    rows: Sequence[int],
    fix: str,
    column: str | None = None,
    count: int | None = None,
) -> Finding:
    """A finding about these rows, of which it shows the first; `count` is their number unless given."""
    total = len(rows) if count is None else count
    shown = list(rows[:ROWS_SHOWN])
    return Finding(code=code, severity=severity, message=message, column=column, rows=shown, count=total, fix=fix)
