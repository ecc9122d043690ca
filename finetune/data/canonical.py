"""The canonical table `rows.parquet`: every column as nullable strings, and `__row__` with the row number. A column
whose cells name files of the dataset's folder says so in its metadata.

The check writes it, training and previews read it, both one row group at a time. Knows no other format.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.errors import ColumnMissing
from finetune.data.record_batches import ROW_COLUMN, RowBatch

_KIND = b"polyhead.cell"


class CanonicalWriter:
    """Writes batches to an open file, one row group each."""

    def __init__(self, stream: BinaryIO, columns: Sequence[str], files: Collection[str]) -> None:
        kinds = {name: {_KIND: b"file"} if name in files else None for name in columns}
        fields = [pa.field(name, pa.string(), metadata=kind) for name, kind in kinds.items()]
        self._schema = pa.schema([pa.field(ROW_COLUMN, pa.int64(), nullable=False), *fields])
        self._writer = pq.ParquetWriter(stream, self._schema, compression="zstd")

    def write(self, batch: RowBatch) -> None:
        arrays = [pa.array(batch.row_numbers, pa.int64()), *(pa.array(column, pa.string()) for column in batch.columns)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def canonical_writer(path: Path, columns: Sequence[str], files: Collection[str] = ()) -> Iterator[CanonicalWriter]:
    """A writer whose file appears under `path` only when it is complete and on disk. The cells of the columns in
    `files` name files, by their paths from the folder of `path`."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        writer = CanonicalWriter(stream, columns, files)
        try:
            yield writer
        finally:
            writer.close()
        sync(stream)
    partial.replace(path)
    sync_folder(path.parent)


def column_names(path: Path) -> list[str]:
    with pq.ParquetFile(path) as file:
        return [name for name in file.schema_arrow.names if name != ROW_COLUMN]


def file_columns(path: Path) -> frozenset[str]:
    """The columns whose cells name files."""
    with pq.ParquetFile(path) as file:
        return frozenset(field.name for field in file.schema_arrow if _KIND in (field.metadata or {}))


def read_batches(path: Path, columns: Sequence[str], *, offset: int = 0) -> Iterator[RowBatch]:
    """Batches of the chosen columns, without the first `offset` rows. Raises `ColumnMissing`."""
    with pq.ParquetFile(path) as file:
        available = [name for name in file.schema_arrow.names if name != ROW_COLUMN]
        for name in columns:
            if name not in available:
                raise ColumnMissing(name, available=available)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if offset >= rows:
                offset -= rows
                continue
            table = file.read_row_group(group, columns=[ROW_COLUMN, *columns], use_threads=False).slice(offset)
            offset = 0
            yield RowBatch(table.column(ROW_COLUMN).to_pylist(), [table.column(name).to_pylist() for name in columns])
            del table
    pa.default_memory_pool().release_unused()  # of 50,000 rows of 130 words it would keep 100 MB


def sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
