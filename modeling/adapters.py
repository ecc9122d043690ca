"""LoRA adapters in PEFT's own file format, read without PEFT and fitted to a backbone's linear layers.

Files are what `peft` writes and reads (`adapter_config.json` and `adapter_model.safetensors`), so
an adapter trained here can be used elsewhere and the other way round.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from modeling import weights
from modeling.errors import AdapterMismatch
from modeling.weights import FloatArray

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LoraPair:
    """`delta = B @ A * scaling`: a is float32[r, in], b is float32[out, r] with the scaling multiplied in."""

    a: FloatArray
    b: FloatArray

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: one pair per linear layer it changes, by the layer's name in the encoder."""

    rank: int
    pairs: dict[str, LoraPair]

    @property
    def size_bytes(self) -> int:
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Raises `AdapterMismatch` for what is not a plain LoRA adapter, `WeightsInvalid` for a broken file."""
        try:
            config = json.loads((folder / CONFIG_NAME).read_bytes())
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterMismatch(f"{CONFIG_NAME} is missing or names no r and lora_alpha") from error
        for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if config.get(key):
                raise AdapterMismatch(f"{CONFIG_NAME} sets {key}, which this service does not serve")
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        tensors, _ = weights.read(folder / WEIGHTS_NAME)
        return cls(rank, _pairs(tensors, scaling))


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """Linear layers that read the same tensor (query, key and value, say): one product with A serves them all."""

    in_features: int
    linears: tuple[tuple[str, int], ...]  # the layer's name in the encoder and its out_features


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """Where adapters may change an encoder: every linear layer that tokens pass through, in the order they run."""

    groups: tuple[LoraGroup, ...]

    def names(self) -> list[str]:
        return [name for group in self.groups for name, _ in group.linears]

    def check(self, adapter: Adapter) -> None:
        """Raises `AdapterMismatch` where the adapter does not fit."""
        shapes = {name: (out, group.in_features) for group in self.groups for name, out in group.linears}
        for name, pair in adapter.pairs.items():
            if name not in shapes:
                raise AdapterMismatch(f"the backbone has no linear layer {name[:100]!r}")
            out_features, in_features = shapes[name]
            if (pair.b.shape[0], pair.a.shape[1]) != (out_features, in_features):
                raise AdapterMismatch(
                    f"{name}: the adapter changes a {pair.b.shape[0]}×{pair.a.shape[1]} layer, "
                    f"the backbone's is {out_features}×{in_features}"
                )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> LoraLayout:
        groups = json.loads(text)["groups"]
        return cls(tuple(LoraGroup(g["in_features"], tuple((n, o) for n, o in g["linears"])) for g in groups))


def _pairs(tensors: Mapping[str, FloatArray], scaling: float) -> dict[str, LoraPair]:
    sides: dict[str, dict[str, FloatArray]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterMismatch(f"{WEIGHTS_NAME} holds {key[:100]!r}, which is no LoRA weight")
        sides.setdefault(match["module"], {})[match["side"]] = value
    pairs = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or not _fit(pair.values()) or pair["A"].shape[0] != pair["B"].shape[1]:
            halves = " and ".join(f"{side} {'×'.join(map(str, pair[side].shape))}" for side in sorted(pair))
            raise AdapterMismatch(f"{WEIGHTS_NAME}: the two halves of {module} do not fit each other: {halves}")
        pairs[module] = LoraPair(pair["A"], (pair["B"] * scaling).astype("float32"))
    if not pairs:
        raise AdapterMismatch(f"{WEIGHTS_NAME} holds no LoRA weights")
    return pairs


def _fit(sides: Iterable[FloatArray]) -> bool:
    return all(side.ndim == 2 for side in sides)
