"""Encoders with small trained modules that cannot be merged into their weights: bottleneck adapters and soft prompts.

A backbone folder that holds `composition.json` is such an encoder: what it says is built around the plain weights of
the same folder. Outwards it is like any other: token ids in, one state for each token out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from modeling.backbone import COMPOSITION_FILE, COMPOSITION_WEIGHTS
from modeling.errors import BackboneUnavailable

# The linear layers at the end of attention and of feed-forward, just before the residual is added.
_SUBLAYER_ENDS = (
    "attention.output.dense",
    "output.dense",
    "attention.out_lin",
    "ffn.lin2",
    "attention.attn.o",
    "attention.dense",
    "ffn_output",
    *("attn.Wo", "mlp.Wo", "self_attn.o_proj", "mlp.down_proj", "SelfAttention.o", "DenseReluDense.wo"),
)
_LARGEST = 4096


@dataclass(frozen=True, slots=True)
class Composition:
    """`bottleneck`: `size` is the adapters' inner width; `prompt`: the number of virtual tokens before each text."""

    kind: Literal["bottleneck", "prompt"]
    size: int


class Bottleneck(nn.Module):
    """`y + up(gelu(down(y)))` behind a linear layer `y = base(x)` (Houlsby et al., 2019). Starts as the identity."""

    def __init__(self, base: nn.Linear, size: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.out_features, size)
        self.up = nn.Linear(size, base.out_features)
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    @property
    def weight(self) -> torch.Tensor:
        """T5 asks its last layer for the type that it computes in."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        delta: torch.Tensor = self.up(nn.functional.gelu(self.down(y)))
        return y + delta


class PromptedEncoder(nn.Module):
    """Learnt vectors come before each text's own (Lester et al., EMNLP 2021); their states are cut off again, so that
    nothing above pools over them."""

    def __init__(self, encoder: nn.Module, tokens: int) -> None:
        super().__init__()
        self.encoder = encoder
        embeddings: Any = encoder.get_input_embeddings()  # type: ignore[operator]
        width = int(embeddings.weight.shape[1])
        # Starts from vectors of the vocabulary: random ones of another size would drown the text at first.
        rows = torch.linspace(0, len(embeddings.weight) - 1, tokens).long()
        self.prompt = nn.Parameter(embeddings.weight.detach()[rows].clone().reshape(tokens, width))

    @property
    def config(self) -> Any:
        return self.encoder.config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> Any:
        embeddings: Any = self.encoder.get_input_embeddings()  # type: ignore[operator]
        embedded = embeddings(input_ids)
        prompt = self.prompt.to(embedded.dtype).unsqueeze(0).expand(embedded.shape[0], -1, -1)
        tokens = self.prompt.shape[0]
        extra = {} if token_type_ids is None else {"token_type_ids": nn.functional.pad(token_type_ids, (tokens, 0))}
        output = self.encoder(
            inputs_embeds=torch.cat([prompt, embedded], 1),
            attention_mask=nn.functional.pad(attention_mask, (tokens, 0), value=1),
            **extra,
        )
        output.last_hidden_state = output.last_hidden_state[:, tokens:]
        return output


def compose(encoder: nn.Module, composition: Composition) -> nn.Module:
    """The encoder with untrained modules of this kind in it; its own weights stay as they are. New weights are
    trainable."""
    if composition.kind == "prompt":
        return PromptedEncoder(encoder, composition.size)
    ends = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear) and _ends_sublayer(name)]
    if not ends:
        raise BackboneUnavailable("no place for bottleneck adapters is known in this encoder")
    for name in ends:
        base: Any = encoder.get_submodule(name)
        encoder.set_submodule(name, Bottleneck(base, composition.size))
    return encoder


def own_weights(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that `compose` added, by name."""
    return {name: value for name, value in encoder.state_dict().items() if _is_own(name)}


def plain_weights(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that were there before, under the names they had."""
    plain = {name: value for name, value in encoder.state_dict().items() if not _is_own(name)}
    if isinstance(encoder, PromptedEncoder):
        return {name.removeprefix("encoder."): value for name, value in plain.items()}
    return {name.replace(".base.", "."): value for name, value in plain.items()}


def write_composition(folder: Path, encoder: nn.Module, composition: Composition) -> None:
    """Writes the two files that `read_composed` reads."""
    from safetensors.torch import save_file

    weights = {name: value.detach().cpu().float().contiguous() for name, value in own_weights(encoder).items()}
    save_file(weights, str(folder / COMPOSITION_WEIGHTS))
    (folder / COMPOSITION_FILE).write_text(json.dumps(asdict(composition)))


def read_composed(encoder: nn.Module, folder: Path) -> nn.Module:
    """`encoder` with what the folder's composition adds; itself where there is none. Raises `BackboneUnavailable`."""
    from safetensors.torch import load_file

    if not (folder / COMPOSITION_FILE).is_file():
        return encoder
    try:
        composition = _parse(json.loads((folder / COMPOSITION_FILE).read_bytes()))
        weights = load_file(str(folder / COMPOSITION_WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BackboneUnavailable(f"{folder.name}: the composition cannot be read ({type(error).__name__})") from error
    dtype = next(encoder.parameters()).dtype
    composed = compose(encoder, composition).to(dtype)
    wanted = own_weights(composed)
    misfits = [name for name, value in wanted.items() if name not in weights or weights[name].shape != value.shape]
    if misfits or set(weights) - set(wanted):
        raise BackboneUnavailable(f"{folder.name}: {COMPOSITION_WEIGHTS} does not fit {COMPOSITION_FILE}")
    composed.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, strict=False)
    return composed.eval()


def _parse(values: Any) -> Composition:
    kind, size = values["kind"], values["size"]
    if kind not in {"bottleneck", "prompt"} or not isinstance(size, int) or not 1 <= size <= _LARGEST:
        raise ValueError("unknown composition")
    return Composition(kind, size)


def _ends_sublayer(name: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in _SUBLAYER_ENDS)


def _is_own(name: str) -> bool:
    return name == "prompt" or any(f".{part}." in f".{name}" for part in _OWN_PARTS)


_OWN_PARTS = ("down", "up")
