"""AdamW with its parameter groups, and the learning-rate schedule. Pure but for reading the model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, *, learning_rate: float, head_learning_rate: float, weight_decay: float, device: str
) -> torch.optim.AdamW:
    """AdamW over what is trainable: matrices decay, biases and norms do not, the head learns at its own rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("head."), parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": head_learning_rate if is_head else learning_rate,
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
            for (is_head, is_matrix), parameters in groups.items()
        ],
        fused=device.startswith("cuda"),
    )


def schedule(name: str, *, total_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """The factor on the learning rate at a step: linear warm-up, then cosine, linear or constant."""
    warmup = max(1, round(total_steps * warmup_ratio))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if name == "linear" else 1.0

    return factor
