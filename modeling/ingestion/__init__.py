"""What of a checkpoint each modality keeps, by its name in `modeling.inputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from modeling.errors import UnsupportedArchitecture
from modeling.ingestion.base import Checkpoint, Pooling, Reader, read_config
from modeling.ingestion.text import TextReader

__all__ = ["READERS", "Checkpoint", "Pooling", "Reader", "modality_of", "read_config"]

READERS: Final[dict[str, Reader]] = {"text": TextReader()}


def modality_of(config: Mapping[str, Any]) -> str:
    """Raises `UnsupportedArchitecture`."""
    for name, reader in READERS.items():
        if str(config["model_type"]) in reader.model_types:
            return name
    supported = ", ".join(sorted(frozenset().union(*(reader.model_types for reader in READERS.values()))))
    raise UnsupportedArchitecture(
        f"model_type {str(config['model_type'])[:40]!r} is not supported; supported are {supported}"
    )
