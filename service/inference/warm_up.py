"""Which runs to time at warm-up, and how many tokens a batch should hold by what they took. Decides, runs nothing."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from modeling.errors import EngineFailed
from service.inference.capacity import CostModel, Point

_FIRST_LENGTHS = (8, 32)
_ROW_LENGTH = 128
_KNEE = 0.97
_WORTH = 1.02  # twice the tokens must bring so much more speed, or the top has been passed
_MIN_POINTS = 6

Shape = tuple[int, int]
"""Rows, and the tokens in each."""
Runs = Generator[Shape, float | None, "Measured"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a batch costs, and how many tokens one should hold, padding counted."""

    cost: CostModel
    max_tokens: int


def timed_runs(*, max_tokens: int, max_rows: int, max_length: int, seconds: float) -> Runs:
    """Yields shapes and is sent the seconds of each, or None where the engine could not compute it.

    Single rows show what a run costs before its first token; then rows double until speed no longer grows or `seconds`
    are spent. A batch should hold as much as the smallest run with 97 % of the highest speed: more only adds to the
    wait. What the engine failed at, out of memory, bounds it from above; last comes a run of the longest rows that
    fill it, which need the most. Raises `EngineFailed` where not even the smallest run succeeds.
    """
    points: list[Point] = []
    best = spent = 0.0
    row_length = min(_ROW_LENGTH, max_length, max_tokens)
    shapes = [(1, length) for length in _FIRST_LENGTHS if length < row_length] + [(1, row_length)]
    while shapes:
        rows, length = shapes.pop(0)
        took = yield rows, length
        if took is None:
            if not points:
                raise EngineFailed(f"the engine cannot compute {length} tokens")
            break
        points.append((rows * length, took))
        spent += took
        speed = rows * length / took
        is_past_top = len(points) >= _MIN_POINTS and speed < _WORTH * best
        best = max(best, speed)
        rows *= 2
        fits = rows <= max_rows and rows * length <= max_tokens
        if not shapes and fits and not is_past_top and spent < seconds:
            shapes.append((rows, length))
    budget = min(tokens for tokens, took in points if tokens / took >= _KNEE * best)
    while (rows := min(max_rows, budget // max_length)) > 0:
        took = yield rows, max_length
        if took is not None:
            points.append((rows * max_length, took))
            break
        budget //= 2
    return Measured(CostModel.fit(points), budget)
