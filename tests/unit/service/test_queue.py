"""The packing rule: the oldest is in, the limits hold, no request starves, and little is spent on padding."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from service.inference.queue import pack

widths_lists = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(widths_lists, st.integers(16, 400), st.integers(1, 20), st.floats(0, 500), st.integers(0, 60))
def test_the_oldest_is_in_and_the_limits_hold(
    widths: list[int], max_tokens: int, max_rows: int, fixed_tokens: float, overdue: int
) -> None:
    chosen = pack(
        widths,
        max_tokens=max_tokens,
        max_rows=max_rows,
        fixed_tokens=fixed_tokens,
        overdue=min(overdue, len(widths)),
    )
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= max_rows
    assert len(chosen) == 1 or max(widths[position] for position in chosen) * len(chosen) <= max_tokens


@given(st.integers(1, 40), st.integers(1, 20))
def test_equal_widths_fill_the_batch(count: int, width: int) -> None:
    assert len(pack([width] * count, max_tokens=8 * width, max_rows=10)) == min(count, 8)


def test_the_nearest_in_width_join() -> None:
    assert pack([10, 90, 11, 80, 12], max_tokens=48, max_rows=8, fixed_tokens=10) == [0, 2, 4]


def test_a_dear_start_is_worth_padding_and_a_cheap_one_is_not() -> None:
    widths = [10, 14, 20, 28, 40]
    assert pack(widths, max_tokens=1000, max_rows=8, fixed_tokens=1) == [0]
    assert pack(widths, max_tokens=1000, max_rows=8, fixed_tokens=1000) == [0, 1, 2, 3, 4]


def test_among_equals_the_older_comes_first() -> None:
    assert pack([50, 10, 10, 10, 10], max_tokens=150, max_rows=8, fixed_tokens=1e6) == [0, 1, 2]


@given(widths_lists, st.integers(1, 60))
def test_the_overdue_are_chosen_as_if_nobody_else_waited(widths: list[int], overdue: int) -> None:
    overdue = min(overdue, len(widths))
    limits: dict[str, Any] = {"max_tokens": 300, "max_rows": 8, "fixed_tokens": 50.0}
    chosen = pack(widths, overdue=overdue, **limits)
    alone = pack(widths[:overdue], overdue=overdue, **limits)
    assert [position for position in chosen if position < overdue] == alone


@given(st.integers(0, 10_000))
def test_nobody_waits_for_more_batches_than_stood_before_him(seed: int) -> None:
    """However many that fit better keep coming."""
    draw = random.Random(seed)
    waiting = [(number, draw.choice((5, 30, 90))) for number in range(30)]
    batches, ahead = 0, {number: number for number, _ in waiting}
    while any(number < 30 for number, _ in waiting):
        chosen = set(pack([width for _, width in waiting], max_tokens=200, max_rows=8, fixed_tokens=20))
        batches += 1
        for position in chosen:
            number = waiting[position][0]
            if number < 30:
                assert batches <= ahead[number] + 1
        waiting = [entry for position, entry in enumerate(waiting) if position not in chosen]
        waiting += [(1000 + batches, draw.choice((5, 30, 90))) for _ in range(8)]


def texts(draw: random.Random, count: int) -> list[int]:
    return [max(4, min(256, int(draw.lognormvariate(4, 0.8)))) for _ in range(count)]


def test_little_is_padding_while_32_or_more_wait() -> None:
    for depth, limit in ((32, 0.07), (64, 0.05), (128, 0.05), (512, 0.05)):
        draw = random.Random(depth)
        waiting, useful, padded = texts(draw, depth), 0, 0
        for _ in range(200):
            chosen = pack(waiting, max_tokens=1024, max_rows=128, fixed_tokens=50)
            batch = [waiting[position] for position in chosen]
            useful, padded = useful + sum(batch), padded + max(batch) * len(batch)
            gone = set(chosen)
            waiting = [width for position, width in enumerate(waiting) if position not in gone]
            waiting += texts(draw, len(batch))
        assert 1 - useful / padded < limit, depth


def test_a_queue_is_worked_off_almost_as_cheaply_as_can_be() -> None:
    for fixed_tokens, max_tokens in ((20, 512), (50, 1024), (200, 4096)):
        draw = random.Random(7)
        cost = best = 0.0
        for _ in range(10):
            waiting = texts(draw, 64)
            best += cheapest(waiting, fixed_tokens, max_tokens)
            while waiting:
                chosen = set(pack(waiting, max_tokens=max_tokens, max_rows=128, fixed_tokens=fixed_tokens))
                cost += fixed_tokens + max(waiting[position] for position in chosen) * len(chosen)
                waiting = [width for position, width in enumerate(waiting) if position not in chosen]
        assert cost < 1.1 * best


def cheapest(widths: list[int], fixed_tokens: float, max_tokens: int) -> float:
    """The least that batches over all of `widths` can cost: neighbours in order of width, every split tried."""
    ordered = sorted(widths)
    best = [0.0]
    for end in range(1, len(ordered) + 1):
        width = ordered[end - 1]
        most = max(1, min(end, max_tokens // width))
        best.append(min(best[end - rows] + fixed_tokens + width * rows for rows in range(1, most + 1)))
    return best[-1]
