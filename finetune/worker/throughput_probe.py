"""How fast this machine computes, as far as estimates need it. Untyped torch stays here."""

from __future__ import annotations

import time
from typing import Any

# A backbone of 22 M weights has some 10.6 M outside of its embeddings, each a multiplication and an addition a token.
_FLOP_PER_ROW = 2 * 10.6e6 * 256
_SHARE_OF_PEAK = 0.6  # what a forward pass reaches of plain products
_TOKENS, _WIDTH, _INNER = 2048, 384, 1536
_MEASURE_S = 0.05


def forward_rows_per_s(device: str, *, has_bf16: bool) -> float:
    """Rows of 256 tokens a second through such a backbone, from products of its shapes. Takes 0.2 s."""
    import torch

    dtype = torch.bfloat16 if has_bf16 else torch.float32
    with torch.inference_mode():
        left: Any = torch.ones(_TOKENS, _WIDTH, dtype=dtype, device=device)
        right: Any = torch.ones(_WIDTH, _INNER, dtype=dtype, device=device)
        seconds = min(_seconds(torch, left, right) for _ in range(3))
    return _SHARE_OF_PEAK * 2 * _TOKENS * _WIDTH * _INNER / seconds / _FLOP_PER_ROW


def _seconds(torch: Any, left: Any, right: Any) -> float:
    """Of one product, the mean over a short while."""
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < _MEASURE_S:
        left @ right
        count += 1
        if left.is_cuda:
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / count
