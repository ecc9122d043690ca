"""A file that says which batches were formed: one JSON object a line, enough to run the same ones through an engine."""

from __future__ import annotations

import json
from pathlib import Path

from service.inference.queue import Batch


class BatchLog:
    """Appends to `path`. A write per batch on the event loop: for measurements, and off otherwise."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def close(self) -> None:
        self._file.close()

    def __call__(self, name: tuple[str, str], batch: Batch) -> None:
        """`lengths` and `adapters` are in the order of the rows."""
        line = {
            "backbone": name[0],
            "engine": batch.engine,
            "width": batch.width,
            "seconds": round(batch.seconds, 6),
            "lengths": [entry.length for entry in batch.entries],
            "adapters": [entry.ticket.model.adapter_key for entry in batch.entries],
        }
        self._file.write(json.dumps(line) + "\n")
