"""Immutable artefacts by key. Knows bytes, digests and durability; knows no model.

Keys are slash-separated names of a narrow alphabet, so no user text ever becomes a path. A file is
complete or absent: it is written beside its place, fsynced, renamed, and its folder fsynced
(without the last step a crash can lose the name).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from model_registry.errors import (
    ArtifactError,
    ArtifactExists,
    HashMismatch,
    InvalidReference,
    StoreFull,
    StoreUnavailable,
)
from model_registry.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileEntry,
    ModelManifest,
    sha256_hex,
    version_prefix,
)
from model_registry.spare_time import spare

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_CHUNK_BYTES = 16 << 20
_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK}
_HERE, _NO_REPLACE = -100, 1  # AT_FDCWD, RENAME_NOREPLACE
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_AWAY = {errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ENOENT}
_AWAY |= {errno.ENOTDIR, errno.EACCES, errno.EPERM}


class ArtifactStore(Protocol):
    """Where artefacts live. Writes are atomic and durable when they return; keys are never overwritten in place."""

    def put_bytes(self, key: str, data: bytes, *, create_only: bool = False) -> FileEntry:
        """Stores `data`. Raises `ArtifactExists` (create-only), `StoreFull`, `StoreUnavailable`, `InvalidReference`."""

    def put_file(self, key: str, source: Path) -> FileEntry:
        """Stores a copy of the file `source`. Raises `StoreFull`, `StoreUnavailable`, `InvalidReference`."""

    def get_bytes(self, key: str, *, max_bytes: int) -> bytes:
        """The content. Raises `ArtifactError` where it is missing or larger than `max_bytes`."""

    def local_path(self, key: str) -> Path:
        """A local file or folder with the content, to be read only. Raises `ArtifactError` where it is missing."""

    def exists(self, key: str) -> bool: ...

    def delete_tree(self, prefix: str) -> None:
        """Removes everything below `prefix`; nothing there is no error."""


class FileStore:
    """An `ArtifactStore` in one folder of a filesystem that all processes see."""

    def __init__(self, root: Path, *, is_there: bool = False) -> None:
        """`is_there`: another made the folder, and it is not made again. Raises `StoreUnavailable`."""
        self.root = root
        if not is_there:
            root.mkdir(parents=True, exist_ok=True)
        self._require_root()

    def put_bytes(self, key: str, data: bytes, *, create_only: bool = False) -> FileEntry:
        with self._writing(key, create_only=create_only) as file:
            file.write(data)
        return FileEntry(path=key.rpartition("/")[2], size=len(data), sha256=sha256_hex(data))

    def put_file(self, key: str, source: Path) -> FileEntry:
        digest, size = hashlib.sha256(), 0
        with source.open("rb") as reader, self._writing(key) as file:
            while chunk := reader.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        return FileEntry(path=key.rpartition("/")[2], size=size, sha256=digest.hexdigest())

    def get_bytes(self, key: str, *, max_bytes: int) -> bytes:
        try:
            with self._path(key).open("rb") as file:
                data = file.read(max_bytes + 1)
        except OSError as error:
            raise ArtifactError(f"{key} cannot be read from the store ({type(error).__name__})") from error
        if len(data) > max_bytes:
            raise ArtifactError(f"{key} is larger than {max_bytes} bytes")
        return data

    def local_path(self, key: str) -> Path:
        path = self._path(key)
        if not path.exists():
            raise ArtifactError(f"{key} is missing from the store")
        return path

    def exists(self, key: str) -> bool:
        return self._path(key).exists()

    def delete_tree(self, prefix: str) -> None:
        self._require_root()
        path = self._path(prefix)
        while path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another process removes it too
                shutil.rmtree(path)
        path.unlink(missing_ok=True)

    def _require_root(self) -> None:
        """A folder made anew in the place of a volume that is away would take what is lost when it comes back."""
        if not self.root.is_dir():
            raise StoreUnavailable("the folder of the store is gone; is its volume mounted?")

    def _path(self, key: str) -> Path:
        path = self.root
        for part in check_key(key).split("/"):
            path = path / part
            if path.is_symlink():
                raise InvalidReference(f"{key} leads through a symbolic link, which the store never follows")
        return path

    @contextlib.contextmanager
    def _writing(self, key: str, *, create_only: bool = False) -> Iterator[BinaryIO]:
        self._require_root()
        path = self._path(key)
        temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
        try:
            with space_errors(key):
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                _put_in_place(temporary, path, create_only=create_only)
                _sync_folders(path.parent, self.root)
        except FileExistsError as error:
            raise ArtifactExists(f"{key} exists already and is never overwritten") from error
        finally:
            with contextlib.suppress(OSError):  # a volume that takes no writes says so here once more
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def space_errors(name: str) -> Iterator[None]:
    """Raises `StoreFull` in place of the system's error if there is no space left for `name`, `StoreUnavailable` if its
    volume has gone or takes no writes."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(f"no space left to store {name}; nothing of it was kept") from error
        if error.errno in _AWAY:
            reason = errno.errorcode[error.errno]
            raise StoreUnavailable(f"{name} cannot be stored ({reason}); nothing of it was kept") from error
        raise


def _put_in_place(temporary: Path, path: Path, *, create_only: bool) -> None:
    if not create_only:
        temporary.replace(path)
        return
    for put in (_link, _rename_without_replacing, _claim_then_replace):
        try:
            return put(temporary, path)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    raise StoreUnavailable(f"the filesystem of {path.name} can neither link nor rename a file")


def _link(temporary: Path, path: Path) -> None:
    path.hardlink_to(temporary)  # fails where the name is taken; a rename would replace it silently


def _rename_without_replacing(temporary: Path, path: Path) -> None:
    """For filesystems without hard links, such as SMB and exFAT."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "renameat2")
    if rename(_HERE, os.fsencode(temporary), _HERE, os.fsencode(path), _NO_REPLACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _claim_then_replace(temporary: Path, path: Path) -> None:
    """For those that know no such rename either. A crash in between leaves an empty file under the name."""
    path.open("xb").close()
    try:
        temporary.replace(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sync_folders(folder: Path, root: Path) -> None:
    while True:
        sync_folder(folder)
        if folder == root:
            return
        folder = folder.parent


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_key(key: str) -> str:
    """Returns `key` if every part of it is a plain name. Raises `InvalidReference`."""
    if not all(_PART.fullmatch(part) for part in key.split("/")):
        raise InvalidReference(f"{key[:100]!r} is not an artefact key")
    return key


def put_tree(store: ArtifactStore, prefix: str, folder: Path) -> tuple[FileEntry, ...]:
    """Stores every file below `folder` under `prefix`; the entries' paths are relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = []
    for path in paths:
        relative = path.relative_to(folder).as_posix()
        entries.append(store.put_file(f"{prefix}/{relative}", path).model_copy(update={"path": relative}))
    return tuple(entries)


def load_manifest(
    store: ArtifactStore, *, tenant: str, name: str, version: int, sha256: str | None = None
) -> ModelManifest:
    """Reads a version's manifest. Raises `ArtifactError` and its kinds where it is missing or altered."""
    data = store.get_bytes(f"{version_prefix(tenant, name, version)}/{MANIFEST_NAME}", max_bytes=MAX_MANIFEST_BYTES)
    if sha256 is not None and sha256_hex(data) != sha256:
        raise HashMismatch(f"manifest.json of {name}:{version} differs from the digest recorded at registration")
    return ModelManifest.from_bytes(data)


def verify_files(store: ArtifactStore, prefix: str, files: tuple[FileEntry, ...]) -> None:
    """Compares every listed file with its size and digest. Raises `ArtifactError` or `HashMismatch`."""
    for entry in files:
        path = store.local_path(f"{prefix}/{entry.path}")
        size = path.stat().st_size
        if size != entry.size:
            raise HashMismatch(f"{entry.path} has {size} bytes, its manifest says {entry.size}")
        if spare(_sha256, path) != entry.sha256:
            raise HashMismatch(f"{entry.path} differs from the digest in its manifest")


def _sha256(path: Path) -> str:
    """In pieces so large that the interpreter's lock is hardly ever taken."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
