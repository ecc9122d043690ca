"""Errors of datasets.

DatasetError
├── DatasetNotFound      no such dataset for this tenant, or it was deleted
├── DatasetInUse         jobs that have not ended need its rows
├── DatasetUnreadable    the data has findings of severity `error`; carries them
├── ColumnMissing        a named column is not in the data; names the nearest one
├── CheckGaveUp          the check came to no end within limits that are not the last
└── DatasetCheckFailed   the check itself failed: no space, no permission; says nothing about the data
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from finetune.data.records import Finding

_COLUMNS_SHOWN = 20


class DatasetError(Exception):
    """Base of all errors of this package."""


class DatasetNotFound(DatasetError):
    """No such dataset for this tenant, or it was deleted."""


class DatasetInUse(DatasetError):
    """Jobs that have not ended need its rows."""


class DatasetUnreadable(DatasetError):
    """The data cannot be used as it is."""

    def __init__(self, message: str, *, findings: Sequence[Finding]) -> None:
        super().__init__(message)
        self.findings = list(findings)


class ColumnMissing(DatasetError):
    """A named column is not in the data. `nearest` is the most similar name, or None."""

    def __init__(self, column: str, *, available: Sequence[str]) -> None:
        self.column = column
        self.available = list(available)
        self.nearest = _nearest(column, available)
        super().__init__(f"the data has no column {column!r}; it has {_listed(self.available)}")

    def as_finding(self) -> Finding:
        choice = f"did you mean {self.nearest!r}? " if self.nearest is not None else ""
        fix = f"{choice}name the columns to use in `columns`, or rename the column in the file"
        return Finding(code="missing_column", severity="error", message=str(self), column=self.column, fix=fix)


class DatasetCheckFailed(DatasetError):
    """The check could not run to its end on this machine. The data may be sound: try again."""


class CheckGaveUp(DatasetError):
    """The check came to no end within its time and memory, of which it may get more."""


def _nearest(column: str, available: Sequence[str]) -> str | None:
    folded = {name.casefold().strip(): name for name in reversed(available)}
    matches = difflib.get_close_matches(column.casefold().strip(), folded, n=1, cutoff=0.5)
    return folded[matches[0]] if matches else None


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "no columns"
    shown = ", ".join(repr(name) for name in names[:_COLUMNS_SHOWN])
    more = len(names) - _COLUMNS_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
