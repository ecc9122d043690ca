"""What the label column holds, by task: how a cell is read, which names it gives, which rows a split holds alike.

Whatever the task, a row's label is one string from here on, so that equal labels are equal strings: the class, the
sorted labels as a JSON list, or the number. Pure; knows no file.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from model_registry.manifest import Task

AUTO: Literal["auto"] = "auto"
WantedTask = Literal["auto"] | Task
SEPARATORS = ("|", ";")
NO_LABEL = "(none)"
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LIST_START = re.compile(r"\s*\[")
_MOST_BINS, _ROWS_PER_BIN = 10, 10


class Misfit(ValueError):
    """A cell that the task cannot take: `what` is wrong with it, and how to mend it."""

    def __init__(self, what: str, *, code: str, fix: str) -> None:
        super().__init__(what)
        self.code, self.fix = code, fix


class Target(Protocol):
    @property
    def task(self) -> Task: ...
    @property
    def empty_code(self) -> str:
        """The finding for a row without a value."""

    def read(self, cell: str) -> str:
        """The label of a cell that is not empty. Raises `Misfit`."""

    def names_of(self, label: str) -> tuple[str, ...]:
        """The classes or labels that a label names; none for a number."""

    def strata(self, labels: Sequence[str]) -> list[str]:
        """For each row the kind of which every side of a split should have its share."""


@dataclass(frozen=True, slots=True)
class SingleLabel:
    """One class a row."""

    task: Task = "text-classification"
    empty_code: str = "empty_value"

    def read(self, cell: str) -> str:
        if parse_list(cell) is not None:
            fix = "choose the task text-multi-label, or write one label as plain text"
            what = "holds a list of labels, where text-classification takes one"
            raise Misfit(what, code="unexpected_list", fix=fix)
        return cell.strip()

    def names_of(self, label: str) -> tuple[str, ...]:
        return (label,)

    def strata(self, labels: Sequence[str]) -> list[str]:
        return list(labels)


@dataclass(frozen=True, slots=True)
class LabelSets:
    """Any number of labels a row. A cell is a JSON list of strings, or labels with `separator` between them."""

    separator: str | None = None
    task: Task = "text-multi-label"
    empty_code: str = "empty_value"

    def read(self, cell: str) -> str:
        listed = parse_list(cell)
        if listed is None:
            listed = cell.split(self.separator) if self.separator else [cell]
        return json.dumps(sorted({name for part in listed if (name := part.strip())}), ensure_ascii=False)

    def names_of(self, label: str) -> tuple[str, ...]:
        return tuple(json.loads(label))

    def strata(self, labels: Sequence[str]) -> list[str]:
        """The order of iterative stratification (Sechidis, Tsoumakas and Vlahavas, On the stratification of
        multi-label data, ECML PKDD 2011): the label with the fewest rows left takes all of them, until none is left.
        """
        left: defaultdict[str, set[int]] = defaultdict(set)
        names = [self.names_of(label) for label in labels]
        for row, own in enumerate(names):
            for name in own:
                left[name].add(row)
        strata = [NO_LABEL] * len(labels)
        while left:
            rarest = min(left, key=lambda name: (len(left[name]), name))
            for row in left.pop(rarest):
                strata[row] = rarest
                for name in names[row]:
                    left.get(name, set()).discard(row)
            left = defaultdict(set, {name: rows for name, rows in left.items() if rows})
        return strata


@dataclass(frozen=True, slots=True)
class Numbers:
    """One finite number a row, written with a point and without separators of thousands."""

    task: Task = "text-regression"
    empty_code: str = "non_numeric_target"

    def read(self, cell: str) -> str:
        text = cell.strip()
        fix = "write a finite number, such as 3.5 or -1e3, in every row; for words choose the task text-classification"
        if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
            raise Misfit(f"holds {text[:60]!r}, which is no finite number", code="non_numeric_target", fix=fix)
        return repr(float(text) + 0.0)  # without the sign of zero

    def names_of(self, label: str) -> tuple[str, ...]:
        return ()

    def strata(self, labels: Sequence[str]) -> list[str]:
        """Bins of equally many rows by value, ten at most."""
        values = np.array([float(label) for label in labels])
        bins = min(_MOST_BINS, len(values) // _ROWS_PER_BIN)
        if bins < 2:
            return ["0"] * len(values)
        edges = np.quantile(values, np.arange(1, bins) / bins)
        return [str(place) for place in np.searchsorted(edges, values, side="right").tolist()]


SINGLE_LABEL = SingleLabel()


def target_of(task: WantedTask, cells: Iterable[str | None]) -> Target:
    """The target of a task; `cells` are those of the label column, which are looked at where the task leaves it open.

    `auto` is text-multi-label where every cell that is not empty holds a list, and text-classification otherwise.
    """
    if task == AUTO:
        task = "text-multi-label" if are_lists(cells) else "text-classification"
        if task == "text-multi-label":
            return LabelSets()
    match task:
        case "text-regression":
            return Numbers()
        case "text-multi-label":
            return LabelSets(_separator(cells))
    return SINGLE_LABEL


def are_lists(cells: Iterable[str | None]) -> bool:
    """Whether every filled cell holds a list; ends at the first that does not."""
    is_any = False
    for cell in cells:
        if cell is not None and cell.strip():
            if parse_list(cell) is None:
                return False
            is_any = True
    return is_any


def _separator(cells: Iterable[str | None]) -> str | None:
    """`|` where any cell has one, else `;` where any has; none where a cell holds a list, which needs none."""
    found: set[str] = set()
    for cell in cells:
        if cell is None:
            continue
        if parse_list(cell) is not None:
            return None
        found.update(separator for separator in SEPARATORS if separator in cell)
    return next((separator for separator in SEPARATORS if separator in found), None)


def parse_list(cell: str) -> list[str] | None:
    """The strings of a JSON list of strings, None for anything else."""
    if not _LIST_START.match(cell):
        return None
    try:
        value: Any = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return value if is_list else None
