"""Rows of JSON: of a jsonl file with one object a line, or of an array of objects. An object has scalars and lists of
them. Numbers keep the digits they were written with; a list of strings or numbers becomes the JSON of its strings, for
rows that have several labels. What annotation tools write becomes a text and its spans (`annotated`).

The file is read twice: columns may first appear in the last row, and a table needs them at its start.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.annotated import Annotations
from finetune.data.record_batches import NOTHING, FindingLog, Limits, RowSource, table
from finetune.data.spellings import list_items
from finetune.data.text_lines import TextFile, Utf8Lines

Row = dict[str, str | None]
Read = Callable[[BinaryIO, FindingLog, Limits, Annotations], Iterator[tuple[int, Row]]]
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
    known = Annotations(FindingLog())  # the second reading reports
    columns = _column_names(text, limits, read, known)
    with text.open() as stream:
        found = read(stream, log, limits, Annotations(log, known))
        rows = ((number, [row.get(name) for name in columns]) for number, row in found)
        yield table(columns, rows, log, limits)


def _column_names(text: TextFile, limits: Limits, read: Read, annotations: Annotations) -> tuple[str, ...]:
    names: dict[str, None] = {}
    with text.open() as stream:
        for _, row in islice(read(stream, FindingLog(), limits, annotations), limits.rows):
            names.update(dict.fromkeys(row))
            if len(names) > limits.columns:
                break
    return tuple(annotations.settled(names))


def _rows(stream: BinaryIO, log: FindingLog, limits: Limits, annotations: Annotations) -> Iterator[tuple[int, Row]]:
    """Line numbers and rows; blank and bad lines are left out."""
    lines = Utf8Lines(stream, log, limits)
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


def _items(stream: BinaryIO, log: FindingLog, limits: Limits, annotations: Annotations) -> Iterator[tuple[int, Row]]:
    """The places in the array, from 1, and rows. Reading ends where the text is no JSON."""
    number = 0
    try:
        for number, value in enumerate(_values(stream, limits), 1):
            row = _refused_or_row(value, f"item {number}", number, log, annotations)
            if row is not None:
                yield number, row
    except ValueError as error:
        fix = "write an array of objects, [{…}, {…}]; or one object on each line, and call the file .jsonl"
        log.note("json syntax", f"item {number + 1} is not JSON: {error}", row=number + 1, fix=fix)
    except RecursionError:
        log.note("nested", f"item {number + 1} is nested too deeply", row=number + 1, fix=_FLATTEN)
    annotations.tell()


def _values(stream: BinaryIO, limits: Limits) -> Iterator[Any]:
    """The items of an array, one in memory at a time. Raises `ValueError`, `RecursionError`."""
    text = _Ahead(codecs.getreader("utf-8")(stream))
    text.expect("[")
    if text.follows("]"):
        text.expect("]")
    else:
        while True:
            yield text.value(limits.row_bytes)
            if not text.follows(","):
                break
            text.expect(",")
        text.expect("]")
    if text.follows(""):
        raise ValueError("there is more behind the end of the array")


class _Ahead:
    """The text of a stream from where it was read to, as far as it was needed."""

    def __init__(self, reader: codecs.StreamReader) -> None:
        self._reader, self._held, self._at, self._is_over = reader, "", 0, False
        self._more(_CHUNK)
        self._held = self._held.removeprefix("\ufeff")

    def follows(self, sign: str) -> bool:
        """Whether this comes next, blanks aside; of none, whether anything does."""
        while True:
            match = _BLANKS.match(self._held, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._held) or self._is_over:
                return self._at < len(self._held) and self._held.startswith(sign, self._at)
            self._more(_CHUNK)

    def expect(self, sign: str) -> None:
        if not self.follows(sign):
            there = self._held[self._at : self._at + 1]
            raise ValueError(f"there is {there!r} in the place of {sign!r}" if there else "the file ends within it")
        self._at += len(sign)

    def value(self, most: int) -> Any:
        """The JSON value that comes next."""
        if not self.follows(""):
            raise ValueError("the file ends within it")
        while True:
            left = len(self._held) - self._at
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
                if end < len(self._held) or self._is_over or isinstance(value, tuple):
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._is_over:
                    raise ValueError(error.msg) from error
                if left > most:
                    raise ValueError(f"it is larger than {most:,} bytes, or {error.msg}") from error
            self._more(max(_CHUNK, left))  # so that a large one is tried a few times only

    def _more(self, size: int) -> None:
        found = self._reader.read(size)
        self._held, self._at, self._is_over = self._held[self._at :] + found, 0, not found


def _parse(line: str, number: int, log: FindingLog, annotations: Annotations) -> Row | None:
    try:
        return _refused_or_row(_DECODER.decode(line.strip()), f"line {number}", number, log, annotations)
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
    for cell in cells.values():
        _refuse_constants(cell)
    if annotations.concerns(cells):
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


class _Constant(str):
    """NaN or an infinity, which Python's decoder takes for JSON."""


def _refuse_constants(value: Any) -> None:
    if isinstance(value, _Constant):
        raise _Refused("not a number", f"holds {value}, which is not JSON", "write null, or leave the key out")
    for own in value if isinstance(value, list | tuple) else ():
        _refuse_constants(own)


_CHUNK = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")
_FLATTEN = "give every key one string, number, boolean or null, or a list of them"
_DECODER = json.JSONDecoder(
    object_pairs_hook=tuple, parse_float=str, parse_int=str, parse_constant=_Constant, strict=True
)
