"""What every engine does: vectors for a batch, and states for the rows that ask. Knows no head, no queue, no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from modeling.adapters import Adapter
from modeling.inputs.base import Arrays, Features
from modeling.weights import FloatArray

Collate = Callable[[Sequence[Features], int], Arrays]
"""`Preprocessor.collate`: rows to the arrays of a batch, padded to a width."""


@dataclass(frozen=True, slots=True)
class EngineBatch:
    """Rows for one run. `adapters[i]` names the LoRA adapter of row i, None for the bare backbone; `states` are the
    numbers of the rows that get the states of their positions too."""

    inputs: Sequence[Features]
    adapters: Sequence[str | None] | None = None
    states: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class EngineOutputs:
    """`pooled` is float32[rows, hidden] in the order of the batch; `states[i]` is float32[cost, hidden], one for each
    position of row i, if the batch asked for them."""

    pooled: FloatArray
    states: Mapping[int, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes: the backbone's weights, and the slots for adapters, which do not grow with each adapter."""

    weights: int
    slots: int


class Engine(Protocol):
    """One backbone's weights on one runtime and device. Rows of any number of adapters share a run.

    `run` is called from one thread at a time; adapters may be loaded and unloaded meanwhile.
    """

    name: str
    device: str
    precision: str

    def run(self, batch: EngineBatch) -> EngineOutputs:
        """Compute a batch. Raises `EngineFailed`."""

    def open_states(self, adapter: str | None) -> None:
        """Make ready to give states of rows with this adapter, so that the first of them need not wait for it. Raises
        `EngineFailed` if the engine cannot give any."""

    def width(self, longest: int) -> int:
        """Return what a batch is padded to if its longest row costs `longest`; at least that."""

    def load_adapter(self, key: str, adapter: Adapter) -> None:
        """Makes `adapter` usable under `key`. Raises `AdapterMismatch`; then nothing has changed."""

    def unload_adapter(self, key: str) -> None: ...

    def memory(self) -> MemoryUse: ...

    def adapter_bytes(self, key: str) -> int:
        """What one loaded adapter takes apart from the slots."""


def stepped_width(longest: int, *, limit: int) -> int:
    """The width to pad to where a runtime prepares itself anew for each shape: 512 lengths become 24 widths, for some
    8 % more work on rows of mixed lengths. Never more than `limit`, where the positions end, unless `longest` is."""
    step = 8 if longest <= 64 else 16 if longest <= 128 else 32
    return max(longest, min(limit, -(-longest // step) * step))
