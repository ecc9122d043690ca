"""What a column looks like, gathered batch by batch in bounded memory. Knows no file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.data.errors import ColumnMissing
from finetune.data.records import ColumnReport, ColumnType, Finding
from finetune.data.spellings import NUMBER, label_name, one_label, side_by_side
from finetune.data.targets.base import parse_list
from model_registry.manifest import too_many_labels

_DISTINCT_AT_MOST = 1000
_EXAMPLE_CHARACTERS = 200
_COUNTED_AT_MOST = 100
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "intent", "topic", "sentiment", "tag", "y")
_BOOLEANS = frozenset({"true", "false"})


class ColumnProfile:
    """Counts one column's values; `report` may be asked for at any time."""

    def __init__(self, name: str, *, may_be_label: bool = True) -> None:
        """Without `may_be_label` it is not looked at as labels, which may take a megabyte."""
        self._name = name
        self._names: set[str] | None = set() if may_be_label else None
        self._excess: str | None = None
        self._empty = 0
        self._example: str | None = None
        self._may_be_number = True
        self._may_be_boolean = True
        self._may_be_list = True
        # Hashes, since a thousand values of a megabyte would not fit; None above the limit.
        self._distinct: set[int] | None = set()
        self._counts: Counter[str] | None = Counter()  # None above the limit, or where a value is no class name
        self._padded: set[str] = set()  # values with blanks around them, as far as values are counted

    def add(self, values: list[str | None]) -> None:
        filled = [stripped for value in values if value is not None and (stripped := value.strip())]
        self._empty += len(values) - len(filled)
        if not filled:
            return
        if self._example is None:
            self._example = filled[0][:_EXAMPLE_CHARACTERS]
        self._may_be_number = self._may_be_number and all(NUMBER.fullmatch(value) for value in filled)
        self._may_be_boolean = self._may_be_boolean and all(value.lower() in _BOOLEANS for value in filled)
        lists = [parse_list(value) for value in filled]
        self._may_be_list = self._may_be_list and None not in lists
        if self._counts is not None and len(self._padded) <= _COUNTED_AT_MOST:
            self._padded.update(value for value in values if value is not None and value.strip() != value)
        self._count_distinct(filled)
        items = [item for value, own in zip(filled, lists, strict=True) for item in ([value] if own is None else own)]
        self._count_values(items)
        self._count_names(items)

    def _count_distinct(self, filled: list[str]) -> None:
        if self._distinct is None:
            return
        self._distinct.update(map(hash, filled))
        if len(self._distinct) > _DISTINCT_AT_MOST:
            self._distinct = None

    def _count_values(self, values: Iterable[str]) -> None:
        if self._counts is None:
            return
        self._counts.update(values)
        if len(self._counts) > _COUNTED_AT_MOST or any(len(value) > _EXAMPLE_CHARACTERS for value in self._counts):
            self._counts = None

    def spellings(self) -> list[Finding]:
        """Values that differ in case or blanks alone, if the column is called like a label and has few values."""
        if self._name.casefold() not in _LABEL_NAMES or self._counts is None:
            return []
        found: defaultdict[str, list[str]] = defaultdict(list)
        for value in [value for value, _ in self._counts.most_common()] + sorted(self._padded):
            if value.strip():
                found[one_label(value)].append(value)
        pairs = [side_by_side(values) for values in found.values() if len(values) > 1]
        if not pairs:
            return []
        message = f"values of {self._name!r} that differ only in case or blanks: {', '.join(pairs)}"[:2000]
        fix = "write each label in one way: a job refuses labels that differ in case; blanks around them do not count"
        return [
            Finding(
                code="label_case_collision",
                severity="warning",
                message=message,
                column=self._name,
                count=len(pairs),
                fix=fix,
            )
        ]

    def _count_names(self, values: Iterable[str]) -> None:
        if self._names is not None:
            self._names.update(values)
            self._excess = too_many_labels(self._names)
            if self._excess is not None:
                self._names = None

    def report(self) -> ColumnReport:
        return ColumnReport(
            name=self._name,
            type=self._type(),
            empty=self._empty,
            distinct=None if self._distinct is None else len(self._distinct),
            example=self._example,
            counts=None if self._counts is None else dict(self._counts.most_common()),
            excess_as_labels=self._excess,
        )

    def _type(self) -> ColumnType:
        if self._example is None:
            return "other"
        if self._may_be_boolean:
            return "boolean"
        if self._may_be_list:
            return "list"
        return "number" if self._may_be_number else "text"


def class_counts(columns: Sequence[ColumnReport], label: str | None) -> dict[str, Any] | None:
    """The rows of each class of the column `label`; where none is named, of one that is called like a label.

    None where no column is called so; `rows` is None for a column of more than 100 values. Raises `ColumnMissing`.
    """
    by_name = {column.name: column for column in columns}
    if label is not None and label not in by_name:
        raise ColumnMissing(label, available=list(by_name))
    folded = {name.casefold(): name for name in reversed(by_name)}
    name = label or next((folded[guess] for guess in _LABEL_NAMES if guess in folded), None)
    if name is None:
        return None
    return {"column": name, "is_guess": label is None, "rows": _by_class(by_name[name].counts)}


def _by_class(counts: Mapping[str, int] | None) -> dict[str, int] | None:
    """The rows of each value under the name that a class of it has, the most frequent first."""
    if counts is None:
        return None
    found: Counter[str] = Counter()
    for value, rows in counts.items():
        found[label_name(value.strip())] += rows
    return dict(found.most_common())
