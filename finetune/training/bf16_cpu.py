"""bf16 on a CPU without autocast: what a training step computes while `computing` is open.

Autocast casts every operand at every call, keeps norms in fp32, and leaves LoRA's thin products in fp32. Here the
states stay in bf16 throughout, weights stay in fp32, and each linear layer keeps a bf16 copy of what it multiplies by
until its weight changes. A LoRA layer's copy is of `W + s B A`, so the adapter costs the forward pass nothing. The
sum is rounded once, from fp32: changes smaller than W's own rounding are not lost, they shift which way it goes.

Attention is plain and in chunks, see `finetune.training.attention`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from finetune.training import attention

_BF16 = torch.bfloat16


class Copies:
    """The bf16 copies of a model's weights. Torch's fused optimisers change weights without raising their version, so
    the caller of `step` says so with `expire`."""

    def __init__(self) -> None:
        self.generation = 0

    def expire(self) -> None:
        self.generation += 1

    def of(self, make: Callable[[], torch.Tensor], *sources: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A function that gives `make()`, made anew when a source has changed."""
        made: tuple[tuple[int, ...], torch.Tensor] | None = None

        def copy() -> torch.Tensor:
            nonlocal made
            versions = (self.generation, *(source._version for source in sources))
            if made is None or made[0] != versions:
                with torch.no_grad():
                    made = versions, make()
            return made[1]

        return copy

    def of_bias(self, bias: torch.Tensor | None) -> Callable[[], torch.Tensor | None]:
        return (lambda: None) if bias is None else self.of(lambda: bias.to(_BF16), bias)


@contextlib.contextmanager
def computing(encoder: nn.Module) -> Iterator[Copies]:
    """Linear layers, norms and attention of `encoder` compute in bf16 inside; weights and gradients stay in fp32.

    After a step of the optimiser the copies given must `expire`.
    """
    copies = Copies()
    replaced: list[nn.Module] = []
    inside_lora: set[nn.Module] = set()
    for module in encoder.modules():
        forward = _forward_of(module, copies)
        if forward is None or module in inside_lora:
            continue
        if _is_plain_lora(module):
            inside_lora |= set(module.modules())
        module.forward = forward
        replaced.append(module)
    with attention.chunked(encoder):
        try:
            yield copies
        finally:
            for module in replaced:
                del module.forward


def _forward_of(module: nn.Module, copies: Copies) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if _is_plain_lora(module):
        return _lora_forward(module, copies)
    if isinstance(module, nn.Linear):
        return _linear_forward(module, copies)
    return _norm_forward(module) if isinstance(module, nn.LayerNorm) else None


# Linear layers


class _Product(torch.autograd.Function):
    """`x Wᵀ + b` in bf16; the gradients of W and b are returned in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        copy: torch.Tensor,
        bias_copy: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, copy)
        return F.linear(x, copy, bias_copy)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, copy = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = gradient @ copy if ctx.needs_input_grad[0] else None
        of_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).float() if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None


class _LowRankProduct(torch.autograd.Function):
    """`x (W + s B A)ᵀ + b` in bf16 for a frozen W, with the gradients of A and B in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        copy: torch.Tensor,
        bias_copy: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b, copy)
        ctx.scaling = scaling
        return F.linear(x, copy, bias_copy)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, copy = ctx.saved_tensors
        of_x = gradient @ copy if ctx.needs_input_grad[0] else None
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        of_a = (rows @ b.to(_BF16)).t() @ inputs
        of_b = rows.t() @ (inputs @ a.to(_BF16).t())
        return of_x, of_a.float() * ctx.scaling, of_b.float() * ctx.scaling, None, None, None


_PRODUCT: Any = _Product.apply
_LOW_RANK_PRODUCT: Any = _LowRankProduct.apply


def _linear_forward(module: nn.Linear, copies: Copies) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = module.weight, module.bias
    copy, bias_copy = copies.of(lambda: weight.to(_BF16), weight), copies.of_bias(bias)

    def forward(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _PRODUCT(x.to(_BF16), weight, bias, copy(), bias_copy())
        return product

    return forward


def _is_plain_lora(module: nn.Module) -> bool:
    """Whether this is a LoRA layer of PEFT's that is nothing but `W + s B A`: no dropout, no variant such as DoRA."""
    from peft.tuners.lora import Linear

    if not isinstance(module, Linear) or len(module.active_adapters) != 1 or module.merged or module.disable_adapters:
        return False
    (name,) = module.active_adapters
    return (
        name in module.lora_A
        and name not in module.lora_variant
        and isinstance(module.lora_dropout[name], nn.Identity)
        and isinstance(module.base_layer, nn.Linear)
        and module.lora_A[name].bias is None
        and module.lora_B[name].bias is None
        and not module.base_layer.weight.requires_grad
    )


def _lora_forward(module: Any, copies: Copies) -> Callable[[torch.Tensor], torch.Tensor]:
    (name,) = module.active_adapters
    weight, bias = module.base_layer.weight, module.base_layer.bias
    a, b, scaling = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    copy = copies.of(lambda: torch.addmm(weight, b, a, alpha=scaling).to(_BF16), weight, a, b)
    bias_copy = copies.of_bias(bias)

    def forward(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _LOW_RANK_PRODUCT(x.to(_BF16), a, b, scaling, copy(), bias_copy())
        return product

    return forward


# Norms


def _norm_forward(module: nn.LayerNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.to(_BF16), module.normalized_shape, module.weight, module.bias, module.eps)

    return forward
