"""LoRA adapters as files, in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from modeling import weights
from modeling.adapters import CONFIG_NAME, WEIGHTS_NAME, Adapter, LoraLayout, LoraPair


def random_adapter(layout: LoraLayout, *, rank: int, seed: int, share: float = 1.0, scale: float = 0.2) -> Adapter:
    """Weights on a random share of the layers, large enough to change every answer."""
    draw = np.random.default_rng(seed)
    pairs = {}
    for group in layout.groups:
        for name, out in group.linears:
            if draw.random() <= share:
                a, b = draw.normal(size=(rank, group.in_features)), draw.normal(size=(out, rank))
                pairs[name] = LoraPair((a * scale).astype(np.float32), (b * scale).astype(np.float32))
    return Adapter(rank, pairs)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """What `Adapter.read` reads back; the scaling is 1."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, pair in adapter.pairs.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": pair.a, f"base_model.model.{name}.lora_B.weight": pair.b}
    (folder / WEIGHTS_NAME).write_bytes(weights.to_bytes(tensors))
    (folder / CONFIG_NAME).write_text(json.dumps({"r": adapter.rank, "lora_alpha": adapter.rank}))
