"""Reading and writing safetensors as numpy, strictly: the one place that opens a head's or adapter's file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from modeling.errors import WeightsInvalid

MAX_HEADER_BYTES = 1_000_000
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def to_bytes(tensors: dict[str, FloatArray], metadata: dict[str, str] | None = None) -> bytes:
    """A file of tensors and metadata; the same of these is the same to the byte."""
    data = bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, metadata=metadata))
    # The library writes metadata in the order of a hash table, which is another one each time.
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if metadata:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + ordered.ljust(length) + data[8 + length :]


def read(path: Path, *, max_bytes: int = 512 << 20) -> tuple[dict[str, FloatArray], dict[str, str]]:
    """Tensors and metadata of a file that holds float32 only. Raises `WeightsInvalid`."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise WeightsInvalid(f"{path.name} has {size} bytes, more than the {max_bytes} allowed")
        data = path.read_bytes()
        metadata = _metadata(data, path.name)
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise WeightsInvalid(f"{path.name} is not a complete safetensors file ({error})") from error
    for name, value in tensors.items():
        if value.dtype != np.float32:
            raise WeightsInvalid(f"{path.name}: {name} is {value.dtype}, only float32 is stored here")
        if not np.isfinite(value).all():
            raise WeightsInvalid(f"{path.name}: {name} holds values that are not finite")
    return tensors, metadata


def _metadata(data: bytes, name: str) -> dict[str, str]:
    if len(data) < 8:
        raise WeightsInvalid(f"{name} is not a complete safetensors file (shorter than its header)")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise WeightsInvalid(f"{name} is not a complete safetensors file (its header says {length} bytes)")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    assert isinstance(metadata, dict)
    return metadata
