"""Rows of JSON: of a jsonl file with one object a line, or of an array of objects. An object has scalars and lists of
them. Numbers keep the digits they were written with; a list of strings or numbers becomes the JSON of its strings, for
rows that have several labels. What annotation tools write becomes a text and its spans (`annotated`).

The file is read twice: columns may first appear in the last row, and a table needs them at its start.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.annotated import Annotations
from finetune.data.record_batches import NOTHING, FindingLog, Limits, RowSource, table
from finetune.data.spellings import list_items
from finetune.data.text_lines import TextFile, Utf8Lines

Row = dict[str, str | None]
Read = Callable[[BinaryIO, FindingLog, Limits], Iterator[tuple[int, Row]]]
"""Rows with their numbers, out of a stream of UTF-8."""


class _Refused(ValueError):
    """A line that is JSON but not a row."""

    def __init__(self, kind: str, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.fix = fix


def open_jsonl(path: Path, log: FindingLog, limits: Limits) -> contextlib.AbstractContextManager[RowSource]:
    return open_objects(path, log, limits, _rows)


def open_json(path: Path, log: FindingLog, limits: Limits) -> contextlib.AbstractContextManager[RowSource]:
    """An array of objects, whatever its lines."""
    return open_objects(path, log, limits, _items)


@contextlib.contextmanager
def open_objects(path: Path, log: FindingLog, limits: Limits, read: Read) -> Iterator[RowSource]:
    """The table of the rows that `read` finds in a text file; it is read twice."""
    text = TextFile.look(path, log)
    if text is None:
        yield NOTHING
        return
    columns = _column_names(text, limits, read)
    with text.open() as stream:
        found = read(stream, log, limits)
        rows = ((number, [row.get(name) for name in columns]) for number, row in found)
        yield table(columns, rows, log, limits)


def _column_names(text: TextFile, limits: Limits, read: Read) -> tuple[str, ...]:
    names: dict[str, None] = {}
    with text.open() as stream:
        # The second reading reports.
        for _, row in islice(read(stream, FindingLog(), limits), limits.rows):
            names.update(dict.fromkeys(row))
            if len(names) > limits.columns:
                break
    return tuple(names)


def _rows(stream: BinaryIO, log: FindingLog, limits: Limits) -> Iterator[tuple[int, Row]]:
    """Line numbers and rows; blank and bad lines are left out."""
    lines, annotations = Utf8Lines(stream, log, limits), Annotations(log)
    while True:
        lines.row += 1
        lines.is_damaged = False
        line = next(lines, None)
        if line is None:
            break
        if lines.is_damaged or not line.strip():
            continue
        row = _parse(line, lines.row, log, annotations)
        if row is not None:
            yield lines.row, row
    annotations.tell()


def _items(stream: BinaryIO, log: FindingLog, limits: Limits) -> Iterator[tuple[int, Row]]:
    """The places in the array, from 1, and rows. Reading ends where the text is no JSON."""
    annotations, number = Annotations(log), 0
    try:
        for number, value in enumerate(_values(stream, limits), 1):
            row = _refused_or_row(value, f"item {number}", number, log, annotations)
            if row is not None:
                yield number, row
    except ValueError as error:
        fix = "write an array of objects, [{…}, {…}]; or one object on each line, and call the file .jsonl"
        log.note("json syntax", f"item {number + 1} is not JSON: {error}", row=number + 1, fix=fix)
    annotations.tell()


def _values(stream: BinaryIO, limits: Limits) -> Iterator[Any]:
    """The items of an array, one in memory at a time. Raises `ValueError`."""
    reader = codecs.getreader("utf-8")(stream)
    held, is_over, size = reader.read(_CHUNK).removeprefix("\ufeff").lstrip()[1:], False, _CHUNK
    while True:
        held = held.lstrip(" \t\r\n,")
        if held.startswith("]"):
            return
        try:
            value, end = _DECODER.raw_decode(held)
            if end == len(held) and not is_over and not isinstance(value, tuple):
                raise json.JSONDecodeError("the item goes on", held, end)
        except json.JSONDecodeError as error:
            if is_over:
                raise ValueError("the file ends within it" if not held else f"{error.msg}") from error
            if len(held) > limits.row_bytes:
                raise ValueError(f"it is larger than {limits.row_bytes:,} bytes, or {error.msg}") from error
            more = reader.read(size)
            is_over, held, size = not more, held + more, min(2 * size, limits.row_bytes)
            continue
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        yield value
        held = held[end:]


def _parse(line: str, number: int, log: FindingLog, annotations: Annotations) -> Row | None:
    try:
        return _refused_or_row(_DECODER.decode(line.strip()), f"line {number}", number, log, annotations)
    except _Refused as refused:  # by the decoder
        log.note(refused.kind, f"line {number} {refused}", row=number, fix=refused.fix)
    except json.JSONDecodeError as error:
        message = f"line {number} is not JSON: {error.msg} at character {error.colno}"
        log.note("json syntax", message, row=number, fix='write one JSON object on each line: {"text": …, "label": …}')
    except RecursionError:
        log.note("nested", f"line {number} is nested too deeply", row=number, fix=_FLATTEN)
    return None


def _refused_or_row(value: Any, where: str, number: int, log: FindingLog, annotations: Annotations) -> Row | None:
    try:
        return _as_row(value, number, annotations)
    except _Refused as refused:
        log.note(refused.kind, f"{where} {refused}", row=number, fix=refused.fix)
    return None


def _as_row(value: Any, number: int, annotations: Annotations) -> Row | None:
    # Objects arrive as tuples of pairs (see _DECODER), so that a key given twice is still there twice.
    if not isinstance(value, tuple):
        raise _Refused("not an object", "is JSON but not an object", 'write one object on each line, {"text": …}')
    cells: dict[str, Any] = {}
    for name, cell in value:
        if name in cells:
            raise _Refused("duplicate key", f"has the key {name[:80]!r} twice", "keep one of the two values")
        cells[name] = cell
    if any(isinstance(cell, list | tuple) for cell in cells.values()):
        found = annotations.read(number, {name: _plain(cell) for name, cell in cells.items()})
        if found is None:
            return None
        cells = found
    return {name: _as_cell(name, cell) for name, cell in cells.items()}


def _plain(value: Any) -> Any:
    """Objects as dicts, at any depth."""
    if isinstance(value, tuple):
        return {name: _plain(own) for name, own in value}
    return [_plain(own) for own in value] if isinstance(value, list) else value


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


_CHUNK = 1 << 20
_FLATTEN = "give every key one string, number, boolean or null, or a list of them"
_DECODER = json.JSONDecoder(
    object_pairs_hook=tuple, parse_float=str, parse_int=str, parse_constant=_refuse_constant, strict=True
)
