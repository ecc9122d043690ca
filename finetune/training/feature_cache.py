"""Vectors of frozen backbones, kept on disk for all jobs: computed once for an input, whichever dataset brings it.

A vector is known by its input, by the size (in tokens) to which the input is cut, if it is, and by its space: the
backbone's digest (which covers preprocessing and pooling), the engine that computed it and the libraries' versions.
So a dataset that grew, or was split or cut differently, finds the rows that it shares with an earlier one, and
nothing has to be preprocessed to find them. Inputs are not kept, only their hashes. A file that is damaged counts as
absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from modeling.weights import FloatArray

KEY_BYTES = 16
_SCHEMA = 3  # raised when the same input gives other vectors
_LIBRARIES = {"onnx": ("onnxruntime", "onnxruntime-gpu")}
_UNFINISHED_S = 3600.0


def content_key(content: bytes, *, cut_at: int | None = None) -> bytes:
    """16 bytes that identify what the backbone is given: an example's content, whole or cut to `cut_at` units."""
    cut = b"" if cut_at is None else str(cut_at).encode()
    return blake2b(content, digest_size=KEY_BYTES, person=cut).digest()


def space_name(backbone_digest: str, engine: str, libraries: Sequence[str]) -> str:
    """The folder of all vectors that may replace each other; `engine` is written `runtime/precision`, and
    `libraries` are those of the modality."""
    runtime = engine.partition("/")[0]
    names = (*libraries, *_LIBRARIES.get(runtime, (runtime.removesuffix("-compile"),)))
    return _hashed([_SCHEMA, backbone_digest, engine, {name: _version(name) for name in names}])


def counts_space(what: str, backbone_digest: str, libraries: Sequence[str]) -> str:
    """The folder of what a backbone's preprocessor counts in examples, such as what they cost it."""
    return _hashed([_SCHEMA, backbone_digest, what, *map(_version, libraries)])


def _hashed(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]


class FeatureCache:
    """Files of vectors below one folder, at most `budget_bytes` of them: the least recently used go first.

    Any number of processes may share the folder: files are written whole and never changed.
    """

    def __init__(self, folder: Path, *, budget_bytes: int) -> None:
        self._folder, self._budget_bytes = folder, budget_bytes

    def fill(self, space: str, keys: Sequence[bytes], vectors: FloatArray) -> npt.NDArray[np.bool_]:
        """Writes what is known into `vectors` float32[rows, hidden]; True for the rows it wrote."""
        is_known = np.zeros(len(keys), dtype=np.bool_)
        rows_of: dict[bytes, list[int]] = {}
        for row, key in enumerate(keys):
            rows_of.setdefault(key, []).append(row)
        for path in sorted((self._folder / space).glob("*.safetensors")):
            if is_known.all():
                break
            _take(path, rows_of, vectors, is_known)
        return is_known

    def add(self, space: str, keys: Sequence[bytes], vectors: FloatArray) -> None:
        """Keeps `vectors` float32[rows, hidden]. What does not fit, or cannot be written, is not kept."""
        if vectors.nbytes > self._budget_bytes or not len(keys):
            return
        packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_BYTES)
        data = save({"keys": packed, "vectors": vectors}, metadata={"digest": _digest(packed, vectors)})
        name = blake2b(packed.tobytes(), digest_size=KEY_BYTES).hexdigest()
        with contextlib.suppress(OSError):  # a full disk costs the next job some time, not this one its result
            self._write(self._folder / space / f"{name}.safetensors", data)
            self._evict()

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _evict(self) -> None:
        now = time.time()
        for path in self._folder.glob("*/*.partial"):
            with contextlib.suppress(OSError):  # of a process that was killed
                if now - path.stat().st_mtime > _UNFINISHED_S:
                    path.unlink()
        files = []
        for path in self._folder.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._budget_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _take(path: Path, rows_of: dict[bytes, list[int]], vectors: FloatArray, is_known: npt.NDArray[np.bool_]) -> None:
    """Copies the rows that `path` knows, if any; then it counts as used. A damaged file is removed."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            keys = file.get_tensor("keys")
            held = keys.tobytes()
            found = [(at, held[at * KEY_BYTES : (at + 1) * KEY_BYTES]) for at in range(len(held) // KEY_BYTES)]
            found = [(at, key) for at, key in found if key in rows_of]
            if not found:
                return
            values = file.get_tensor("vectors")
            is_whole = _is_whole(file.metadata(), keys, values) and values.shape[1:] == vectors.shape[1:]
    except (SafetensorError, OSError, ValueError, KeyError):
        is_whole = False
    with contextlib.suppress(OSError):
        if not is_whole:
            path.unlink()
            return
        os.utime(path)
    for at, key in found:
        rows = rows_of[key]
        vectors[rows] = values[at]
        is_known[rows] = True


def _is_whole(metadata: Any, keys: npt.NDArray[np.uint8], vectors: npt.NDArray[Any]) -> bool:
    return vectors.dtype == np.float32 and bool(metadata) and metadata.get("digest") == _digest(keys, vectors)


def _digest(keys: npt.NDArray[np.uint8], vectors: FloatArray) -> str:
    digest = blake2b(keys.tobytes(), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(vectors).tobytes())
    return digest.hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
