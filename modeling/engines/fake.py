"""An engine without a model: vector and states are a fixed function of a row's first array. For tests of what is around
it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from modeling.adapters import Adapter
from modeling.engines.protocol import EngineBatch, EngineOutputs, MemoryUse
from modeling.engines.slots import in_parts
from modeling.errors import EngineFailed
from modeling.inputs.base import Features
from modeling.weights import FloatArray, IntArray


class FakeEngine:
    """`before_run(batch)` may block, raise or record; a row that holds `poison` fails its whole batch."""

    name = "fake"
    device = "cpu"
    precision = "fp32"

    def __init__(
        self,
        hidden_size: int = 8,
        *,
        before_run: Callable[[EngineBatch], None] | None = None,
        poison: int | None = None,
    ) -> None:
        self._hidden_size = hidden_size
        self._before_run = before_run
        self._poison = poison
        self._adapters: dict[str, Adapter] = {}
        self._lock = threading.Lock()

    def run(self, batch: EngineBatch) -> EngineOutputs:
        if self._before_run is not None:
            self._before_run(batch)
        if self._poison is not None and any(self._poison in _values(item) for item in batch.inputs):
            raise EngineFailed("a poisoned row")
        adapters = batch.adapters or [None] * len(batch.inputs)
        parts = (([row], [] if key is None else [key]) for row, key in enumerate(adapters))
        return in_parts(batch, parts, self._compute, hidden_size=self._hidden_size)

    def open_states(self, adapter: str | None) -> None:
        """There is nothing to open."""

    def width(self, longest: int) -> int:
        return longest

    def load_adapter(self, key: str, adapter: Adapter) -> None:
        with self._lock:
            self._adapters[key] = adapter

    def unload_adapter(self, key: str) -> None:
        with self._lock:
            self._adapters.pop(key, None)

    def memory(self) -> MemoryUse:
        return MemoryUse(0, 0)

    def adapter_bytes(self, key: str) -> int:
        adapter = self._adapters.get(key)
        return 0 if adapter is None else adapter.size_bytes

    def _compute(
        self, rows: Sequence[Features], keys: Sequence[str], has_states: bool
    ) -> tuple[FloatArray, FloatArray | None]:
        (row,) = rows
        vector = self._vector(_values(row), keys[0] if keys else None)
        return vector[None], vector + np.arange(row.cost, dtype=np.float32)[None, :, None]

    def _vector(self, ids: IntArray, adapter: str | None) -> FloatArray:
        shift = 0 if adapter is None else self._adapters[adapter].rank
        seed = int((ids * np.arange(1, len(ids) + 1)).sum()) % (1 << 31)
        return np.random.default_rng(seed).normal(size=self._hidden_size).astype(np.float32) + np.float32(shift)


def _values(row: Features) -> IntArray:
    """The row's first array."""
    values: IntArray = next(iter(row.arrays.values()))
    return values
