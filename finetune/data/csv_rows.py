"""Rows of a csv file, through the standard library's parser in strict mode.

Knows delimiters, quotes and ragged rows. Strict, because the lenient mode takes a quote that is never
closed for one cell up to the end of the file and says nothing.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from finetune.data.record_batches import NOTHING, FindingLog, Limits, RowSource, table, unnamed_column
from finetune.data.text_lines import TextFile, Utf8Lines

_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Excel's first line for a delimiter of its own
_STATED = re.compile(rb"(?:\xef\xbb\xbf)?\"?sep=([,;\t|])\"?[ ,;\t]*\r?\n", re.IGNORECASE)
_SAMPLE_BYTES, _SAMPLE_RECORDS = 256 * 1024, 100


@contextlib.contextmanager
def open_csv(path: Path, log: FindingLog, limits: Limits) -> Iterator[RowSource]:
    csv.field_size_limit(limits.cell_bytes)  # in characters; process-wide, and the default is below our limit
    text = TextFile.look(path, log)
    if text is None:
        yield NOTHING
        return
    with text.open() as stream:
        sample = stream.read(_SAMPLE_BYTES)
    stated = _STATED.match(sample)
    delimiter = stated[1].decode() if stated else _delimiter(sample)
    if delimiter in _OTHER_DELIMITERS:
        message = f"the columns are separated by {_OTHER_DELIMITERS[delimiter]}"
        log.note("delimiter", message, severity="info", fix="nothing to do, or save with commas")
    with text.open() as stream:
        if stated:
            stream.readline()
        reader = _CsvRows(Utf8Lines(stream, log, limits), delimiter, log, limits)
        header = reader.header()
        yield NOTHING if header is None else table(header, reader.rows(header), log, limits)


class _CsvRows:
    def __init__(self, lines: Utf8Lines, delimiter: str, log: FindingLog, limits: Limits) -> None:
        self._lines = lines
        self._parser = csv.reader(lines, delimiter=delimiter, strict=True)
        self._log = log
        self._limits = limits

    def header(self) -> tuple[str, ...] | None:
        """The column names, or None where there is no usable header."""
        fields = self._next_record()
        if fields is None or self._lines.is_damaged:
            return None
        return tuple(name.strip() or unnamed_column(place, self._log) for place, name in enumerate(fields, 1))

    def rows(self, header: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        while True:
            self._lines.row += 1
            fields = self._next_record()
            if fields is None:
                return
            if not self._lines.is_damaged and self._has_all_fields(fields, header):
                yield self._lines.row, fields

    def _next_record(self) -> list[str] | None:
        """The next record, empty where it could not be parsed; None at the end of what can be read."""
        self._lines.is_damaged = False
        try:
            for fields in self._parser:
                if fields or self._lines.is_damaged:
                    return fields
        except csv.Error as error:
            return self._after_error(str(error))
        return None

    def _after_error(self, reason: str) -> list[str] | None:
        row = self._lines.row
        where = f"row {row}" if row > 0 else "the header"
        is_too_large = "field limit" in reason
        if is_too_large:
            # What follows would be parsed from the middle of a cell: every later row would be wrong too.
            message = f"{where} has a cell larger than {self._limits.cell_bytes:,} bytes; reading stopped there"
            fix = "shorten the cell; if it is not long, a double quote before it is never closed"
        elif "new-line character" in reason:
            message = f"{where} has a carriage return alone, outside of double quotes, where other lines end otherwise"
            fix = "save the file with one kind of line end, or put cells with a carriage return in double quotes"
        else:
            message = f"{where} cannot be parsed: {reason}"
            fix = 'put cells with quotes, commas or line breaks in double quotes, and double the quotes inside: ""'
        self._log.note("huge cell" if is_too_large else "csv syntax", message, row=row, fix=fix)
        self._lines.is_damaged = True
        return None if is_too_large else []

    def _has_all_fields(self, fields: Sequence[str], header: Sequence[str]) -> bool:
        if len(fields) == len(header):
            return True
        message = f"row {self._lines.row} has {_fields(len(fields))}, the header has {len(header)}"
        fix = "give every row as many fields as the header; put cells with commas in double quotes"
        self._log.note("ragged", message, row=self._lines.row, fix=fix)
        return False


def _fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"


def _delimiter(sample: bytes) -> str:
    """The one that divides the header, and the most records into as many fields; a comma if several do, or none."""
    text = sample.decode("utf-8", "replace").removeprefix("\ufeff")
    if len(sample) == _SAMPLE_BYTES:
        text = text[: text.rfind("\n") + 1] or text  # without the record that the sample ends in
    agreeing = {delimiter: _agreeing(text, delimiter) for delimiter in (",", *_OTHER_DELIMITERS)}
    return max(agreeing, key=lambda delimiter: agreeing[delimiter])


def _agreeing(text: str, delimiter: str) -> int:
    """How many records, the header among them, have as many fields as it; 0 if it has one field."""
    parser = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    sizes = []
    with contextlib.suppress(csv.Error):
        for fields in islice(parser, _SAMPLE_RECORDS):
            if fields:
                sizes.append(len(fields))
    return sum(size == sizes[0] for size in sizes) if sizes and sizes[0] > 1 else 0
