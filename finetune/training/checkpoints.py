"""Resume state on disk: safetensors and JSON, never pickle.

`latest.json` is replaced last and names the tensors' file, so a crash or a full disk at any moment
leaves the checkpoint before it in force.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

_LATEST = "latest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name and the rest of a run's state as JSON."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, step: int) -> None:
    """Writes a checkpoint and removes older ones. Raises `OSError` with the one before untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{step}.safetensors"
    data = save({key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()})
    _write_durably(folder / name, data)
    document = {"tensors": name, "sha256": hashlib.sha256(data).hexdigest(), "state": checkpoint.state}
    _write_durably(folder / _LATEST, json.dumps(document).encode())
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None where there is none that can be trusted."""
    try:
        document = json.loads((folder / _LATEST).read_bytes())
        data = (folder / Path(document["tensors"]).name).read_bytes()
        if hashlib.sha256(data).hexdigest() != document["sha256"]:
            return None
        return Checkpoint(load(data), document["state"])
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
