"""An in-memory artefact store, held to the same contract suite as the real one."""

from __future__ import annotations

import tempfile
from pathlib import Path

from model_registry.errors import ArtifactError, ArtifactExists
from model_registry.manifest import FileEntry, sha256_hex
from model_registry.store import check_key


class MemoryStore:
    """An `ArtifactStore` in a dict; `local_path` writes what it is asked for into a temporary folder."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="polyhead-store-")

    def put_bytes(self, key: str, data: bytes, *, create_only: bool = False) -> FileEntry:
        if create_only and check_key(key) in self._files:
            raise ArtifactExists(f"{key} exists already and is never overwritten")
        self._files[check_key(key)] = bytes(data)
        return FileEntry(path=key.rpartition("/")[2], size=len(data), sha256=sha256_hex(data))

    def put_file(self, key: str, source: Path) -> FileEntry:
        return self.put_bytes(key, source.read_bytes())

    def get_bytes(self, key: str, *, max_bytes: int) -> bytes:
        if check_key(key) not in self._files:
            raise ArtifactError(f"{key} cannot be read from the store (it is missing)")
        if len(self._files[key]) > max_bytes:
            raise ArtifactError(f"{key} is larger than {max_bytes} bytes")
        return self._files[key]

    def local_path(self, key: str) -> Path:
        if not self.exists(key):
            raise ArtifactError(f"{key} is missing from the store")
        for name in self._below(key):
            path = Path(self._folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._files[name])
        return Path(self._folder.name, key)

    def exists(self, key: str) -> bool:
        return bool(self._below(check_key(key)))

    def delete_tree(self, prefix: str) -> None:
        for name in self._below(check_key(prefix)):
            del self._files[name]

    def close(self) -> None:
        self._folder.cleanup()

    def _below(self, key: str) -> list[str]:
        return [name for name in self._files if name == key or name.startswith(f"{key}/")]
