"""Attention in bf16 on a CPU, forward and backward, without torch's fused kernel.

That kernel's backward pass is slow in bf16 on a CPU, so scores and weights are computed as they are in the
formula. They are the largest tensors of a pass by far, so a few rows at a time are taken through it: their scores
stay in the processor's cache from the product to the softmax, and the gradients of their weights likewise
(docs/log.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, eager_mask

_NAME = "polyhead_chunked"
_BF16 = torch.bfloat16
CHUNK_BYTES = 2_000_000  # of scores at once


@contextlib.contextmanager
def chunked(encoder: nn.Module) -> Iterator[None]:
    """Attention by `attend` inside, in models of transformers that let it be chosen."""
    models: list[Any] = [
        module
        for module in encoder.modules()
        if hasattr(module, "set_attn_implementation") and getattr(module.config, "_attn_implementation", "") == "sdpa"
    ]
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, _mask)
    for model in models[:1]:
        model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        for model in models[:1]:
            model.set_attn_implementation("sdpa")


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[rows, length, heads, size] of queries, keys and values [rows, heads, length, size]; the mask is added to the
    scores."""
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if dropout and module.training:
        scores = scaled @ key.transpose(2, 3)
        weights = F.dropout(_weights(scores, attention_mask), dropout)
        return (weights @ value).transpose(1, 2).contiguous(), None
    mixed: torch.Tensor = _CHUNKED(scaled, key, value, attention_mask)
    return mixed, None


class _Chunked(torch.autograd.Function):
    """`softmax(q kᵀ + mask) v`, where no gradient of the mask is asked for."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        rows, heads, length, _ = query.shape
        mixed = value.new_empty(rows, length, heads, value.shape[3])
        kept = []
        for part in _parts(query, key):
            scores = query[part] @ key[part].transpose(2, 3)
            weights = _weights(scores, mask if mask is None or len(mask) == 1 else mask[part])
            mixed[part] = (weights @ value[part]).transpose(1, 2)
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        of_query, of_key, of_value = (_empty_like(tensor) for tensor in (query, key, value))
        for part, weights in zip(_parts(query, key), kept, strict=True):
            of_mixed = gradient[part].transpose(1, 2)
            of_value[part] = weights.transpose(2, 3) @ of_mixed
            of_weights = of_mixed @ value[part].transpose(2, 3)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[part] = of_scores @ key[part]
            of_key[part] = of_scores.transpose(2, 3) @ query[part]
        return of_query, of_key, of_value, None


_CHUNKED: Any = _Chunked.apply


def _weights(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The softmax of the scores, which are changed."""
    if mask is not None:
        scores += mask
    return scores.softmax(-1)


def _parts(query: torch.Tensor, key: torch.Tensor) -> list[slice]:
    rows, heads, length, _ = query.shape
    size = max(1, CHUNK_BYTES // (heads * length * key.shape[2] * query.element_size()))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _empty_like(states: torch.Tensor) -> torch.Tensor:
    """[rows, heads, length, size] that is in memory as the layer below wants it: by rows and positions."""
    rows, heads, length, size = states.shape
    return states.new_empty(rows, length, heads, size).transpose(1, 2)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None,
    dtype: torch.dtype,
    **options: Any,
) -> torch.Tensor | None:
    """[rows, 1, 1, length] where all positions see each other: `length` times smaller than what transformers makes."""
    if mask_function is not bidirectional_mask_function or q_length != kv_length:
        return eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            dtype=_BF16,
            **options,
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    hidden = torch.zeros(attention_mask.shape, dtype=_BF16).masked_fill_(~attention_mask.bool(), torch.finfo(_BF16).min)
    return hidden[:, None, None, :]
