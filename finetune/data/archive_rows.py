"""Rows of an uploaded archive: one table, a folder for each class, or files with a table about them.

- exactly one .csv, .jsonl or .parquet: its rows;
- class folders: `label/file.txt`, also below one folder of all, or below `train/`, `validation/`, `test/`, which
  then make a column `split`;
- text files and a `metadata.csv` or `metadata.jsonl` whose column `file_name` names them, beside its other columns.

Row numbers are the file's place in the archive, or the row of the table. What a file manager adds is left out.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from finetune.data.archive import Archive, ArchiveFormat, Entry, open_archive, refusals
from finetune.data.options import SIDE_NAMES
from finetune.data.record_batches import (
    NOTHING,
    BatchBuilder,
    FindingLog,
    Limits,
    RowBatch,
    RowSource,
    cell_problem,
    note_cell_problem,
)
from finetune.data.text_lines import note_bad_byte, wide_encoding

TableOpener = Callable[[Path, str, FindingLog, Limits], contextlib.AbstractContextManager[RowSource]]

UNPACKED_PREFIX = ".unpacked-"
FILE_COLUMN, TEXT_COLUMN, LABEL_COLUMN, SPLIT_COLUMN = "file_name", "text", "label", "split"
_TABLES = {".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"}
_METADATA = {"metadata.csv", "metadata.jsonl"}
_JUNK = {"thumbs.db", "desktop.ini", "__macosx"}
_REMARKS = ("readme", "license", "licence", "notice")
_HELD_CHARACTERS = 256 * 1024 * 1024  # of a metadata table, which is held while the files are read
_CHUNK = 1 << 20
_LAYOUT = "put each text file into a folder named by its label, or name it in metadata.csv"


@contextlib.contextmanager
def open_archived(
    path: Path, log: FindingLog, limits: Limits, *, kind: ArchiveFormat, open_table: TableOpener
) -> Iterator[RowSource]:
    """The rows; a table inside is unpacked beside `path` for as long as it is read."""
    with contextlib.ExitStack() as stack:
        source = NOTHING
        with refusals(log):
            archive = stack.enter_context(open_archive(path, kind, log, limits))
            folder = _Unpacked(stack, path.parent, open_table, log, limits)
            source = _source(archive, folder, log, limits)
        yield RowSource(source.columns, _quietly(source.batches, log))


def _quietly(batches: Iterator[RowBatch], log: FindingLog) -> Iterator[RowBatch]:
    with refusals(log):
        yield from batches


@dataclass(frozen=True, slots=True)
class _Unpacked:
    """Where a table of the archive is put for its reader, under a name of ours."""

    stack: contextlib.ExitStack
    folder: Path
    open_table: TableOpener
    log: FindingLog
    limits: Limits

    def table(self, archive: Archive, wanted: Entry) -> RowSource:
        file = tempfile.NamedTemporaryFile(dir=self.folder, prefix=UNPACKED_PREFIX)  # noqa: SIM115, the stack closes it
        target = self.stack.enter_context(file)
        for entry, content in archive.contents():
            if entry.name == wanted.name:
                while piece := content.read(_CHUNK):
                    target.write(piece)
                break
        target.flush()
        return self.stack.enter_context(self.open_table(Path(target.name), wanted.name, self.log, self.limits))


def _source(archive: Archive, unpacked: _Unpacked, log: FindingLog, limits: Limits) -> RowSource:
    entries = [entry for entry in archive.names() if not _is_junk(entry.path)]
    tables = [entry for entry in entries if entry.path.suffix.lower() in _TABLES]
    files = [entry for entry in entries if entry.path.suffix.lower() not in _TABLES and not _is_remark(entry.path)]
    if any(entry.name == "[Content_Types].xml" for entry in entries):
        log.note(
            "office", "the file is a document of an office program", fix="save the sheet as CSV UTF-8 and upload it"
        )
    elif not tables and not files:
        log.note("no files", "the archive holds no file to read", fix=_LAYOUT)
    elif len(tables) > 1:
        named = ", ".join(repr(entry.name[:80]) for entry in tables[:5])
        log.note(
            "tables", f"the archive holds {len(tables)} tables: {named}", fix="upload each as a dataset of its own"
        )
    elif tables and not files:
        return unpacked.table(archive, tables[0])
    elif tables and tables[0].path.name.lower() not in _METADATA:
        message = f"the archive holds the table {tables[0].name[:80]!r} and {len(files):,} other files"
        log.note(
            "tables", message, fix="call it metadata.csv and name the files in a column file_name, or upload it alone"
        )
    elif tables:
        return _FilesOfTable(archive, tables[0].path.parent, log, limits).source(unpacked.table(archive, tables[0]))
    else:
        return _ClassFolders(archive, files, log, limits).source()
    return NOTHING


def _is_junk(path: PurePosixPath) -> bool:
    return any(part.lower() in _JUNK or part.startswith(".") for part in path.parts)


def _is_remark(path: PurePosixPath) -> bool:
    return path.suffix.lower() == ".md" or path.stem.lower() in _REMARKS


def _is_content(path: PurePosixPath) -> bool:
    return not (_is_junk(path) or _is_remark(path) or path.suffix.lower() in _TABLES)


class _ClassFolders:
    """Files whose folder is their label."""

    def __init__(self, archive: Archive, files: list[Entry], log: FindingLog, limits: Limits) -> None:
        self._archive, self._log, self._limits = archive, log, limits
        self._above = _shared_folders([entry.path.parts for entry in files])
        self._has_splits = all(
            len(parts) == 3 and parts[0].casefold() in SIDE_NAMES
            for parts in (entry.path.parts[self._above :] for entry in files)
        )

    def source(self) -> RowSource:
        split = [SPLIT_COLUMN] if self._has_splits else []
        return RowSource((FILE_COLUMN, TEXT_COLUMN, LABEL_COLUMN, *split), self._batches(3 + len(split)))

    def _batches(self, width: int) -> Iterator[RowBatch]:
        builder = BatchBuilder(width, self._limits)
        for entry, content in self._archive.contents():
            if not _is_content(entry.path):
                continue
            folders = entry.path.parts[self._above : -1]
            if len(folders) != width - 2:
                _note_unlabelled(self._log, entry, "lies in no class folder" if not folders else "lies too deep")
                continue
            text = read_text(entry, content, entry.number, self._log, self._limits)
            if text is not None:
                builder.add(entry.number, [entry.name, text, *reversed(folders)])
            if builder.is_full:
                yield builder.take()
        if builder:
            yield builder.take()


def _shared_folders(names: list[tuple[str, ...]]) -> int:
    """How many folders stand above all class folders."""
    above = 0
    while all(len(parts) > above + 2 for parts in names) and len({parts[above] for parts in names}) == 1:
        above += 1
    return above


@dataclass(slots=True)
class _FilesOfTable:
    """Files that a table names, beside its other columns."""

    archive: Archive
    folder: PurePosixPath
    log: FindingLog
    limits: Limits
    rows: dict[str, tuple[int, list[str | None]]] = field(default_factory=dict)

    def source(self, table: RowSource) -> RowSource:
        if not table.columns:
            return NOTHING
        if FILE_COLUMN not in table.columns or TEXT_COLUMN in table.columns:
            what = (
                "has a column 'text' of its own" if FILE_COLUMN in table.columns else f"has no column {FILE_COLUMN!r}"
            )
            fix = f"name the files in a column {FILE_COLUMN!r}, and leave 'text' to their content"
            self.log.note("metadata", f"the metadata {what}", code="missing_column", column=FILE_COLUMN, fix=fix)
            return NOTHING
        place = table.columns.index(FILE_COLUMN)
        held = 0
        for batch in table.batches:
            for number, *cells in zip(batch.row_numbers, *batch.columns, strict=True):
                held += sum(len(cell) for cell in cells if cell is not None)
                self._hold(number, cells, cells.pop(place))
            if held > _HELD_CHARACTERS or len(self.rows) > self.limits.entries:
                self.log.note("metadata", "the metadata table is too large", fix="upload several smaller archives")
                return NOTHING
        others = tuple(name for name in table.columns if name != FILE_COLUMN)
        return RowSource((FILE_COLUMN, TEXT_COLUMN, *others), self._batches(2 + len(others)))

    def _hold(self, number: int, cells: list[str | None], name: str | None) -> None:
        key = str(PurePosixPath(name.strip())) if name is not None and name.strip() else ""
        if not key or key in self.rows:
            what = f"names the file {key[:80]!r} a second time" if key else "names no file"
            self.log.note(
                "named twice",
                f"row {number} of the metadata {what}",
                row=number,
                column=FILE_COLUMN,
                fix="name each file once",
            )
            return
        self.rows[key] = (number, cells)

    def _batches(self, width: int) -> Iterator[RowBatch]:
        builder = BatchBuilder(width, self.limits)
        for entry, content in self.archive.contents():
            if not _is_content(entry.path):
                continue
            found = self.rows.pop(self._key(entry.path), None)
            if found is None:
                _note_unlabelled(self.log, entry, "is not named in the metadata")
                continue
            number, cells = found
            text = read_text(entry, content, number, self.log, self.limits)
            if text is not None:
                builder.add(number, [entry.name, text, *cells])
            if builder.is_full:
                yield builder.take()
        if builder:
            yield builder.take()
        for key, (number, _) in self.rows.items():
            message = f"row {number} of the metadata names {key[:200]!r}, which is not in the archive"
            fix = "pack that file too, or remove the row"
            self.log.note("missing file", message, code="missing_file", row=number, column=FILE_COLUMN, fix=fix)

    def _key(self, path: PurePosixPath) -> str:
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else ""


def read_text(entry: Entry, content: IO[bytes], row: int, log: FindingLog, limits: Limits) -> str | None:
    """The text of a .txt file, or None with what is wrong in the log. Other kinds of content would stand beside it."""
    if entry.path.suffix.lower() != ".txt":
        message = f"{entry.name[:200]!r} is not a text file"
        log.note("not text", message, row=row, fix="pack .txt files only; other kinds cannot be trained on yet")
        return None
    raw = content.read(limits.cell_bytes + 1).removeprefix(b"\xef\xbb\xbf")
    if (encoding := wide_encoding(raw)) is not None:
        message = f"the file {entry.name[:200]!r} is {encoding}, not UTF-8"
        log.note("encoding", message, code="encoding", row=row, column=TEXT_COLUMN, fix="save the file as UTF-8")
        return None
    if len(raw) > limits.cell_bytes:
        note_cell_problem(log, f"a cell larger than {limits.cell_bytes:,} bytes", row=row, column=TEXT_COLUMN)
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        note_bad_byte(log, f"the file {entry.name[:200]!r}", error, row=row, column=TEXT_COLUMN)
        return None
    if (problem := cell_problem(text, limits)) is not None:
        note_cell_problem(log, problem, row=row, column=TEXT_COLUMN)
        return None
    return text


def _note_unlabelled(log: FindingLog, entry: Entry, what: str) -> None:
    message = f"the file {entry.name[:200]!r} {what}, so that it has no label"
    log.note("unlabelled", message, code="file_without_label", row=entry.number, fix=_LAYOUT)
