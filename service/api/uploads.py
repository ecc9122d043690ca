"""Multipart bodies, streamed: one file goes straight to disk, small fields stay in memory, everything is counted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from model_registry.store import space_errors
from service.api.problems import Problem
from service.threads import on_disk

MAX_FIELDS = 16
MAX_FIELD_BYTES = 64 * 1024


@dataclass(slots=True)
class Upload:
    """A received body: its fields by name, and the file's name, size and digest (empty name: no file came)."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    size_bytes: int = 0
    sha256: str = ""


async def receive_multipart(request: Request, target: Path, *, file_part: str = "file") -> Upload:
    """Streams the part `file` into `target`, which the caller owns. Raises 400 and 413 problems, `StoreFull`."""
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    if content_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise Problem(400, "malformed_request", "send multipart/form-data with a part named 'file' (curl: -F file=@…)")
    with space_errors(target.name), target.open("wb") as sink:
        parts = _Parts(sink, file_part)
        try:
            parser = MultipartParser(options[b"boundary"], parts.callbacks())
            async for chunk in request.stream():
                if chunk:
                    # Disk writes block; a thread keeps the event loop free for predictions.
                    await on_disk(parser.write, chunk)
            parser.finalize()
        except FormParserError as error:
            detail = "the multipart body is malformed, or its boundary is longer than 256 bytes"
            raise Problem(400, "malformed_request", detail) from error
        if not parts.is_complete:
            raise Problem(400, "malformed_request", "the multipart body ends before its closing boundary")
    return parts.upload()


class _Parts:
    """Callbacks of the parser. Called on one thread at a time."""

    def __init__(self, sink: BinaryIO, file_part: str) -> None:
        self._sink, self._file_part = sink, file_part
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._name = ""
        self._value = b""
        self._upload = Upload()
        self._digest = hashlib.sha256()
        self._is_file = False
        self._parts = 0
        self.is_complete = False

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_piece,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def upload(self) -> Upload:
        self._upload.sha256 = self._digest.hexdigest()
        return self._upload

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise Problem(400, "malformed_request", f"the body has more than {MAX_FIELDS} parts")
        self._headers, self._value = {}, b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_piece(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = self._name == self._file_part
        if self._is_file:
            if self._upload.filename:
                raise Problem(400, "malformed_request", f"the body has more than one part named {self._file_part!r}")
            self._upload.filename = options.get(b"filename", b"upload").decode("utf-8", "replace")[:255] or "upload"

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._is_file:
            self._sink.write(piece)
            self._digest.update(piece)
            self._upload.size_bytes += len(piece)
            return
        self._value += piece
        if len(self._value) > MAX_FIELD_BYTES:
            raise Problem(413, "payload_too_large", f"the field {self._name[:60]!r} exceeds {MAX_FIELD_BYTES} bytes")

    def _part_end(self) -> None:
        if self._is_file:
            return
        try:
            self._upload.fields[self._name] = self._value.decode()
        except UnicodeDecodeError:
            raise Problem(400, "malformed_request", f"the field {self._name[:60]!r} is not UTF-8 text") from None

    def _end(self) -> None:
        self.is_complete = True
