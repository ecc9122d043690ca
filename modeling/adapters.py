"""LoRA adapters in PEFT's own file format, read without PEFT and fitted to a backbone's linear layers.

Files are what `peft` writes and reads (`adapter_config.json` and `adapter_model.safetensors`), so
an adapter trained here can be used elsewhere and the other way round.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
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


def _pairs(tensors: dict[str, FloatArray], scaling: float) -> dict[str, LoraPair]:
    sides: dict[str, dict[str, FloatArray]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterMismatch(f"{WEIGHTS_NAME} holds {key[:100]!r}, which is no LoRA weight")
        sides.setdefault(match["module"], {})[match["side"]] = value
    pairs = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterMismatch(f"{WEIGHTS_NAME}: the two halves of {module} do not fit each other")
        pairs[module] = LoraPair(pair["A"], (pair["B"] * scaling).astype("float32"))
    if not pairs:
        raise AdapterMismatch(f"{WEIGHTS_NAME} holds no LoRA weights")
    return pairs
