"""Rows of an uploaded parquet file, as strings; a list of single values becomes the JSON of its strings.

Knows Arrow's types; nothing it reads is trusted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from finetune.data.record_batches import (
    NOTHING,
    FindingLog,
    Limits,
    RowBatch,
    RowSource,
    are_names_sound,
    cell_problem,
    note_cell_problem,
    note_too_many_rows,
    rows_per_batch,
)

_WRITE_AGAIN = "write the file again and upload it whole"
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_LIST_TYPES = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_SCALAR_TYPES = (
    *_TEXT_TYPES,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_boolean,
    pa.types.is_temporal,
    pa.types.is_null,
)


@contextlib.contextmanager
def open_parquet(path: Path, log: FindingLog, limits: Limits) -> Iterator[RowSource]:
    file = _open(path, log)
    if file is None:
        yield NOTHING
        return
    with file:
        columns = _columns(file.schema_arrow, log, limits)
        yield RowSource(columns, _batches(file, columns, log, limits)) if columns else NOTHING


def _open(path: Path, log: FindingLog) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        log.note("parquet", f"the file cannot be read as parquet: {_first_line(error)}", fix=_WRITE_AGAIN)
        return None


def _columns(schema: Any, log: FindingLog, limits: Limits) -> tuple[str, ...]:
    if not are_names_sound(schema.names, log, limits):
        return ()
    usable = tuple(field.name for field in schema if _is_scalar(field.type) or _is_list(field.type))
    for field in schema:
        if field.name not in usable:
            message = f"column {field.name!r} holds {field.type}, not single values; it is left out"
            fix = "nothing to do, unless the column is needed: then write it as text"
            log.note("not scalar", message, severity="warning", column=field.name, fix=fix)
    if not usable:
        log.note("no columns", "the file has no column of single values", fix="add a text and a label column")
    return usable


def _is_scalar(data_type: Any) -> bool:
    if pa.types.is_dictionary(data_type):
        return any(is_type(data_type.value_type) for is_type in _TEXT_TYPES)
    return any(is_type(data_type) for is_type in _SCALAR_TYPES)


def _is_list(data_type: Any) -> bool:
    """A list of single values."""
    return any(is_type(data_type) for is_type in _LIST_TYPES) and _is_scalar(data_type.value_type)


def _batches(file: Any, columns: tuple[str, ...], log: FindingLog, limits: Limits) -> Iterator[RowBatch]:
    first_row = 1
    batches = file.iter_batches(_batch_rows(file, limits), columns=list(columns), use_threads=False)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            values = [_as_strings(batch.column(name), name, first_row, log) for name in columns]
        except MemoryError:
            raise  # Arrow's is an ArrowException too, and says nothing about the file
        except (pa.ArrowException, OSError, ValueError) as error:
            message = f"the file breaks off or is damaged at row {first_row} or after: {_first_line(error)}"
            log.note("parquet", message, row=first_row, fix=_WRITE_AGAIN)
            return
        read = first_row - 1
        if read + batch.num_rows > limits.rows:
            return note_too_many_rows(log, limits, row=limits.rows + 1)
        yield _sound_rows(columns, values, first_row, log, limits)
        first_row += batch.num_rows


def _batch_rows(file: Any, limits: Limits) -> int:
    metadata = file.metadata
    total_bytes: int = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    row_bytes = max(1, total_bytes // max(1, int(metadata.num_rows)))
    return max(1, min(rows_per_batch(int(metadata.num_columns), limits), limits.batch_characters // row_bytes))


def _as_strings(array: Any, name: str, first_row: int, log: FindingLog) -> list[str | None]:
    if _is_list(array.type):
        return _as_json(array, name, first_row, log)
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), None, array)  # data frames write a missing number as NaN
    encoded = array.cast(pa.string()).cast(pa.binary()).to_pylist()
    return [_decode(value, name, row, log) for row, value in enumerate(encoded, first_row)]


def _as_json(array: Any, name: str, first_row: int, log: FindingLog) -> list[str | None]:
    cells: list[str | None] = []
    is_number = pa.types.is_floating(array.type.value_type)
    if not any(is_type(array.type.value_type) for is_type in _TEXT_TYPES):
        array = array.cast(pa.large_list(pa.large_string()))
    nothing = {None, b"nan"} if is_number else {None}
    for row, value in enumerate(array.cast(pa.large_list(pa.large_binary())).to_pylist(), first_row):
        items = None if value is None else [_decode(item, name, row, log) for item in value if item not in nothing]
        cells.append(None if items is None else json.dumps(items, ensure_ascii=False))
    return cells


def _decode(value: bytes | None, name: str, row: int, log: FindingLog) -> str | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"row {row}, column {name!r}: byte 0x{value[error.start]:02x} at offset {error.start} is not UTF-8"
        log.note("encoding", message, code="encoding", row=row, column=name, fix="write the column as UTF-8 text")
        return value.decode("utf-8", "replace")


def _sound_rows(
    columns: tuple[str, ...], values: list[list[str | None]], first_row: int, log: FindingLog, limits: Limits
) -> RowBatch:
    bad: set[int] = set()
    for name, column in zip(columns, values, strict=True):
        for position, cell in enumerate(column):
            if cell is not None and (problem := cell_problem(cell, limits)) is not None:
                note_cell_problem(log, problem, row=first_row + position, column=name)
                bad.add(position)
    kept = [position for position in range(len(values[0])) if position not in bad]
    return RowBatch(
        [first_row + position for position in kept], [[column[position] for position in kept] for column in values]
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
