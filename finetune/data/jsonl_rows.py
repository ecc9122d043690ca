"""Rows of a jsonl file: one object a line, of scalars and lists of them. Numbers keep the digits they were written
with; a list of strings or numbers becomes the JSON of its strings, for rows that have several labels.

The file is read twice: columns may first appear in the last line, and a table needs them at its start.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.record_batches import NOTHING, FindingLog, Limits, RowSource, table
from finetune.data.spellings import list_items
from finetune.data.text_lines import TextFile, Utf8Lines

Row = dict[str, str | None]


class _Refused(ValueError):
    """A line that is JSON but not a row."""

    def __init__(self, kind: str, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.fix = fix


@contextlib.contextmanager
def open_jsonl(path: Path, log: FindingLog, limits: Limits) -> Iterator[RowSource]:
    text = TextFile.look(path, log)
    if text is None:
        yield NOTHING
        return
    columns = _column_names(text, limits)
    with text.open() as stream:
        found = _rows(Utf8Lines(stream, log, limits), log)
        rows = ((number, [row.get(name) for name in columns]) for number, row in found)
        yield table(columns, rows, log, limits)


def _column_names(text: TextFile, limits: Limits) -> tuple[str, ...]:
    names: dict[str, None] = {}
    with text.open() as stream:
        log = FindingLog()  # the second reading reports
        for _, row in islice(_rows(Utf8Lines(stream, log, limits), log), limits.rows):
            names.update(dict.fromkeys(row))
            if len(names) > limits.columns:
                break
    return tuple(names)


def _rows(lines: Utf8Lines, log: FindingLog) -> Iterator[tuple[int, Row]]:
    """Line numbers and rows; blank and bad lines are left out."""
    while True:
        lines.row += 1
        lines.is_damaged = False
        line = next(lines, None)
        if line is None:
            return
        if lines.is_damaged or not line.strip():
            continue
        row = _parse(line, lines.row, log)
        if row is not None:
            yield lines.row, row


def _parse(line: str, number: int, log: FindingLog) -> Row | None:
    try:
        return _as_row(_DECODER.decode(line.strip()))
    except _Refused as refused:
        log.note(refused.kind, f"line {number} {refused}", row=number, fix=refused.fix)
    except json.JSONDecodeError as error:
        message = f"line {number} is not JSON: {error.msg} at character {error.colno}"
        log.note("json syntax", message, row=number, fix='write one JSON object on each line: {"text": …, "label": …}')
    except RecursionError:
        log.note("nested", f"line {number} is nested too deeply", row=number, fix=_FLATTEN)
    return None


def _as_row(value: Any) -> Row:
    # Objects arrive as tuples of pairs (see _DECODER), so that a key given twice is still there twice.
    if not isinstance(value, tuple):
        raise _Refused("not an object", "is JSON but not an object", 'write one object on each line, {"text": …}')
    row: Row = {}
    for name, cell in value:
        if name in row:
            raise _Refused("duplicate key", f"has the key {name[:80]!r} twice", "keep one of the two values")
        row[name] = _as_cell(name, cell)
    return row


def _as_cell(name: str, cell: Any) -> str | None:
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, list) and (items := list_items(cell)) is not None:
        return json.dumps(items, ensure_ascii=False)
    what = f"has an object or a nested list under {name[:80]!r}; a cell must be a single value or a list of values"
    raise _Refused("nested", what, _FLATTEN)


def _refuse_constant(constant: str) -> None:
    raise _Refused("not a number", f"holds {constant}, which is not JSON", "write null, or leave the key out")


_FLATTEN = "give every key one string, number, boolean or null, or a list of them"
_DECODER = json.JSONDecoder(
    object_pairs_hook=tuple, parse_float=str, parse_int=str, parse_constant=_refuse_constant, strict=True
)
