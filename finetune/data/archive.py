"""Uploaded archives (zip, tar, tar.gz) as named streams, with every door closed.

Nothing is written under a name from the archive, every byte that comes out is counted against limits, and
an entry that looks like an attack ends the reading with the finding `archive_unsafe`. Knows no layout.
Images would come through here too: an entry is a name and a stream, whatever is in it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Literal, Protocol

from finetune.data.record_batches import FindingLog, Limits

ArchiveFormat = Literal["zip", "tar"]

_CHUNK = 1 << 16
_NAME_CHARACTERS = 1024
_DEPTH = 16
_NESTED = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_NESTED_MAGICS = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    struct.error,
    NotImplementedError,
)


class ArchiveRefused(Exception):
    """The archive, or one entry, is damaged or looks like an attack; already in the log."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in an archive. `number` counts the files from 1 in the archive's order."""

    number: int
    name: str
    path: PurePosixPath


class Archive(Protocol):
    """Reads twice at most: a look at the names, then the contents in any order the format gives."""

    def names(self) -> Iterator[Entry]: ...
    def contents(self) -> Iterator[tuple[Entry, IO[bytes]]]: ...


@contextlib.contextmanager
def open_archive(path: Path, kind: ArchiveFormat, log: FindingLog, limits: Limits) -> Iterator[Archive]:
    """The archive. Whatever reads from it does so inside `refusals`."""
    with path.open("rb") as stream:
        budget = _Budget(path.stat().st_size, log, limits)
        yield _Zip(stream, budget) if kind == "zip" else _Tar(stream, budget)


def is_bounded_zip(path: Path, log: FindingLog, limits: Limits) -> bool:
    """Whether a zip that another library reads unpacks to no more than an archive may, by sizes that `zipfile` does not
    read beyond. If not, the finding is in the log."""
    with refusals(log), path.open("rb") as stream:
        budget = _Budget(path.stat().st_size, log, limits)
        for name, size in _Zip(stream, budget).sizes():
            budget.spend(name, size)
        return True
    return False


@contextlib.contextmanager
def refusals(log: FindingLog) -> Iterator[None]:
    """Ends quietly where the archive is refused or damaged; its finding is in the log then."""
    try:
        yield
    except ArchiveRefused:
        pass
    except _DAMAGE as error:
        what = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if "overlap" in what.lower():  # entries that share bytes are the trick of the smallest bombs
            fix = "pack the files again with another program"
            log.note("unsafe", f"the archive has overlapping entries: {what}", code="archive_unsafe", fix=fix)
        else:
            log.note("archive", f"the archive is damaged: {what}", fix="pack it again and upload it whole")


class _Budget:
    """Refuses: by name, by kind, by number, and by how much comes out of how little."""

    def __init__(self, packed_bytes: int, log: FindingLog, limits: Limits) -> None:
        self._log, self.limits = log, limits
        self._most = min(limits.unpacked_bytes, limits.unpacked_slack_bytes + limits.unpacked_ratio * packed_bytes)
        self._seen: set[str] = set()
        self._left = self._most
        self._entries = 0

    def restart(self) -> None:
        """Before another pass over the same archive."""
        self._seen.clear()
        self._left, self._entries = self._most, 0

    def refuse(self, name: str, what: str, *, fix: str) -> ArchiveRefused:
        return self._refuse(f"the entry {name[:200]!r} {what}", fix)

    def refuse_all(self, what: str, *, fix: str) -> ArchiveRefused:
        return self._refuse(f"the archive {what}", fix)

    def _refuse(self, message: str, fix: str) -> ArchiveRefused:
        self._log.note("unsafe", message, code="archive_unsafe", row=self._entries, fix=fix)
        return ArchiveRefused(message)

    def admit(self, name: str) -> Entry:
        """Counts an entry and checks its name. Raises `ArchiveRefused`."""
        self._entries += 1
        if self._entries > self.limits.entries:
            raise self.refuse(name, f"is one too many: {self.limits.entries:,} are allowed", fix="pack fewer files")
        problem = _name_problem(name)
        if problem is not None:
            raise self.refuse(name, problem, fix="pack the files again from inside their folder, by relative names")
        if name in self._seen:
            raise self.refuse(name, "is in the archive twice", fix="pack each file once")
        self._seen.add(name)
        path = PurePosixPath(name)
        if path.suffix.lower() in _NESTED:
            raise self.refuse(name, "is an archive inside the archive", fix="unpack it, and pack its files instead")
        return Entry(self._entries, name, path)

    def spend(self, name: str, count: int) -> None:
        self._left -= count
        if self._left < 0:
            what = f"unpacks to more than the {self._most:,} bytes that an archive of this size may hold"
            raise self.refuse(name, what, fix="upload the files in smaller archives, or uncompressed")


def _name_problem(name: str) -> str | None:
    path = PurePosixPath(name)
    if not name or len(name) > _NAME_CHARACTERS or len(path.parts) > _DEPTH:
        return "has no name, or one too long or too deep"
    if any(ord(character) < 32 or character == "\x7f" or 0xD800 <= ord(character) <= 0xDFFF for character in name):
        return "has control characters in its name"
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "has an absolute name"
    if "\\" in name:
        return "has a backslash in its name"
    return "leads out of the archive's folder" if ".." in path.parts else None


class _Metered(io.RawIOBase):
    """A stream that counts what is read from it against the budget, or refuses an archive by its first bytes."""

    def __init__(
        self,
        source: IO[bytes] | gzip.GzipFile,
        name: str,
        budget: _Budget,
        *,
        is_counted: bool = True,
        is_entry: bool = True,
    ) -> None:
        self._source, self._name, self._budget = source, name, budget
        self._is_counted, self._is_first = is_counted, is_entry

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        piece = self._source.read(min(len(buffer), _CHUNK))
        if self._is_counted:
            self._budget.spend(self._name, len(piece))
        if self._is_first and piece.startswith(_NESTED_MAGICS):
            raise self._budget.refuse(self._name, "is an archive inside the archive", fix="pack its files instead")
        self._is_first = False
        buffer[: len(piece)] = piece
        return len(piece)


class _Zip:
    def __init__(self, stream: BinaryIO, budget: _Budget) -> None:
        self._budget = budget
        self._entries: dict[str, tuple[Entry, zipfile.ZipInfo]] = {}
        _check_directory(stream, budget)
        self._file = zipfile.ZipFile(stream)
        for info in self._file.infolist():
            # zipfile cuts names at a NUL; another program may see the whole name.
            if "\0" in info.orig_filename:
                raise budget.refuse(info.orig_filename.replace("\0", "?"), "has a NUL in its name", fix="rename it")
            entry = None if info.is_dir() and _name_problem(info.filename) is None else budget.admit(info.orig_filename)
            if entry is not None:
                _check_zip_entry(info, budget)
                self._entries[entry.name] = (entry, info)

    def names(self) -> Iterator[Entry]:
        yield from (entry for entry, _ in self._entries.values())

    def sizes(self) -> Iterator[tuple[str, int]]:
        """The bytes that each entry declares, of which no more are ever read."""
        yield from ((name, info.file_size) for name, (_, info) in self._entries.items())

    def contents(self) -> Iterator[tuple[Entry, IO[bytes]]]:
        self._budget.restart()
        for entry, info in self._entries.values():
            with self._file.open(info) as source:
                yield entry, io.BufferedReader(_Metered(source, entry.name, self._budget), _CHUNK)


def _check_zip_entry(info: zipfile.ZipInfo, budget: _Budget) -> None:
    mode = info.external_attr >> 16
    if info.flag_bits & 0x1:
        raise budget.refuse(info.filename, "is encrypted", fix="pack the files again without a password")
    if stat.S_IFMT(mode) not in {0, stat.S_IFREG}:
        raise budget.refuse(info.filename, "is a link or a device, not a file", fix="pack the file it points to")
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise budget.refuse(info.filename, "is packed by a rare method", fix="pack the files again with deflate")


def _check_directory(stream: BinaryIO, budget: _Budget) -> None:
    """Refuses a table of contents that would not fit into memory, before it is read."""
    size = stream.seek(0, io.SEEK_END)
    start = max(0, size - (1 << 16) - 22)
    stream.seek(start)
    tail = stream.read()
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) - place < 22:
        raise zipfile.BadZipFile("its table of contents is missing; the file is cut off")
    directory, end = int(struct.unpack_from("<L", tail, place + 12)[0]), place
    if tail[max(0, place - 20) :].startswith(b"PK\x06\x07") and tail[max(0, place - 76) :].startswith(b"PK\x06\x06"):
        end = place - 76  # `zipfile` takes the sizes of a zip64 that are here, whatever the others say
        directory = int(struct.unpack_from("<Q", tail, end + 40)[0])
    if directory > budget.limits.directory_bytes:
        raise budget.refuse_all(f"has {directory:,} bytes of names", fix="pack fewer files")
    stream.seek(max(0, start + end - directory))
    # Before its end, whatever place it states: there `zipfile` looks for it too.
    entries = _count_entries(stream.read(directory), budget.limits.zip_entries)
    if entries > budget.limits.zip_entries:
        what = f"has more than {budget.limits.zip_entries:,} entries, which is too many for a zip"
        raise budget.refuse_all(what, fix="pack them as .tar.gz, or put the rows into one csv or jsonl file")
    stream.seek(0)


def _count_entries(directory: bytes, most: int) -> int:
    """Entries of a table of contents, counted without making an object for each, up to one more than `most`."""
    place = count = 0
    while count <= most and directory[place : place + 4] == b"PK\x01\x02" and place + 46 <= len(directory):
        place += 46 + sum(struct.unpack_from("<3H", directory, place + 28))
        count += 1
    return count


class _Tar:
    """A tar, packed with gzip or not, read from its start to its end each time."""

    def __init__(self, stream: BinaryIO, budget: _Budget) -> None:
        self._stream, self._budget = stream, budget
        self._is_packed = stream.read(2) == b"\x1f\x8b"

    def names(self) -> Iterator[Entry]:
        for entry, _ in self.contents():
            yield entry

    def contents(self) -> Iterator[tuple[Entry, IO[bytes]]]:
        self._budget.restart()
        self._stream.seek(0)
        source = gzip.GzipFile(fileobj=self._stream) if self._is_packed else self._stream
        unpacked = io.BufferedReader(_Metered(source, "(archive)", self._budget, is_entry=False), _CHUNK)
        with tarfile.open(fileobj=unpacked, mode="r|") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                if member.isdir() and _name_problem(member.name) is None:
                    continue
                entry = self._budget.admit(member.name)
                # A sparse file would yield zeros that were never read, and so never counted.
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None:
                    what = "is a link, a device or a sparse file"
                    raise self._budget.refuse(member.name, what, fix="pack the file it points to")
                metered = _Metered(content, entry.name, self._budget, is_counted=False)
                yield entry, io.BufferedReader(metered, _CHUNK)
