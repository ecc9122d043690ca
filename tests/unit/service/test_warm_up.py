"""Which runs are timed at warm-up, and what follows from them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.errors import EngineFailed
from service.inference.warm_up import Measured, Shape, timed_runs

LIMITS: dict[str, Any] = {"max_tokens": 16384, "max_rows": 128, "max_length": 256, "seconds": 1.0}


def climb(seconds: Callable[[int, int], float | None], **limits: Any) -> tuple[Measured, list[Shape]]:
    steps, shapes = timed_runs(**(LIMITS | limits)), []
    try:
        shape = next(steps)
        while True:
            shapes.append(shape)
            shape = steps.send(seconds(*shape))
    except StopIteration as end:
        return end.value, shapes


@pytest.mark.parametrize(
    ("fixed_s", "per_token_s", "expected"), [(1e-3, 1e-4, 256), (1e-3, 2e-5, 2048), (1e-3, 1e-6, 16384)]
)
def test_a_batch_holds_what_reaches_nearly_the_highest_speed(fixed_s: float, per_token_s: float, expected: int) -> None:
    measured, shapes = climb(lambda rows, length: fixed_s + per_token_s * rows * length)
    assert measured.max_tokens == expected
    assert len(shapes) >= 6
    assert measured.cost.seconds(1000) == pytest.approx(fixed_s + per_token_s * 1000, rel=0.05)


def test_a_speed_that_falls_again_sets_the_limit() -> None:
    """Past some size activations no longer fit into the cache."""
    measured, _ = climb(lambda rows, length: rows * length * (1e-5 if rows * length <= 512 else 2e-5) + 1e-4)
    assert measured.max_tokens <= 512


@given(st.integers(200, 20_000))
def test_what_memory_cannot_hold_is_never_allowed(capacity: int) -> None:
    measured, _ = climb(lambda rows, length: None if rows * length > capacity else 1e-3 + 1e-6 * rows * length)
    assert measured.max_tokens <= capacity


@given(st.integers(64, 20_000), st.integers(1, 200), st.integers(8, 512), st.integers(0, 1000))
def test_no_run_exceeds_what_was_set(max_tokens: int, max_rows: int, max_length: int, seed: int) -> None:
    draw = random.Random(seed)
    measured, shapes = climb(
        lambda rows, length: draw.uniform(1e-4, 2e-4) + 1e-6 * rows * length,
        max_tokens=max_tokens,
        max_rows=max_rows,
        max_length=max_length,
    )
    assert all(
        rows <= max_rows and length <= max_length and rows * length <= max(max_tokens, length)
        for rows, length in shapes
    )
    assert measured.max_tokens <= max_tokens


def test_the_longest_rows_are_tried_as_well_and_may_lower_the_limit() -> None:
    """Attention takes memory by the square of the length."""
    measured, shapes = climb(lambda rows, length: None if length > 128 and rows > 8 else 1e-3 + 1e-6 * rows * length)
    assert shapes[-1] == (8, 256)
    assert measured.max_tokens == 2048


def test_a_slow_engine_is_not_kept_from_serving_for_long() -> None:
    _, shapes = climb(lambda rows, length: 0.01 * rows * length)
    assert sum(0.01 * rows * length for rows, length in shapes) < 10


def test_an_engine_that_computes_nothing_is_an_error() -> None:
    with pytest.raises(EngineFailed):
        climb(lambda rows, length: None)
