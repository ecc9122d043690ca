"""Rows of a workbook's first sheet that has any, through openpyxl, one row at a time.

Cells are text as in the other formats: dates in ISO 8601, whole numbers without a point, formulas as the values that
were saved with them. The file is a zip: how much may come out of it is checked before anything does.
"""

from __future__ import annotations

import contextlib
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from finetune.data.archive import is_bounded_zip
from finetune.data.record_batches import NOTHING, FindingLog, Limits, RowSource, table, unnamed_column

_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, ParseError, EOFError, NotImplementedError),
    *(KeyError, IndexError, ValueError, TypeError, AttributeError),  # of parts that contradict each other
)
_ERRORS = frozenset({"#DIV/0!", "#N/A", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!"})
_LOOKED_AT = 10_000  # rows in which a sheet's first value is looked for
_SAVE_AGAIN = "save the workbook again as .xlsx, or the sheet as CSV UTF-8"


@contextlib.contextmanager
def open_xlsx(path: Path, log: FindingLog, limits: Limits) -> Iterator[RowSource]:
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # of styles and extensions, which are not read
        if not is_bounded_zip(path, log, limits):
            yield NOTHING
            return
        source = NOTHING
        with _damage_noted(log):
            workbook = _opened(stack, path)
            sheet = _sheet(workbook, log)
            source = NOTHING if sheet is None else _source(sheet, log, limits)
        yield source


@contextlib.contextmanager
def _damage_noted(log: FindingLog) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise  # the machine's; openpyxl's own has no number
        log.note("workbook", f"the file is no workbook: {error}", fix=_SAVE_AGAIN)
    except _DAMAGE as error:
        what = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        log.note("workbook", f"the workbook is damaged: {what}", fix=_SAVE_AGAIN)


def _opened(stack: contextlib.ExitStack, path: Path) -> Any:
    from openpyxl import load_workbook

    stream = stack.enter_context(path.open("rb"))
    workbook = load_workbook(stream, read_only=True, data_only=True, keep_links=False)
    stack.callback(workbook.close)
    return workbook


def _sheet(workbook: Any, log: FindingLog) -> Any:
    """The first visible sheet with a value; the others with one are told."""
    filled = []
    for sheet in workbook.worksheets:
        if sheet.sheet_state == "visible":
            sheet.reset_dimensions()  # some writers state a wrong size
            if any(_has_value(row) for row in sheet.iter_rows(values_only=True, max_row=_LOOKED_AT)):
                filled.append(sheet)
    if not filled:
        log.note("empty", "the workbook has no sheet with rows", fix="upload a workbook with a header and rows")
        return None
    if len(filled) > 1:
        others = ", ".join(repr(sheet.title[:60]) for sheet in filled[1:6])
        message = f"of {len(filled)} sheets only {filled[0].title[:60]!r} was read, not {others}"
        fix = "nothing to do, or upload the other sheets as workbooks or csv files of their own"
        log.note("sheets", message, severity="warning", fix=fix)
    return filled[0]


def _source(sheet: Any, log: FindingLog, limits: Limits) -> RowSource:
    rows = enumerate(sheet.iter_rows(values_only=True), 1)
    header = next((values for _, values in rows if _has_value(values)), ())
    names = _names(header, log)
    return table(names, _rows(rows, len(names), log), log, limits)


def _names(header: Sequence[Any], log: FindingLog) -> tuple[str, ...]:
    """Those up to the last cell with a value."""
    cells = [(_text(value) or "").strip() for value in header]
    width = max(place for place, cell in enumerate(cells, 1) if cell)
    return tuple(cell or unnamed_column(place, log) for place, cell in enumerate(cells[:width], 1))


def _rows(
    rows: Iterator[tuple[int, Sequence[Any]]], width: int, log: FindingLog
) -> Iterator[tuple[int, list[str | None]]]:
    """Rows with a value, under the sheet's own numbers."""
    with _damage_noted(log):
        for number, values in rows:
            if not _has_value(values):
                continue
            if _has_value(values[width:]):
                message = f"row {number} has values beside the columns of the header, which are left out"
                log.note("beside", message, severity="warning", row=number, fix="name their columns in the header")
            cells = [_text(value) for value in values[:width]]
            if failed := _ERRORS.intersection(cells):
                message = f"row {number} holds {min(failed)}, the error of a formula, which counts as no value"
                log.note(
                    "error", message, severity="warning", row=number, fix="correct the formula, or leave the cell empty"
                )
                cells = [None if cell in _ERRORS else cell for cell in cells]
            yield number, cells + [None] * (width - len(cells))


def _has_value(values: Sequence[Any]) -> bool:
    return any(value is not None and value != "" for value in values)


def _text(value: Any) -> str | None:
    match value:
        case None:
            return None
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer() and abs(value) < 2**53:
            return str(int(value))
        case datetime() if value.time() == time():
            return value.date().isoformat()
        case datetime() | date() | time():
            return value.isoformat()
        case _:
            return str(value)
