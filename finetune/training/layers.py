"""Which layer of an encoder a weight belongs to, and encoders whose lower layers stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from finetune.jobs.failures import RunError

# The outputs of frozen layers are kept for the whole run up to this many bytes; beyond it they are computed each time.
KEEP_BYTES = 512 << 20
_BERT_LIKE = frozenset(
    {"albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"}
)


def is_bert_like(encoder: nn.Module) -> bool:
    """Whether all layers take the same arguments, norms are layer norms, and attention is nothing but a masked softmax.

    Others mix kinds of attention, share what the first layer computes, or scale without centring.
    """
    model_type = getattr(getattr(encoder, "config", None), "model_type", None)
    return model_type is None or model_type in _BERT_LIKE


def layer_depths(encoder: nn.Module) -> dict[str, int]:
    """Depth of each parameter by name: 0 for the embeddings, 1 for the lowest layer and so on. What is in no layer,
    but is no embedding, counts for the topmost. Layers that share their weights (ALBERT) count as one."""
    place = _layers(encoder)
    if place is None:
        return {name: 0 if "embedding" in name else 1 for name, _ in encoder.named_parameters()}
    path, layers = place
    by_prefix = dict(_prefixes(path, layers))
    top = len(by_prefix)
    return {name: _depth(name, by_prefix, top) for name, _ in encoder.named_parameters()}


def freeze_below(encoder: nn.Module, top: int) -> None:
    """Only the topmost `top` layers stay trainable. Raises `RunError` where the encoder has no separate layers."""
    place = _layers(encoder)
    if place is None:
        raise RunError(
            "invalid_hyperparameters",
            "unfreeze_layers: this backbone has no separate layers, or they share their weights",
            hint="leave unfreeze_layers out",
        )
    lowest = max(0, len(dict(_prefixes(*place))) - top) + 1
    for name, depth in layer_depths(encoder).items():
        encoder.get_parameter(name).requires_grad_(depth >= lowest)


class FrozenTrunk(nn.Module):
    """Replaces an encoder's lower layers: no gradients, and each row's output is computed once.

    `expect` says which rows the next forward pass has. Kept are the states of a row's own positions; padding is masked
    in every layer above, so zeros do. What would exceed `budget_bytes` is not kept, nor anything else then.
    """

    def __init__(self, layers: Sequence[nn.Module], *, budget_bytes: int = KEEP_BYTES) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._budget_bytes = budget_bytes
        self._kept: dict[bytes, torch.Tensor] = {}
        self._kept_bytes = 0
        self._rows: list[tuple[bytes, int]] = []
        self._tail: tuple[Any, ...] | None = None  # what a layer returns beside the states

    def expect(self, inputs: Mapping[str, torch.Tensor], mask: torch.Tensor) -> None:
        arrays = [values.cpu().numpy() for values in inputs.values()]
        lengths = mask.sum(1).tolist()
        self._rows = [
            (b"".join(array[row, :length].tobytes() for array in arrays), length) for row, length in enumerate(lengths)
        ]

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows, self._rows = self._rows, []
        if rows and all(key in self._kept for key, _ in rows):
            hidden = self._padded(rows, hidden)
        else:
            hidden = self._computed(hidden, *args, **kwargs)
            for row, (key, length) in enumerate(rows):
                self._keep(key, hidden[row, :length])
        return hidden if self._tail is None else (hidden, *self._tail)

    def _keep(self, key: bytes, states: torch.Tensor) -> None:
        if key in self._kept or self._budget_bytes == 0:
            return
        self._kept[key] = states.clone()
        self._kept_bytes += states.nbytes
        if self._kept_bytes > self._budget_bytes:  # a batch of which a part is missing is computed whole
            self._kept.clear()
            self._budget_bytes = 0

    def _computed(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for layer in self.layers:
            result = layer(hidden, *args, **kwargs)
            self._tail = tuple(result[1:]) if isinstance(result, tuple) else None
            hidden = result[0] if isinstance(result, tuple) else result
        return hidden

    def _padded(self, rows: Sequence[tuple[bytes, int]], like: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(like.shape, dtype=self._kept[rows[0][0]].dtype, device=like.device)
        for row, (key, length) in enumerate(rows):
            hidden[row, :length] = self._kept[key]
        return hidden


def set_trunk(encoder: nn.Module) -> FrozenTrunk | None:
    """Puts the layers below the lowest trainable one into a `FrozenTrunk`; None where there are none, or where
    something of the encoder's own happens between them (DeBERTa v2's convolution) or they differ in kind."""
    place = _layers(encoder)
    has_more_between = getattr(getattr(encoder, "encoder", None), "conv", None) is not None
    if place is None or has_more_between or not is_bert_like(encoder):
        return None
    path, layers = place
    frozen = 0
    while frozen < len(layers) and not any(weight.requires_grad for weight in layers[frozen].parameters()):
        frozen += 1
    if not frozen:
        return None
    trunk = FrozenTrunk(list(layers)[:frozen])
    encoder.set_submodule(path, nn.ModuleList([trunk, *list(layers)[frozen:]]))
    return trunk


def unset_trunk(encoder: nn.Module) -> None:
    """Every layer is back in its place, under its own name."""
    place = _layers(encoder)
    if place is not None and isinstance(place[1][0], FrozenTrunk):
        trunk, *others = list(place[1])
        assert isinstance(trunk, FrozenTrunk)
        encoder.set_submodule(place[0], nn.ModuleList([*trunk.layers, *others]))


def _layers(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The list of the encoder's layers and its path; None if layers share their weights, or if no configuration of
    transformers says how many there are."""
    count = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    for path, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(dict(_prefixes(path, module))) == count:
            return path, module
    return None


def _prefixes(path: str, layers: nn.ModuleList) -> Iterator[tuple[str, int]]:
    """What the names of each layer's weights begin with, and its depth."""
    depth = 0
    for index, layer in enumerate(layers):
        inner = range(len(layer.layers)) if isinstance(layer, FrozenTrunk) else None
        for part in [""] if inner is None else [f"layers.{number}." for number in inner]:
            depth += 1
            yield f"{path}.{index}.{part}", depth


def _depth(name: str, by_prefix: dict[str, int], top: int) -> int:
    for prefix, depth in by_prefix.items():
        if name.startswith(prefix):
            return depth
    return 0 if "embedding" in name else top
