"""Linear layers that add each row's own LoRA change. Used by the torch engine and, traced, by the exported graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from modeling.adapters import LoraGroup, LoraLayout
from modeling.networks.base import Network

# For (group) the A and for (group, linear) the B of the rows that run now.
GatherA = Callable[[int], torch.Tensor]
GatherB = Callable[[int, int], torch.Tensor]


@dataclass(slots=True)
class Routing:
    """What the layers need to know of the run in progress; one thread writes and reads it.

    The first `rows` rows of the batch have adapters, all of them if None. `a(group)` is [rows, in, linears × rank]
    and `b(group, linear)` [rows, rank, out]; without the leading axis they hold for all rows alike.
    """

    rows: int | None = 0
    a: GatherA | None = None
    b: GatherB | None = None
    projected: dict[int, torch.Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        self.rows, self.a, self.b = 0, None, None
        self.projected.clear()


class RoutedLinear(nn.Module):
    """`y = base(x)`, and for the rows with an adapter `y += (x @ A) @ B`. x is [batch, positions, in]."""

    def __init__(self, base: nn.Linear, routing: Routing, *, group: int, index: int, group_size: int) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.group, self.index, self.group_size = group, index, group_size

    @property
    def weight(self) -> torch.Tensor:
        """T5 asks its last layer for the type that it computes in."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        rows = self.routing.rows
        if rows is None:
            return y + self._delta(x)
        if rows:
            y[:rows] += self._delta(x[:rows])
        return y

    def _delta(self, x: torch.Tensor) -> torch.Tensor:
        routing = self.routing
        assert routing.a is not None and routing.b is not None
        if self.index == 0:  # the others of the group read the same x
            routing.projected[self.group] = x @ routing.a(self.group)
        h, b = routing.projected[self.group], routing.b(self.group, self.index)
        if self.group_size > 1:
            rank = b.shape[-2]
            h = h[..., self.index * rank : (self.index + 1) * rank]
        return h @ b


def route(encoder: nn.Module, routing: Routing, network: Network) -> LoraLayout:
    """Replace every linear layer that positions pass through by a `RoutedLinear`; says where they are.

    One forward pass on two positions shows the order and which layers read the same tensor.
    """
    groups = _groups(encoder, network)
    layout = []
    for number, names in enumerate(groups):
        linears: list[Any] = [encoder.get_submodule(name) for name in names]
        outputs = tuple((name, linear.out_features) for name, linear in zip(names, linears, strict=True))
        layout.append(LoraGroup(linears[0].in_features, outputs))
        for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
            routed = RoutedLinear(linear, routing, group=number, index=index, group_size=len(names))
            encoder.set_submodule(name, routed)
    return LoraLayout(tuple(layout))


def _groups(encoder: nn.Module, network: Network) -> list[list[str]]:
    seen: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            # Layers that a model runs several times (ALBERT) keep the place of their first run.
            if name not in seen and args and args[0].dim() == 3:
                seen[name] = args[0]

        return hook

    linears = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(record(name)) for name, module in linears]
    try:
        with torch.inference_mode():
            network.states(encoder, network.example(encoder, rows=1, positions=2))
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    inputs: list[torch.Tensor] = []
    for name, x in seen.items():
        if inputs and inputs[-1] is x:
            groups[-1].append(name)
        else:
            groups.append([name])
            inputs.append(x)
    return groups
