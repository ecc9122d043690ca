"""What a column looks like, gathered batch by batch in bounded memory. Knows no file."""

from __future__ import annotations

import re

from finetune.datasets.records import ColumnReport, ColumnType

_DISTINCT_AT_MOST = 1000
_EXAMPLE_CHARACTERS = 200
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BOOLEANS = frozenset({"true", "false"})


class ColumnProfile:
    """Counts one column's values; `report` may be asked for at any time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._empty = 0
        self._example: str | None = None
        self._may_be_number = True
        self._may_be_boolean = True
        # Hashes, since a thousand values of a megabyte would not fit; None above the limit.
        self._distinct: set[int] | None = set()

    def add(self, values: list[str | None]) -> None:
        filled = [stripped for value in values if value is not None and (stripped := value.strip())]
        self._empty += len(values) - len(filled)
        if not filled:
            return
        if self._example is None:
            self._example = filled[0][:_EXAMPLE_CHARACTERS]
        self._may_be_number = self._may_be_number and all(_NUMBER.fullmatch(value) for value in filled)
        self._may_be_boolean = self._may_be_boolean and all(value.lower() in _BOOLEANS for value in filled)
        self._count_distinct(filled)

    def _count_distinct(self, filled: list[str]) -> None:
        if self._distinct is None:
            return
        self._distinct.update(map(hash, filled))
        if len(self._distinct) > _DISTINCT_AT_MOST:
            self._distinct = None

    def report(self) -> ColumnReport:
        return ColumnReport(
            name=self._name,
            type=self._type(),
            empty=self._empty,
            distinct=None if self._distinct is None else len(self._distinct),
            example=self._example,
        )

    def _type(self) -> ColumnType:
        if self._example is None:
            return "other"
        if self._may_be_boolean:
            return "boolean"
        return "number" if self._may_be_number else "text"
