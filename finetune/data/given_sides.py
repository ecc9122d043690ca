"""Splits that a column dictates: a time that orders the rows, or the name of each row's side.

Pure: rows in, the side of every row or findings out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from finetune.data.labelled import LabelledRows
from finetune.data.options import SIDE_NAMES, TEST, TRAIN, VALIDATION
from finetune.data.records import Finding, row_finding
from finetune.data.spellings import NUMBER

Sides = npt.NDArray[np.int8]

_NAMES_SHOWN = 5


def predefined_sides(rows: LabelledRows, column: str) -> tuple[Sides, list[Finding]]:
    """The side that each row's value in `column` names; case and surrounding whitespace do not count."""
    values = rows.extras[column]
    sides = np.fromiter((_side(value) for value in values), np.int8, len(values))
    unknown = np.flatnonzero(sides < 0)
    if len(unknown) == 0:
        return sides, []
    shown = ", ".join(sorted({repr((values[row] or "")[:40]) for row in unknown.tolist()})[:_NAMES_SHOWN])
    finding = row_finding(
        code="unknown_split",
        severity="error",
        message=f"{len(unknown):,} rows have a value in column {column!r} that names no side of a split: {shown}",
        rows=rows.row_numbers[unknown].tolist(),
        column=column,
        fix="write train, validation (or valid, val, dev, eval) or test in every row",
    )
    return sides, [finding]


def _side(value: str | None) -> int:
    return SIDE_NAMES.get((value or "").strip().casefold(), -1)


def time_sides(rows: LabelledRows, column: str, *, validation: float, test: float) -> tuple[Sides, list[Finding]]:
    """The oldest rows train, the newest test. Rows of one time stay together, so shares are met up to such a tie.

    Every side with a share gets at least one time; with too few different times there is a finding instead.
    """
    times, findings = _times(rows, column)
    if findings:
        return np.zeros(len(rows), np.int8), findings
    moments, place, counts = np.unique(times, return_inverse=True, return_counts=True)
    wanted = 1 + (validation > 0) + (test > 0)
    if len(moments) < wanted:
        return np.zeros(len(rows), np.int8), [_too_few_times(rows, column, len(moments), wanted)]
    older = np.concatenate([[0], np.cumsum(counts)])  # rows before each moment
    test_from = _cut(older, len(rows) * (1 - test), wanted - 1, len(moments) - 1) if test > 0 else len(moments)
    share = len(rows) * (1 - test - validation)
    validation_from = _cut(older, share, 1, test_from - 1) if validation > 0 else test_from
    sides = np.where(place >= test_from, TEST, np.where(place >= validation_from, VALIDATION, TRAIN))
    return sides.astype(np.int8), []


def _cut(older: npt.NDArray[np.int64], rows: float, low: int, high: int) -> int:
    """The moment in [low, high] before which there are as nearly as possible this many rows."""
    return low + int(np.argmin(np.abs(older[low : high + 1] - rows)))


def _times(rows: LabelledRows, column: str) -> tuple[npt.NDArray[np.float64], list[Finding]]:
    values = rows.extras[column]
    parsed = [parse_time(value) for value in values]
    bad = [row for row, time in enumerate(parsed) if time is None]
    if bad:
        return np.zeros(0), [_unparsed(rows, column, bad, values)]
    kinds = {is_number for _, is_number in filter(None, parsed)}
    if len(kinds) > 1:
        minority = _minority([time[1] for time in parsed if time is not None])
        return np.zeros(0), [_mixed(rows, column, minority)]
    return np.array([time[0] for time in parsed if time is not None], np.float64), []


def parse_time(value: str | None) -> tuple[float, bool] | None:
    """A time as (number, whether it was written as one), or None.

    Numbers are taken as they are; ISO 8601 becomes seconds since the epoch, in UTC where no offset is given.
    """
    text = (value or "").strip()
    if NUMBER.fullmatch(text):
        number = float(text)
        return (number, True) if math.isfinite(number) else None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds(), False


def _minority(are_numbers: Sequence[bool]) -> list[int]:
    rarer = sum(are_numbers) * 2 <= len(are_numbers)
    return [row for row, is_number in enumerate(are_numbers) if is_number == rarer]


def _unparsed(rows: LabelledRows, column: str, bad: list[int], values: Sequence[str | None]) -> Finding:
    first = repr((values[bad[0]] or "")[:60])
    return row_finding(
        code="invalid_time",
        severity="error",
        message=f"{len(bad):,} rows have no readable time in column {column!r}, the first {first}",
        rows=rows.row_numbers[bad].tolist(),
        column=column,
        fix="write ISO 8601 (2026-03-09 or 2026-03-09T14:30:00+01:00) or a number, such as seconds since the epoch",
    )


def _mixed(rows: LabelledRows, column: str, minority: list[int]) -> Finding:
    return row_finding(
        code="invalid_time",
        severity="error",
        message=f"column {column!r} mixes dates and plain numbers, which have no common order",
        rows=rows.row_numbers[minority].tolist(),
        column=column,
        fix="write every row in one of the two ways",
    )


def _too_few_times(rows: LabelledRows, column: str, moments: int, wanted: int) -> Finding:
    return row_finding(
        code="invalid_time",
        severity="error",
        message=f"column {column!r} has {moments} different times, too few for {wanted} sides: rows of one time stay "
        "together",
        rows=rows.row_numbers.tolist(),
        column=column,
        fix="give finer times, or choose another split.strategy",
    )
