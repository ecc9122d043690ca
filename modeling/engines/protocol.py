"""What every engine does: pooled vectors for a batch. Knows no head, no queue, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from modeling.adapters import Adapter
from modeling.preprocess import Encoded
from modeling.weights import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class EngineBatch:
    """Rows for one run. `adapters[i]` names the LoRA adapter of row i, None for the bare backbone."""

    inputs: Sequence[Encoded]
    adapters: Sequence[str | None] | None = None


class Engine(Protocol):
    """One backbone's weights on one runtime and device.

    `run` is called from one thread at a time; adapters may be loaded meanwhile. Engines that cannot
    mix adapters in a batch say so by `supports_adapters`.
    """

    name: str
    device: str
    precision: str
    supports_adapters: bool

    def run(self, batch: EngineBatch) -> FloatArray:
        """Pooled vectors float32[rows, hidden], in the order of the batch. Raises `EngineFailed`."""

    def load_adapter(self, key: str, adapter: Adapter) -> None:
        """Makes `adapter` usable under `key`. Raises `AdapterMismatch`; then nothing has changed."""

    def unload_adapter(self, key: str) -> None: ...

    def memory_bytes(self) -> int:
        """What the weights take, adapters apart."""


def pad(inputs: Sequence[Encoded], *, pad_id: int) -> tuple[IntArray, IntArray, IntArray]:
    """int64[rows, longest] ids, attention mask and type ids, padded on the right."""
    width = max(item.length for item in inputs)
    ids = np.full((len(inputs), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(inputs), width), dtype=np.int64)
    types = np.zeros((len(inputs), width), dtype=np.int64)
    for row, item in enumerate(inputs):
        ids[row, : item.length] = item.input_ids
        mask[row, : item.length] = 1
        types[row, : item.length] = item.type_ids
    return ids, mask, types
