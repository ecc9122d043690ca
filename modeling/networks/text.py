"""Text encoders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling.encoder import load_encoder
from modeling.inputs.text import takes_type_ids
from modeling.networks.base import Tensors


class TextNetwork:
    def load(self, folder: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
        return load_encoder(folder, dtype=dtype)

    def states(self, module: nn.Module, inputs: Tensors) -> torch.Tensor:
        states: torch.Tensor = module(**inputs).last_hidden_state
        return states

    def mask(self, inputs: Tensors) -> torch.Tensor:
        return inputs["attention_mask"]

    def example(self, module: nn.Module, *, rows: int, positions: int) -> dict[str, torch.Tensor]:
        config: Any = module.config
        names = ["input_ids", "attention_mask"]
        if takes_type_ids({"type_vocab_size": 0, **config.to_dict()}):
            names.append("token_type_ids")
        device = next(module.parameters()).device
        return {name: torch.ones(rows, positions, dtype=torch.int64, device=device) for name in names}

    def axes(self, name: str) -> dict[int, str]:
        return {0: "batch", 1: "length"}
