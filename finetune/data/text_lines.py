"""The lines of a UTF-8 text file. Knows bytes, encodings and line length; csv and jsonl read through it."""

from __future__ import annotations

from typing import BinaryIO

from finetune.data.record_batches import FindingLog, Limits

_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_SAVE_AS_UTF8 = "save the whole file as UTF-8"


class Utf8Lines:
    """Iterates over decoded lines, line ends kept, and files what is wrong with one under `row`.

    The caller sets `row` before it asks for a line, and reads and resets `is_damaged` after it. A
    damaged line is still yielded (decoded with replacement marks), so that rows keep their numbers.
    """

    def __init__(self, stream: BinaryIO, log: FindingLog, limits: Limits) -> None:
        self._stream = stream
        self._log = log
        self._limits = limits
        self._offset = 0
        self.row = 0
        self.is_damaged = False

    def __iter__(self) -> Utf8Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self._limits.row_bytes + 1)
        if not line:
            raise StopIteration
        offset = self._offset
        self._offset += len(line)
        if offset == 0 and line.startswith(_BOM):
            line, offset = line[len(_BOM) :], len(_BOM)
        if len(line) > self._limits.row_bytes:
            return self._skip_long_line()
        if b"\0" in line:
            self._damage("NUL", "holds a NUL byte", fix="remove the NUL bytes, or export the file again as text")
        return self._decode(line, offset)

    def _decode(self, line: bytes, offset: int) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            at = offset + error.start
            what = f"has byte 0x{line[error.start]:02x} at offset {at} of the file, which is not UTF-8"
            self._damage("encoding", what + _guess(line[error.start]), code="encoding", fix=_SAVE_AS_UTF8)
            return line.decode("utf-8", "replace")

    def _skip_long_line(self) -> str:
        what = f"has a line longer than {self._limits.row_bytes:,} bytes"
        self._damage("long line", what, fix="check the line ends of the file, and shorten the row")
        while rest := self._stream.readline(self._limits.row_bytes):
            self._offset += len(rest)
            if rest.endswith(b"\n"):
                break
        return "\n"

    def _damage(self, kind: str, what: str, *, fix: str, code: str = "parse_error") -> None:
        self.is_damaged = True
        where = f"row {self.row}" if self.row > 0 else "the header"
        self._log.note(kind, f"{where} {what}", code=code, row=self.row, fix=fix)


def wide_encoding(first_bytes: bytes) -> str | None:
    """The name of a 16-bit encoding that the file announces, or None."""
    return _WIDE_BOMS.get(first_bytes[:2])


def note_wide_encoding(log: FindingLog, encoding: str) -> None:
    message = f"the file is {encoding} (from its first two bytes, at offset 0), not UTF-8"
    log.note("encoding", message, code="encoding", fix=_SAVE_AS_UTF8)


def note_bad_byte(log: FindingLog, where: str, error: UnicodeDecodeError, *, row: int, column: str) -> None:
    byte = error.object[error.start]
    message = f"{where} has byte 0x{byte:02x} at offset {error.start}, which is not UTF-8{_guess(byte)}"
    log.note("encoding", message, code="encoding", row=row, column=column, fix=_SAVE_AS_UTF8)


def _guess(byte: int) -> str:
    # 0x80-0x9f are control characters in Latin-1 and mostly punctuation in Windows-1252, which people mean.
    character = bytes([byte]).decode("cp1252", "ignore")
    return f" ({character!r} if that part was written as Windows-1252)" if character else ""
