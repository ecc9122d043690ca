"""Optimisers with their parameter groups, and the course of the learning rate. Pure but for reading the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, assert_never

import torch
from torch import nn

from finetune.jobs.hyperparameters import Scheduler
from finetune.jobs.plan import MethodPlan, TrainingPlan
from finetune.training.layers import layer_depths

_PLATEAU_FACTOR = 0.5
_CYCLE_LOW = 0.1


def build_optimizer(model: Any, plan: TrainingPlan, method: MethodPlan) -> torch.optim.Optimizer:
    """The plan's optimiser over what is trainable.

    Matrices decay, biases and norms do not. The head learns at its own rate, a backbone's layer at
    `learning_rate * layer_decay ** (layers above it, the head included)`, embeddings below the lowest. `model` has an
    `encoder` with a transformers configuration.
    """
    above = _layers_above(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head = name.startswith("head.")
        rate = method.head_learning_rate if is_head else method.learning_rate * plan.layer_decay ** above[name]
        decay = plan.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    options = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
    return _optimizer(options, plan)


def _optimizer(groups: list[dict[str, Any]], plan: TrainingPlan) -> torch.optim.Optimizer:
    match plan.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True)
        case "adam":
            return torch.optim.Adam(groups, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, momentum=plan.momentum, fused=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups, alpha=0.99, momentum=plan.momentum, foreach=True)
        case "adafactor":
            from transformers.optimization import Adafactor

            # With a rate of its own instead of one relative to the weights: LoRA's B starts at zero.
            adafactor: Any = Adafactor
            chosen: torch.optim.Optimizer = adafactor(
                groups, lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False
            )
            return chosen
    assert_never(plan.optimizer)


def _layers_above(model: Any) -> dict[str, int]:
    """How many layers are above a parameter; 1 for the uppermost layer of the backbone, since the head is above."""
    depths = layer_depths(model.encoder)
    top = max(depths.values(), default=0)
    inside = {f"encoder.{name}": top - depth + 1 for name, depth in depths.items()}
    return {name: inside.get(name, 1) for name, _ in model.named_parameters()}


def schedule(name: Scheduler, *, total_steps: int, warmup_ratio: float, epochs: float = 1.0) -> Callable[[int], float]:
    """The factor on the learning rate at a step: linear warm-up, then cosine, linear or constant.

    `cyclic` rises and falls once an epoch between a tenth and one, after Smith (2017). `plateau` is constant here;
    what evaluations without a gain take off is `plateau_factor`.
    """
    warmup = max(1, round(total_steps * warmup_ratio))
    cycles = max(1, round(epochs))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if name == "cyclic":
            # The first cycle begins at its top, where the warm-up ended; the last ends at the bottom.
            return _CYCLE_LOW + (1 - _CYCLE_LOW) * abs(1 - (progress * (2 * cycles - 1)) % 2)
        return 1 - progress if name == "linear" else 1.0

    return factor


def plateau_factor(evaluations_without_gain: int) -> float:
    """The rate is halved at each evaluation without a gain, and stays so: the argument counts those of the run."""
    return float(_PLATEAU_FACTOR**evaluations_without_gain)
