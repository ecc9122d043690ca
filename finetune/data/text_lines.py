"""The lines of a text file, whatever its encoding and line ends. Knows bytes, encodings and line length; csv and jsonl
read through it.

UTF-8 is read as it is. UTF-16 and UTF-32 are known by their marks or, without, by the zeros of their first characters.
Bytes that are no UTF-8 throughout are Windows-1252 if they look like it. All three become UTF-8 on the way, and a
finding says so; mixtures stay UTF-8 with rows that cannot be read.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from finetune.data.record_batches import FindingLog, Limits
from finetune.data.records import Severity

_BOM = codecs.BOM_UTF8
_WIDE_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark begins alike
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_SAVE_AS_UTF8 = "save the whole file as UTF-8"
_CHUNK = 1 << 20
_ASCII_UNITS = 4  # at the start of UTF-16 without a mark: the header, or a bracket and a name
_HIGH = bytes(range(0x80, 0x100))
_UNDEFINED = b"\x81\x8d\x8f\x90\x9d"  # in Windows-1252
_LETTERS = bytes([*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)])
_MOST_HIGH = 0.4  # of the letters: above, it is another script in another encoding
_BROKEN = re.compile(rb"[\xc2-\xf4][\x80-\xbf]+")  # looks like a character of UTF-8 that was cut


@dataclass(frozen=True, slots=True)
class TextFile:
    """A text file whose spelling is known. `encoding` is utf-8 for what is read as it is."""

    path: Path
    encoding: str = "utf-8"
    is_cr_only: bool = False

    @classmethod
    def look(cls, path: Path, log: FindingLog) -> TextFile | None:
        """Tell how the file is spelled; None, with an error in the log, if it cannot be read."""
        with path.open("rb") as stream:
            head = stream.read(64)
            stream.seek(0)
            wide = wide_encoding(head)
            found = _Spelling.of(stream, wide or "utf-8", head.startswith(_BOM))
        if wide is not None and found.error is not None:
            message = f"the file is {_name(wide)} by its first bytes, and byte {found.error:,} does not fit that"
            log.note("encoding", message, code="encoding", fix=_SAVE_AS_UTF8)
            return None
        encoding = wide or found.encoding
        if encoding != "utf-8":
            _tell(log, encoding, is_guess=encoding == "cp1252")
        if found.is_cr_only:
            message = "the lines end with a carriage return alone; each was read as a line end"
            log.note("line ends", message, severity="info", fix="nothing to do, or save with \\n or \\r\\n")
        return cls(path, encoding, found.is_cr_only)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes as UTF-8 with line ends of \\n."""
        with self.path.open("rb") as stream:
            if self.encoding == "utf-8" and not self.is_cr_only:
                yield stream
            else:
                yield io.BufferedReader(_AsUtf8(stream, self.encoding, self.is_cr_only), _CHUNK)


@dataclass(slots=True)
class _Spelling:
    """What a look at all bytes shows: the encoding without a mark, the byte that does not fit a mark, line ends."""

    encoding: str = "utf-8"
    error: int | None = None
    is_cr_only: bool = False

    @classmethod
    def of(cls, stream: BinaryIO, encoding: str, has_mark: bool) -> _Spelling:
        found, counts = cls(), _HighBytes()
        decoder = codecs.getincrementaldecoder(encoding)("surrogateescape" if encoding == "utf-8" else "strict")
        at, has_cr, has_lf = 0, False, False
        while True:
            chunk = stream.read(_CHUNK)
            try:
                text = decoder.decode(chunk, not chunk)
            except UnicodeDecodeError as error:
                found.error = at + error.start
                return found
            if encoding == "utf-8":
                counts.add(chunk, text)
            has_cr, has_lf, at = has_cr or "\r" in text, has_lf or "\n" in text, at + len(chunk)
            if not chunk:
                break
        found.is_cr_only = has_cr and not has_lf
        if not has_mark and counts.look_like_windows():
            found.encoding = "cp1252"
        return found


@dataclass(slots=True)
class _HighBytes:
    """Counts of the bytes above ASCII in what should be UTF-8: those in its characters, and the others."""

    fitting: int = 0
    misfits: int = 0
    broken: int = 0
    undefined: int = 0
    high: int = 0
    letters: int = 0

    def add(self, chunk: bytes, text: str) -> None:
        self.letters += len(chunk) - len(chunk.translate(None, _LETTERS))
        if text.isascii():
            return
        sound = text.encode("utf-8", "ignore").decode()
        bad = len(text) - len(sound)
        self.misfits += bad
        self.fitting += len(sound) - len(sound.encode("ascii", "ignore"))
        self.undefined += sum(map(chunk.count, (bytes([one]) for one in _UNDEFINED)))
        self.high += len(chunk) - len(chunk.translate(None, _HIGH))
        if bad:
            escaped = re.sub("[^\udc80-\udcff]+", " ", text)
            self.broken += sum(map(len, _BROKEN.findall(escaped.encode("utf-8", "surrogateescape"))))

    def look_like_windows(self) -> bool:
        """Hardly any byte fits UTF-8 or is half of it, all mean something, and letters are mostly ASCII."""
        if not self.misfits or self.undefined or self.fitting * 10 > self.misfits:
            return False
        return self.broken * 2 <= self.misfits and self.high <= _MOST_HIGH * (self.high + self.letters)


class _AsUtf8(io.RawIOBase):
    """Bytes of another encoding as UTF-8, bit by bit."""

    def __init__(self, source: BinaryIO, encoding: str, is_cr_only: bool) -> None:
        self._source, self._is_cr_only = source, is_cr_only
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape" if encoding == "utf-8" else "strict")
        self._left, self._is_over = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._left and not self._is_over:
            chunk = self._source.read(_CHUNK)
            text = self._decoder.decode(chunk, not chunk)
            self._is_over = not chunk
            text = text.replace("\r", "\n") if self._is_cr_only else text
            self._left = text.encode("utf-8", "surrogateescape")
        piece = self._left[: len(buffer)]
        self._left = self._left[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)


def _tell(log: FindingLog, encoding: str, *, is_guess: bool) -> None:
    if is_guess:
        message = "the file is not UTF-8; it was read as Windows-1252, which its bytes look like"
        fix = "look at the preview; if words are wrong, save the file as UTF-8"
        log.note("read as", message, code="encoding", severity="warning", fix=fix)
    else:
        message = f"the file is {_name(encoding)}, and was read as such"
        log.note("read as", message, code="encoding", severity="info", fix="nothing to do, or save as UTF-8")


def _name(encoding: str) -> str:
    return encoding.upper().removesuffix("-LE").removesuffix("-BE")


def decoded(raw: bytes) -> tuple[str, str]:
    """A whole text and its encoding: UTF-8, a wide one, or Windows-1252. Raises `UnicodeDecodeError`."""
    wide = wide_encoding(raw)
    if wide is not None:
        return raw.decode(wide).removeprefix("\ufeff"), wide
    found = _Spelling.of(io.BytesIO(raw), "utf-8", raw.startswith(_BOM))
    return raw.removeprefix(_BOM).decode(found.encoding), found.encoding


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
            self._damage(
                "NUL", "holds a NUL byte", fix="remove the NUL bytes, or, if the file is UTF-16, save it as UTF-8"
            )
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
    """The encoding of 16 or 32 bits that a file begins in, by its mark or by the zeros of ASCII characters, or None."""
    marked = next((name for mark, name in _WIDE_BOMS.items() if first_bytes.startswith(mark)), None)
    if marked is not None or len(first_bytes) < 2 * _ASCII_UNITS:
        return marked
    units = first_bytes[: 2 * _ASCII_UNITS]
    even, odd = units[::2], units[1::2]
    if not any(odd) and all(even):
        return "utf-16-le"
    return "utf-16-be" if not any(even) and all(odd) else None


def note_read_as(log: FindingLog, encoding: str, *, row: int, column: str) -> None:
    """Files of an archive that were not UTF-8."""
    name = "Windows-1252" if encoding == "cp1252" else _name(encoding)
    message = f"files of the archive are {name}, not UTF-8, and were read as such"
    fix = "look at the preview; if words are wrong, save the files as UTF-8"
    severity: Severity = "warning" if encoding == "cp1252" else "info"
    log.note(f"read as {name}", message, code="encoding", severity=severity, row=row, column=column, fix=fix)


def note_bad_byte(log: FindingLog, where: str, error: UnicodeDecodeError, *, row: int, column: str) -> None:
    byte = error.object[error.start]
    message = f"{where} has byte 0x{byte:02x} at offset {error.start}, which is not UTF-8{_guess(byte)}"
    log.note("encoding", message, code="encoding", row=row, column=column, fix=_SAVE_AS_UTF8)


def _guess(byte: int) -> str:
    # 0x80-0x9f are control characters in Latin-1 and mostly punctuation in Windows-1252, which people mean.
    character = bytes([byte]).decode("cp1252", "ignore")
    return f" ({character!r} if that part was written as Windows-1252)" if character else ""
