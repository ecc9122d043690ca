"""The reference engine: PyTorch, with LoRA adapters applied per row beside the frozen weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from modeling.adapters import Adapter
from modeling.backbone import Backbone, load_encoder
from modeling.engines.protocol import EngineBatch, pad
from modeling.errors import AdapterMismatch, EngineFailed
from modeling.weights import FloatArray

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """One encoder on one device. `precision` is fp32, bf16 or fp16; outputs are always float32."""

    name = "torch"
    supports_adapters = True

    def __init__(self, backbone: Backbone, *, device: str = "cpu", precision: str = "fp32") -> None:
        self.device = device
        self.precision = precision
        self._pooling = backbone.info.pooling
        self._encoder = load_encoder(backbone.folder, dtype=_DTYPES[precision]).to(device)
        config: Any = self._encoder.config
        self._pad_id = int(config.pad_token_id or 0)
        self._takes_types = takes_type_ids(config)
        self._routes = _Routes()
        self._linears = _wrap_linears(self._encoder, self._routes)

    @torch.inference_mode()
    def run(self, batch: EngineBatch) -> FloatArray:
        ids, mask, types = (torch.from_numpy(array).to(self.device) for array in pad(batch.inputs, pad_id=self._pad_id))
        extra = {"token_type_ids": types} if self._takes_types else {}
        try:
            with self._routes.of(batch, self.device):
                states = self._encoder(input_ids=ids, attention_mask=mask, **extra).last_hidden_state
            return pool(states, mask, self._pooling).float().cpu().numpy()
        except RuntimeError as error:
            raise EngineFailed(f"torch could not compute a batch of {len(batch.inputs)} ({error})") from error

    def load_adapter(self, key: str, adapter: Adapter) -> None:
        unknown = sorted(set(adapter.pairs) - set(self._linears))
        if unknown:
            raise AdapterMismatch(f"the backbone has no linear layer {unknown[0][:100]!r}")
        for name, pair in adapter.pairs.items():
            base = self._linears[name].base
            if (pair.b.shape[0], pair.a.shape[1]) != tuple(base.weight.shape):
                raise AdapterMismatch(
                    f"{name}: the adapter changes a {pair.b.shape[0]}×{pair.a.shape[1]} layer, "
                    f"the backbone's is {base.weight.shape[0]}×{base.weight.shape[1]}"
                )
        dtype = _DTYPES[self.precision]
        for name, pair in adapter.pairs.items():
            a, b = (torch.from_numpy(side).to(self.device, dtype) for side in (pair.a, pair.b))
            self._linears[name].pairs[key] = (a, b)

    def unload_adapter(self, key: str) -> None:
        for linear in self._linears.values():
            linear.pairs.pop(key, None)

    def memory_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._encoder.parameters())


def takes_type_ids(config: Any) -> bool:
    """Whether the encoder tells the two halves of a pair apart by segment ids."""
    return getattr(config, "type_vocab_size", 0) > 1 and config.model_type != "distilbert"


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Token states [rows, length, hidden] to one vector a row: the first token's, or the mean over unmasked ones."""
    if pooling == "cls":
        return states[:, 0]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


@dataclass(slots=True)
class _Routes:
    """Which rows of the batch that runs now go through which adapter. One engine thread writes and reads it."""

    whole_batch: str | None = None
    rows: dict[str, torch.Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def of(self, batch: EngineBatch, device: str) -> Iterator[None]:
        keys = batch.adapters or []
        distinct = {key for key in keys if key is not None}
        if len(distinct) == 1 and None not in keys:
            self.whole_batch = next(iter(distinct))
        else:
            for key in distinct:
                rows = [row for row, candidate in enumerate(keys) if candidate == key]
                self.rows[key] = torch.tensor(rows, device=device)
        try:
            yield
        finally:
            self.whole_batch = None
            self.rows.clear()


class _RoutedLinear(nn.Module):
    """A frozen linear layer and the low-rank changes that adapters make to it for their rows."""

    def __init__(self, base: nn.Linear, routes: _Routes) -> None:
        super().__init__()
        self.base = base
        self.routes = routes
        self.pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if self.routes.whole_batch is not None and self.routes.whole_batch in self.pairs:
            a, b = self.pairs[self.routes.whole_batch]
            return y + (x @ a.T) @ b.T
        for key, rows in self.routes.rows.items():
            if key in self.pairs:
                a, b = self.pairs[key]
                y.index_add_(0, rows, (x[rows] @ a.T) @ b.T)
        return y


def _wrap_linears(encoder: nn.Module, routes: _Routes) -> dict[str, _RoutedLinear]:
    wrapped = {}
    for name, module in list(encoder.named_modules()):
        if isinstance(module, nn.Linear):
            wrapped[name] = _RoutedLinear(module, routes)
            encoder.set_submodule(name, wrapped[name])
    return wrapped
