"""Opens an uploaded file of any accepted format as batches of string rows, in bounded memory.

Problems of the data become findings with row numbers, never exceptions; an `OSError` is the machine's.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import cast, get_args

from finetune.data.archive import ArchiveFormat
from finetune.data.archive_rows import open_archived
from finetune.data.conll_rows import looks_like_conll, open_conll
from finetune.data.csv_rows import open_csv
from finetune.data.jsonl_rows import open_json, open_jsonl
from finetune.data.parquet_rows import open_parquet
from finetune.data.record_batches import NOTHING, FindingLog, Limits, RowSource
from finetune.data.records import FileFormat, Finding
from finetune.data.text_lines import wide_encoding
from finetune.data.xlsx_rows import open_xlsx

Opener = Callable[[Path, FindingLog, Limits], contextlib.AbstractContextManager[RowSource]]

ARCHIVES: tuple[str, ...] = get_args(ArchiveFormat)
_PARQUET_MAGIC = b"PAR1"
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
_TAR_MARK, _TAR_MARK_AT = b"ustar", 257
_ARCHIVE_MAGICS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_OLE_MAGIC = b"\xd0\xcf\x11\xe0"
_WORKBOOKS = {".xlsx", ".xlsm"}
_SUFFIXES: dict[str, FileFormat] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    **dict.fromkeys((".conll", ".conllu", ".conll2003", ".bio", ".iob", ".iob2"), "conll"),
    ".parquet": "parquet",
    ".tar": "tar",
}
_TABLES: dict[str, Opener] = {
    "csv": open_csv,
    "jsonl": open_jsonl,
    "json": open_json,
    "conll": open_conll,
    "parquet": open_parquet,
    "xlsx": open_xlsx,
}


def detect_format(filename: str, first_bytes: bytes) -> FileFormat | None:
    """The format by the content's mark, else by the name's suffix, else by the first character."""
    if first_bytes.startswith(_PARQUET_MAGIC):
        return "parquet"
    if first_bytes.startswith(_ZIP_MAGICS):
        is_workbook = PurePath(filename).suffix.lower() in _WORKBOOKS or b"xl/workbook.xml" in first_bytes
        return "xlsx" if is_workbook else "zip"
    if _is_tar(_unzipped_head(first_bytes)):
        return "tar"
    if _compression(first_bytes) is not None or first_bytes.startswith(_OLE_MAGIC):
        return None
    suffix = PurePath(filename).suffix.lower()
    if suffix == ".tsv" and _by_content(first_bytes) == "conll":
        return "conll"
    return _SUFFIXES.get(suffix) or _by_content(first_bytes)


def unrecognised(filename: str, first_bytes: bytes) -> Finding:
    """The finding for a file of which `detect_format` makes nothing."""
    compression = _compression(first_bytes)
    if compression is not None:
        message, fix = f"{filename!r} is compressed with {compression}", "uncompress it first"
    elif first_bytes.startswith(_OLE_MAGIC):
        message = f"{filename!r} is a workbook of an old format, or has a password"
        fix = "save it as .xlsx without a password, or the sheet as CSV UTF-8"
    elif first_bytes.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        message = f"{filename!r} is a JSON array of something else than objects, or no table"
        fix = "write an array of objects, or one JSON object on each line; or upload csv, parquet or xlsx"
    else:
        message = f"the format of {filename!r} is not known"
        fix = "upload a .csv, .jsonl, .parquet or .xlsx file, or a .zip or .tar.gz of text files"
    return Finding(code="parse_error", severity="error", message=message, fix=fix)


@contextlib.contextmanager
def open_rows(
    path: Path, file_format: FileFormat, log: FindingLog, limits: Limits | None = None, *, folder: Path | None = None
) -> Iterator[RowSource]:
    """The rows of a local file. What is wrong with them is in `log` once the batches have been read.

    Files of an archive that cells name are put into `folder`, which is the archive's own unless given.
    """
    with path.open("rb") as stream:
        first_bytes = stream.read(8)
    is_zip = file_format in (*ARCHIVES, "xlsx") and bool(first_bytes)
    if not is_zip and _is_refused(first_bytes, log):
        yield NOTHING
        return
    if file_format in _TABLES:
        opened = _TABLES[file_format](path, log, limits or Limits())
    else:
        kind = cast(ArchiveFormat, file_format)
        opened = open_archived(
            path, log, limits or Limits(), kind=kind, open_table=_open_table, folder=folder or path.parent
        )
    with opened as source:
        yield source


@contextlib.contextmanager
def _open_table(path: Path, filename: str, log: FindingLog, limits: Limits) -> Iterator[RowSource]:
    """A table out of an archive, by its name's suffix."""
    with path.open("rb") as stream:
        first_bytes = stream.read(8)
    if _is_refused(first_bytes, log):
        yield NOTHING
        return
    with _TABLES[_SUFFIXES[PurePath(filename).suffix.lower()]](path, log, limits) as source:
        yield source


def _is_refused(first_bytes: bytes, log: FindingLog) -> bool:
    compression = _compression(first_bytes)
    if not first_bytes:
        log.note("empty", "the file is empty", fix="upload a file with a header and rows")
    elif compression is not None:
        log.note("compressed", f"the file is compressed with {compression}", fix="uncompress it first")
    else:
        return False
    return True


def _compression(first_bytes: bytes) -> str | None:
    return next((name for magic, name in _ARCHIVE_MAGICS.items() if first_bytes.startswith(magic)), None)


def _unzipped_head(first_bytes: bytes) -> bytes:
    """What the first bytes hold, unpacked where they are gzip: enough to see a tar in it."""
    if not first_bytes.startswith(b"\x1f\x8b"):
        return first_bytes
    try:
        return zlib.decompressobj(31).decompress(first_bytes, _TAR_MARK_AT + len(_TAR_MARK))
    except zlib.error:
        return b""


def _is_tar(head: bytes) -> bool:
    return head[_TAR_MARK_AT : _TAR_MARK_AT + len(_TAR_MARK)] == _TAR_MARK


def _by_content(first_bytes: bytes) -> FileFormat | None:
    text = first_bytes.decode(wide_encoding(first_bytes) or "utf-8", "replace").removeprefix("\ufeff").lstrip()
    if text.startswith("{"):
        return "jsonl"
    if text.startswith("[") and text[1:].lstrip().startswith("{"):
        return "json"
    if looks_like_conll(text):
        return "conll"
    first_line = next(iter(text.splitlines()), "")
    is_table = any(delimiter in first_line for delimiter in ",;\t|")
    is_csv = is_table and "\0" not in text and not text.startswith(("[", "<"))
    return "csv" if is_csv else None
