"""The reference engine: PyTorch, with LoRA adapters applied per row beside the frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from modeling.adapters import Adapter
from modeling.backbone import Backbone
from modeling.engines.protocol import EngineBatch, EngineOutputs, MemoryUse
from modeling.engines.slots import AdapterStacks, Stack, adapters_first, in_parts
from modeling.errors import EngineFailed
from modeling.heads import DenseLayer, TaskHead
from modeling.ingestion.base import DENSE_FILE
from modeling.inputs import Features, open_preprocessor
from modeling.multi_lora import Routing, route
from modeling.networks import NETWORKS
from modeling.weights import FloatArray, IntArray

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STACK_DTYPES = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}


class TorchEngine:
    """One encoder on one device. `precision` is fp32, bf16 or fp16; outputs are always float32.

    With `is_compiled` batches without adapters run through torch.compile with dynamic shapes; the first are slow.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        device: str = "cpu",
        precision: str = "fp32",
        adapter_slots: int = 32,
        slots_budget_bytes: int = 1 << 40,
        is_compiled: bool = False,
    ) -> None:
        self.name = "torch-compile" if is_compiled else "torch"
        self.device = device
        self.precision = precision
        self._pooler = Pooler.of(backbone).to(device)
        self._hidden_size = backbone.info.hidden_size
        self._network = NETWORKS[backbone.info.modality]
        self._collate = open_preprocessor(backbone).collate
        encoder = self._network.load(backbone.folder, dtype=_DTYPES[precision]).to(device)
        self._routing = Routing()
        layout = route(encoder, self._routing, self._network)
        self._stacks = AdapterStacks(
            layout, capacity=adapter_slots, dtype=_STACK_DTYPES[precision], budget_bytes=slots_budget_bytes
        )
        self._weights_bytes = sum(parameter.nbytes for parameter in encoder.parameters())
        self._copies = _DeviceCopies(self._stacks, device)
        self._encoder = encoder
        self._compiled: Any = torch.compile(encoder, dynamic=True) if is_compiled else None

    @torch.inference_mode()
    def run(self, batch: EngineBatch) -> EngineOutputs:
        parts = adapters_first(batch, capacity=self._stacks.capacity)
        try:
            return in_parts(batch, parts, self._compute, hidden_size=self._hidden_size)
        except RuntimeError as error:  # out of memory, and what torch.compile raises, are of this class
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EngineFailed(f"torch could not compute a batch of {len(batch.inputs)} ({text[:300]})") from error

    def open_states(self, adapter: str | None) -> None:
        """It computes them for every batch."""

    def width(self, longest: int) -> int:
        return longest

    def load_adapter(self, key: str, adapter: Adapter) -> None:
        self._stacks.load(key, adapter)

    def unload_adapter(self, key: str) -> None:
        self._stacks.unload(key)

    def memory(self) -> MemoryUse:
        return MemoryUse(self._weights_bytes, self._stacks.slot_bytes() + self._copies.extra_bytes())

    def adapter_bytes(self, key: str) -> int:
        return self._stacks.adapter_bytes(key)

    def _compute(
        self, rows: Sequence[Features], keys: Sequence[str], has_states: bool
    ) -> tuple[FloatArray, FloatArray | None]:
        arrays = self._collate(rows, max(row.cost for row in rows))
        inputs = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        try:
            if keys:
                self._route(self._stacks.rows(keys))
            encoder = self._encoder if keys or self._compiled is None else self._compiled
            states = self._network.states(encoder, inputs)
            pooled = self._pooler(states, self._network.mask(inputs)).cpu().numpy()
            return pooled, states.float().cpu().numpy() if has_states else None
        finally:
            self._routing.clear()

    def _route(self, slots: IntArray) -> None:
        """One adapter for all its rows is a plain product; several are gathered, a pair of matrices per row."""
        copies, routing = self._copies, self._routing
        copies.refresh()
        routing.rows = len(slots)
        index: Any = int(slots[0]) if (slots == slots[0]).all() else torch.from_numpy(slots).to(self.device)
        routing.a = lambda group: copies.a(group)[index]
        routing.b = lambda group, linear: copies.b(group, linear)[index]


class _DeviceCopies:
    """The stacks as tensors on the engine's device; on the CPU they are the same memory."""

    def __init__(self, stacks: AdapterStacks, device: str) -> None:
        self._stacks, self._device = stacks, device
        self._is_shared = device == "cpu"
        self._generation = 0
        self._a: dict[int, torch.Tensor] = {}
        self._b: dict[tuple[int, int], torch.Tensor] = {}

    def a(self, group: int) -> torch.Tensor:
        if group not in self._a:
            self._a[group] = _tensor(self._stacks.a(group)).to(self._device)
        return self._a[group]

    def b(self, group: int, linear: int) -> torch.Tensor:
        if (group, linear) not in self._b:
            self._b[group, linear] = _tensor(self._stacks.b(group, linear)).to(self._device)
        return self._b[group, linear]

    def refresh(self) -> None:
        """Takes over what changed since the last run."""
        written = sorted(self._stacks.take_written())
        if self._generation != self._stacks.generation:
            self._generation = self._stacks.generation
            self._a.clear()
            self._b.clear()
        elif written and not self._is_shared:
            for group, tensor in self._a.items():
                tensor[written] = _tensor(self._stacks.a(group)[written]).to(self._device)
            for (group, linear), tensor in self._b.items():
                tensor[written] = _tensor(self._stacks.b(group, linear)[written]).to(self._device)

    def extra_bytes(self) -> int:
        return 0 if self._is_shared else sum(tensor.nbytes for tensor in (*self._a.values(), *self._b.values()))


def _tensor(stack: Stack) -> torch.Tensor:
    """The same memory; torch does not know numpy's bfloat16 by name."""
    if stack.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(stack.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stack)


class Pooler(nn.Module):
    """States [rows, positions, hidden] to one vector per row, float32: pooled, then through the backbone's dense
    layers. Its weights stay as they are, also in a fine-tune."""

    def __init__(self, pooling: str, dense: Sequence[DenseLayer] = ()) -> None:
        super().__init__()
        self.pooling, self.activations = pooling, [layer.activation for layer in dense]
        for index, layer in enumerate(dense):
            self.register_buffer(f"weight{index}", torch.from_numpy(layer.weight), persistent=False)
            self.register_buffer(f"bias{index}", torch.from_numpy(layer.bias), persistent=False)

    @classmethod
    def of(cls, backbone: Backbone) -> Pooler:
        """Raises `WeightsInvalid`."""
        file = backbone.folder / DENSE_FILE
        return cls(backbone.info.pooling, TaskHead.read(file).layers if file.is_file() else ())

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        vectors = pool(states, mask, self.pooling).float()
        for index, activation in enumerate(self.activations):
            weight, bias = self.get_buffer(f"weight{index}"), self.get_buffer(f"bias{index}")
            vectors = _ACTIVATIONS[activation](functional.linear(vectors, weight, bias))
        return vectors


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
}


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Reduce states [rows, positions, hidden], padded behind, to one vector per row; several poolings are joined by
    `+`, and so are their vectors."""
    vectors = [_POOLED[mode](states, mask) for mode in pooling.split("+")]
    return vectors[0] if len(vectors) == 1 else torch.cat([vector.float() for vector in vectors], dim=-1)


def _first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states[:, 0]


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    places = (mask.sum(1) - 1).clamp(min=0)
    return states.gather(1, places[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]


def _largest(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(states.dtype).min).amax(1)


# Sums are in float32: hundreds of states can exceed what fp16 holds.
def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).float()
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _mean_sqrt(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).float()
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()


def _weighted_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of n positions the first counts 1/n of what the last does (Muennighoff, 2022, arXiv:2202.08904)."""
    weights = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).unsqueeze(-1).float()
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


_POOLED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "lasttoken": _last,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
}
