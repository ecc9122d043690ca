"""LoRA weights of many adapters, stacked: a batch names a slot per row, whatever the adapter.

`adapters_first` divides a batch into parts and `in_parts` computes them, `SlotTable` decides which adapter is in which
slot, `AdapterStacks` holds the numbers. The stacks are inputs of a graph, so adapters come and go without a change to
it. Slot 0 is zero and stays so.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from modeling.adapters import Adapter, LoraGroup, LoraLayout, LoraPair
from modeling.engines.protocol import EngineBatch, EngineOutputs
from modeling.errors import AdapterMismatch, EngineFailed
from modeling.inputs.base import Features
from modeling.weights import FloatArray, IntArray

# Ranks are padded to a multiple, so that stacks rarely change their shape and kernels meet even sizes.
RANK_STEP = 8
_FIRST_SLOTS = 8

Stack = npt.NDArray[np.generic]
Part = tuple[list[int], list[str]]
"""Rows that run together, by their numbers in the batch, and the adapters of the first of them."""
Compute = Callable[[Sequence[Features], Sequence[str], bool], tuple[FloatArray, FloatArray | None]]
"""A part's pooled vectors [rows, hidden] and, if the third argument asks for them, its states [rows, width, hidden]."""


class SlotTable:
    """Slots 1 to `capacity`, the least recently used given up first. Pure bookkeeping, no weights."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slots: OrderedDict[str, int] = OrderedDict()  # oldest use first

    def assign(self, keys: Sequence[str]) -> tuple[list[int], dict[str, int]]:
        """A slot per key, and those that are new there and must be written. At most `capacity` distinct keys."""
        distinct = dict.fromkeys(keys)
        if len(distinct) > self.capacity:
            raise ValueError(f"{len(distinct)} adapters in a batch, {self.capacity} slots")
        for key in distinct:
            if key in self._slots:
                self._slots.move_to_end(key)
        written = {}
        for key in distinct:
            if key not in self._slots:
                written[key] = self._slots[key] = self._free(distinct)
        return [self._slots[key] for key in keys], written

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those without a slot, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self._slots]

    def remove(self, key: str) -> None:
        self._slots.pop(key, None)

    def _free(self, kept: dict[str, None]) -> int:
        if len(self._slots) < self.capacity:
            used = set(self._slots.values())
            return next(slot for slot in range(1, self.capacity + 1) if slot not in used)
        victim = next(key for key in self._slots if key not in kept)
        return self._slots.pop(victim)


@dataclass(slots=True)
class _Group:
    """One group's stacks: a is [slots, in, linears × rank], b[i] is [slots, rank, out]. Rank 0: not allocated."""

    layout: LoraGroup
    rank: int = 0
    a: Stack = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    b: list[Stack] = field(default_factory=list)


class AdapterStacks:
    """The stacks of one engine. `load` and `unload` may be called from any thread, `rows` from the engine's alone.

    `dtype` is the type of the stacks and of the copies kept per adapter (float32, or bfloat16 by ml_dtypes).
    `budget_bytes` bounds the stacks; an adapter whose rank would exceed it is refused. `generation` changes
    when arrays were replaced, `take_written` gives the slots changed since, for engines that keep copies.
    """

    def __init__(
        self, layout: LoraLayout, *, capacity: int, dtype: npt.DTypeLike = np.float32, budget_bytes: int = 1 << 40
    ) -> None:
        self._groups = [_Group(group) for group in layout.groups]
        self._layout = layout
        self._dtype = np.dtype(dtype)
        self._capacity = capacity
        self._budget_bytes = budget_bytes
        self._adapters: dict[str, Adapter] = {}
        self._stale: set[str] = set()  # loaded anew or unloaded since: their slot must not be trusted
        self._lock = threading.Lock()
        self._table = SlotTable(min(_FIRST_SLOTS, capacity))
        self._written: set[int] = set()
        self.generation = 0

    @property
    def capacity(self) -> int:
        """How many distinct adapters one run can take."""
        return self._capacity

    def load(self, key: str, adapter: Adapter) -> None:
        """Raises `AdapterMismatch` where shapes or memory do not allow it; then nothing has changed."""
        self._layout.check(adapter)
        needed = self._bytes(self._table.capacity, [adapter])
        if needed > self._budget_bytes:
            raise AdapterMismatch(
                f"the adapter's rank {adapter.rank} would make the slots take {needed} bytes, more than the "
                f"{self._budget_bytes} allowed; train it with a lower rank or allow fewer slots"
            )
        packed = Adapter(adapter.rank, {name: _packed(pair, self._dtype) for name, pair in adapter.pairs.items()})
        with self._lock:
            self._adapters[key] = packed
            self._stale.add(key)

    def unload(self, key: str) -> None:
        with self._lock:
            self._adapters.pop(key, None)
            self._stale.add(key)

    def rows(self, keys: Sequence[str]) -> IntArray:
        """int64[rows]: the slot of each row's adapter, which then holds its weights. Raises `EngineFailed`."""
        with self._lock:
            for key in self._stale:
                self._table.remove(key)
            self._stale.clear()
            # An adapter with a slot is loaded, and the stacks have room for its rank.
            incoming = {key: self._adapters.get(key) for key in self._table.missing(keys)}
        adapters: dict[str, Adapter] = {}
        for key, adapter in incoming.items():
            if adapter is None:
                raise EngineFailed(f"the adapter {key!r} is not loaded")
            adapters[key] = adapter
        if adapters:
            self._make_room(len(set(keys)), list(adapters.values()))
        slots, written = self._table.assign(keys)
        for key, slot in written.items():
            self._write(slot, adapters[key])
        return np.asarray(slots, dtype=np.int64)

    def a(self, group: int) -> Stack:
        return self._groups[group].a

    def b(self, group: int, linear: int) -> Stack:
        return self._groups[group].b[linear]

    def take_written(self) -> set[int]:
        written, self._written = self._written, set()
        return written

    def adapter_bytes(self, key: str) -> int:
        """What one adapter takes apart from the slots."""
        with self._lock:
            adapter = self._adapters.get(key)
        return 0 if adapter is None else adapter.size_bytes

    def slot_bytes(self) -> int:
        """What the stacks take, however many adapters are loaded."""
        return sum(group.a.nbytes + sum(b.nbytes for b in group.b) for group in self._groups)

    def _bytes(self, slots: int, adapters: Sequence[Adapter]) -> int:
        """What the stacks would take with this many slots and room for the ranks of `adapters`."""
        return sum(
            (slots + 1)
            * max([group.rank, 1, *(_rank_of(group.layout, adapter) for adapter in adapters)])
            * _width(group.layout)
            * self._dtype.itemsize
            for group in self._groups
        )

    def _make_room(self, distinct: int, adapters: Sequence[Adapter]) -> None:
        """Grows slots by doubling and ranks as needed. Arrays are replaced, so a run in progress keeps its own."""
        slots = self._table.capacity
        while slots < min(max(len(self._adapters), distinct), self._capacity):
            slots = min(2 * slots, self._capacity)
        if self._bytes(slots, adapters) > self._budget_bytes:
            slots = max(self._table.capacity, min(distinct, self._capacity))
        self._table.capacity = slots
        for group in self._groups:
            rank = max([group.rank, 1, *(_rank_of(group.layout, adapter) for adapter in adapters)])
            if rank != group.rank or len(group.a) != slots + 1:
                self._resize(group, slots + 1, rank)

    def _resize(self, group: _Group, slots: int, rank: int) -> None:
        layout, old, kept = group.layout, group.rank, min(slots, len(group.a))
        count = len(layout.linears)
        a = np.zeros((slots, layout.in_features, count, rank), self._dtype)
        if old:
            a[:kept, :, :, :old] = group.a[:kept].reshape(kept, layout.in_features, count, old)
        group.a = a.reshape(slots, layout.in_features, count * rank)
        b = []
        for index, (_, out_features) in enumerate(layout.linears):
            stack = np.zeros((slots, rank, out_features), self._dtype)
            if old:
                stack[:kept, :old] = group.b[index][:kept]
            b.append(stack)
        group.b, group.rank = b, rank
        self.generation += 1

    def _write(self, slot: int, adapter: Adapter) -> None:
        for group in self._groups:
            group.a[slot] = 0
            for index, (name, _) in enumerate(group.layout.linears):
                group.b[index][slot] = 0
                pair = adapter.pairs.get(name)
                if pair is not None:
                    start = index * group.rank
                    group.a[slot, :, start : start + pair.rank] = pair.a.T
                    group.b[index][slot, : pair.rank] = pair.b.T
        self._written.add(slot)


def _packed(pair: LoraPair, dtype: npt.DTypeLike) -> LoraPair:
    return LoraPair(pair.a.astype(dtype), pair.b.astype(dtype))


def _rank_of(group: LoraGroup, adapter: Adapter) -> int:
    """The rank that this group's stacks need for `adapter`; 0 where it changes none of the group's layers."""
    ranks = [adapter.pairs[name].rank for name, _ in group.linears if name in adapter.pairs]
    return 0 if not ranks else -(-max(ranks) // RANK_STEP) * RANK_STEP


def _width(group: LoraGroup) -> int:
    """Values per slot and unit of rank."""
    return group.in_features * len(group.linears) + sum(out for _, out in group.linears)


def adapters_first(batch: EngineBatch, *, capacity: int) -> Iterator[Part]:
    """The runs for a batch: its rows, those with adapters first, and the adapters of these first rows.

    One run, unless the batch names more than `capacity` distinct adapters.
    """
    adapters = batch.adapters or [None] * len(batch.inputs)
    rows: list[int] = []
    keys: list[str] = []
    distinct: set[str] = set()
    # Rows of one adapter are next to each other, so that a split brings each adapter in once.
    for row, key in sorted(((r, k) for r, k in enumerate(adapters) if k is not None), key=lambda item: item[1]):
        if key not in distinct and len(distinct) == capacity:
            yield rows, keys
            rows, keys, distinct = [], [], set()
        rows.append(row)
        keys.append(key)
        distinct.add(key)
    yield rows + [row for row, key in enumerate(adapters) if key is None], keys


def in_parts(batch: EngineBatch, parts: Iterable[Part], compute: Compute, *, hidden_size: int) -> EngineOutputs:
    """Compute a batch part by part; states only of parts with a row that asks for them."""
    pooled = np.zeros((len(batch.inputs), hidden_size), dtype=np.float32)
    states: dict[int, FloatArray] = {}
    for rows, keys in parts:
        asking = [(place, row) for place, row in enumerate(rows) if row in batch.states] if batch.states else []
        pooled[rows], padded = compute([batch.inputs[row] for row in rows], keys, bool(asking))
        for place, row in asking:
            assert padded is not None
            states[row] = padded[place, : batch.inputs[row].cost].copy()  # the rest of it is not kept
    return EngineOutputs(pooled, states)
