"""Rows of an uploaded archive: one table, a folder for each class, or files with a table about them.

- exactly one .csv, .jsonl or .parquet: its rows;
- class folders: `label/file.txt`, also below one folder of all, or below `train/`, `validation/`, `test/`, which
  then make a column `split`;
- text files and a `metadata.csv` or `metadata.jsonl` whose column `file_name` names them, beside its other columns.

Row numbers are the file's place in the archive, or the row of the table. What a file manager adds is left out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO

from finetune.data.archive import Archive, ArchiveFormat, Entry, open_archive, refusals
from finetune.data.options import SIDE_NAMES
from finetune.data.record_batches import (
    NOTHING,
    FindingLog,
    Limits,
    RowBatch,
    RowSource,
    are_cells_sound,
    batched,
    note_cell_problem,
)
from finetune.data.text_lines import decoded, note_bad_byte, note_read_as
from modeling.inputs import MODALITIES, Modality

_Place = tuple[int, Sequence[str | None]] | str
"""The number and the further cells of a file's row, or why it has no label."""
TableOpener = Callable[[Path, str, FindingLog, Limits], contextlib.AbstractContextManager[RowSource]]

UNPACKED_PREFIX, FILES_FOLDER = ".unpacked-", "files"
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
    path: Path, log: FindingLog, limits: Limits, *, kind: ArchiveFormat, open_table: TableOpener, folder: Path
) -> Iterator[RowSource]:
    """The rows; a table inside is unpacked beside `path` for as long as it is read, and files that cells name into
    `folder`, where they stay."""
    with contextlib.ExitStack() as stack:

        def unpacked(wanted: Entry) -> RowSource:
            file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=UNPACKED_PREFIX)  # noqa: SIM115, as above
            target = stack.enter_context(file)
            for entry, content in archive.contents():
                if entry.name == wanted.name:
                    shutil.copyfileobj(content, target, _CHUNK)
                    break
            target.flush()
            return stack.enter_context(open_table(Path(target.name), wanted.name, log, limits))

        source = NOTHING
        with refusals(log):
            archive = stack.enter_context(open_archive(path, kind, log, limits))
            source = _source(archive, unpacked, folder, log, limits)
        yield replace(source, batches=_quietly(source.batches, log))


def _quietly(batches: Iterator[RowBatch], log: FindingLog) -> Iterator[RowBatch]:
    with refusals(log):
        yield from batches


def _source(
    archive: Archive, unpacked: Callable[[Entry], RowSource], folder: Path, log: FindingLog, limits: Limits
) -> RowSource:
    entries = [entry for entry in archive.names() if not _is_junk(entry.path)]
    tables = [entry for entry in entries if entry.path.suffix.lower() in _TABLES]
    files = [entry for entry in entries if entry.path.suffix.lower() not in _TABLES and not _is_remark(entry.path)]
    if any(entry.name == "[Content_Types].xml" for entry in entries):
        log.note(
            "office",
            "the file is a document of an office program",
            fix="save the sheet as .xlsx or CSV UTF-8 and upload it",
        )
    elif not tables and not files:
        log.note("no files", "the archive holds no file to read", fix=_LAYOUT)
    elif len(tables) > 1:
        named = ", ".join(repr(entry.name[:80]) for entry in tables[:5])
        log.note(
            "tables", f"the archive holds {len(tables)} tables: {named}", fix="upload each as a dataset of its own"
        )
    elif tables and not files:
        return unpacked(tables[0])
    elif tables and tables[0].path.name.lower() not in _METADATA:
        message = f"the archive holds the table {tables[0].name[:80]!r} and {len(files):,} other files"
        log.note(
            "tables", message, fix="call it metadata.csv and name the files in a column file_name, or upload it alone"
        )
    elif tables:
        contents = _Contents(archive, _modality_of(files), folder, log, limits)
        return _FilesOfTable(contents, tables[0].path.parent).source(unpacked(tables[0]))
    else:
        return _class_folders(_Contents(archive, _modality_of(files), folder, log, limits), files)
    return NOTHING


def _is_junk(path: PurePosixPath) -> bool:
    return any(part.lower() in _JUNK or part.startswith(".") for part in path.parts)


def _is_remark(path: PurePosixPath) -> bool:
    return path.suffix.lower() == ".md" or path.stem.lower() in _REMARKS


def _is_content(path: PurePosixPath) -> bool:
    return not (_is_junk(path) or _is_remark(path) or path.suffix.lower() in _TABLES)


def _modality_of(files: list[Entry]) -> Modality | None:
    """The modality whose files these are by the first one, None for texts."""
    suffix = files[0].path.suffix.lower()
    return next((modality for modality in MODALITIES.values() if suffix in modality.suffixes), None)


@dataclass(frozen=True, slots=True)
class _Contents:
    """Files that become cells: a text as it is. One of another `modality` stays a file, gets a name of ours in the
    dataset's `folder`, and the cell names it."""

    archive: Archive
    modality: Modality | None
    folder: Path
    log: FindingLog
    limits: Limits

    @property
    def column(self) -> str:
        return TEXT_COLUMN if self.modality is None else self.modality.roles[0]

    def source(self, others: Sequence[str], place: Callable[[Entry], _Place]) -> RowSource:
        """A row for each file, with the row number and the `others` that `place` gives."""
        columns = (FILE_COLUMN, self.column, *others)
        rows = batched(self._rows(place), len(columns), self.limits)
        return RowSource(columns, rows, frozenset({self.column} if self.modality else ()))

    def _rows(self, place: Callable[[Entry], _Place]) -> Iterator[tuple[int, list[str | None]]]:
        if self.modality is not None:
            shutil.rmtree(self.folder / FILES_FOLDER, ignore_errors=True)  # of a check that did not end
            (self.folder / FILES_FOLDER).mkdir()
        for entry, content in self.archive.contents():
            if not _is_content(entry.path):
                continue
            placed = place(entry)
            if isinstance(placed, str):
                message = f"the file {entry.name[:200]!r} {placed}, so that it has no label"
                self.log.note("unlabelled", message, code="file_without_label", row=entry.number, fix=_LAYOUT)
                continue
            number, cells = placed
            cell = self._cell(entry, content, number)
            if cell is not None:
                yield number, [entry.name, cell, *cells]
        if self.modality is not None:
            os.sync()  # once, where one call for each of many files would take minutes

    def _cell(self, entry: Entry, content: IO[bytes], row: int) -> str | None:
        if self.modality is None:
            return read_text(entry, content, row, self.log, self.limits)
        suffix, most = entry.path.suffix.lower(), self.limits.file_bytes
        data = content.read(most + 1)
        if suffix not in self.modality.suffixes or len(data) > most:
            fix = f"pack files of {' '.join(sorted(self.modality.suffixes))}, each of at most {most:,} bytes"
            message = f"{entry.name[:200]!r} is too large, or not of the kind of the first file"
            self.log.note("not of a kind", message, row=row, fix=fix)
            return None
        name = f"{FILES_FOLDER}/{entry.number}{suffix}"
        (self.folder / name).write_bytes(data)
        return name


def _class_folders(contents: _Contents, files: list[Entry]) -> RowSource:
    """Files whose folder is their label."""
    above = _shared_folders([entry.path.parts for entry in files])
    inside = [entry.path.parts[above:] for entry in files]
    has_splits = all(len(parts) == 3 and parts[0].casefold() in SIDE_NAMES for parts in inside)

    def place(entry: Entry) -> _Place:
        folders = entry.path.parts[above:-1]
        if len(folders) != 1 + has_splits:
            return "is in no class folder" if not folders else "is too deep"
        return entry.number, folders[::-1]

    return contents.source([LABEL_COLUMN, SPLIT_COLUMN] if has_splits else [LABEL_COLUMN], place)


def _shared_folders(names: list[tuple[str, ...]]) -> int:
    """How many folders are above all class folders."""
    above = 0
    while all(len(parts) > above + 2 for parts in names) and len({parts[above] for parts in names}) == 1:
        above += 1
    return above


@dataclass(slots=True)
class _FilesOfTable:
    """Files that a table names, beside its other columns."""

    contents: _Contents
    folder: PurePosixPath
    rows: dict[str, tuple[int, list[str | None]]] = field(default_factory=dict)

    def source(self, table: RowSource) -> RowSource:
        if not table.columns:
            return NOTHING
        own, log = self.contents.column, self.contents.log
        if FILE_COLUMN not in table.columns or own in table.columns:
            what = (
                f"has a column {own!r} of its own" if FILE_COLUMN in table.columns else f"has no column {FILE_COLUMN!r}"
            )
            fix = f"name the files in a column {FILE_COLUMN!r}, and leave {own!r} to their content"
            log.note("metadata", f"the metadata {what}", code="missing_column", column=FILE_COLUMN, fix=fix)
            return NOTHING
        place = table.columns.index(FILE_COLUMN)
        held = 0
        for batch in table.batches:
            for number, *cells in zip(batch.row_numbers, *batch.columns, strict=True):
                held += sum(len(cell) for cell in cells if cell is not None)
                self._hold(number, cells, cells.pop(place))
            if held > _HELD_CHARACTERS or len(self.rows) > self.contents.limits.entries:
                log.note("metadata", "the metadata table is too large", fix="upload several smaller archives")
                return NOTHING
        source = self.contents.source([name for name in table.columns if name != FILE_COLUMN], self._place)
        return replace(source, batches=self._batches(source.batches))

    def _hold(self, number: int, cells: list[str | None], name: str | None) -> None:
        key = str(PurePosixPath(name.strip())) if name is not None and name.strip() else ""
        if not key or key in self.rows:
            what = f"names the file {key[:80]!r} a second time" if key else "names no file"
            self.contents.log.note(
                "named twice",
                f"row {number} of the metadata {what}",
                row=number,
                column=FILE_COLUMN,
                fix="name each file once",
            )
            return
        self.rows[key] = (number, cells)

    def _place(self, entry: Entry) -> _Place:
        key = str(entry.path.relative_to(self.folder)) if entry.path.is_relative_to(self.folder) else ""
        return self.rows.pop(key, "is not named in the metadata")

    def _batches(self, batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
        yield from batches
        for key, (number, _) in self.rows.items():
            message = f"row {number} of the metadata names {key[:200]!r}, which is not in the archive"
            fix = "pack that file too, or remove the row"
            self.contents.log.note(
                "missing file", message, code="missing_file", row=number, column=FILE_COLUMN, fix=fix
            )


def read_text(entry: Entry, content: IO[bytes], row: int, log: FindingLog, limits: Limits) -> str | None:
    """The text of a .txt file, or None with what is wrong in the log. Other kinds of content would go beside it."""
    if entry.path.suffix.lower() != ".txt":
        message = f"{entry.name[:200]!r} is not a text file"
        log.note("not text", message, row=row, fix="pack .txt files only; other kinds cannot be trained on yet")
        return None
    raw = content.read(limits.cell_bytes + 1)
    if len(raw) > limits.cell_bytes:
        note_cell_problem(log, f"a cell larger than {limits.cell_bytes:,} bytes", row=row, column=TEXT_COLUMN)
        return None
    try:
        text, encoding = decoded(raw)
    except UnicodeDecodeError as error:
        note_bad_byte(log, f"the file {entry.name[:200]!r}", error, row=row, column=TEXT_COLUMN)
        return None
    if encoding != "utf-8":
        note_read_as(log, encoding, row=row, column=TEXT_COLUMN)
    return text if are_cells_sound(row, [(TEXT_COLUMN, text)], log, limits) else None
