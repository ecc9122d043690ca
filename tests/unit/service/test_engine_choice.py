"""The choice of an engine: speed decides, but only among those whose answers stay the same."""

from __future__ import annotations

import math
from typing import Any

import pytest

from service.inference.engine_choice import ParityBound, choose

REFERENCE = "torch/fp32"


def report(engine: str, speed: float | None, **changes: Any) -> dict[str, Any]:
    values = {"engine": engine, "texts_per_s": speed, "flips": 0.0, "min_cosine": 1.0, "max_abs_dp": 0.0, "error": None}
    return values | changes


def chosen(*reports: dict[str, Any], **options: Any) -> str:
    return choose([report(REFERENCE, 100.0), *reports], reference=REFERENCE, **options).engine


def test_the_fastest_inside_the_bound_serves() -> None:
    choice = choose(
        [report("a/fp32", 150.0), report(REFERENCE, 100.0), report("b/bf16", 300.0), report("c/fp32", 120.0)],
        reference=REFERENCE,
    )
    assert choice.engine == "b/bf16"
    assert set(choice.refused) == {"a/fp32", "c/fp32"} and "300" in choice.refused["a/fp32"]


@pytest.mark.parametrize(
    "spoiled",
    [
        {"flips": 0.0011},
        {"min_cosine": 0.9989},
        {"error": "it crashed"},
        {"flips": None},
        {"min_cosine": None},
        {"min_cosine": math.nan},
        {"flips": math.nan},
        {"texts_per_s": None},
        {"texts_per_s": 0.0},
    ],
)
def test_whatever_is_outside_the_bound_or_unmeasured_never_serves(spoiled: dict[str, Any]) -> None:
    assert chosen(report("fast/int8", 900.0) | spoiled, report("safe/fp32", 130.0)) == "safe/fp32"
    assert chosen(report("fast/int8", 900.0) | spoiled) == REFERENCE


def test_a_large_change_of_a_probability_alone_is_no_reason() -> None:
    assert chosen(report("b/bf16", 200.0, max_abs_dp=0.02)) == "b/bf16"


def test_a_gain_within_the_noise_is_not_worth_a_change() -> None:
    assert chosen(report("a/fp32", 104.0)) == REFERENCE
    assert chosen(report("a/fp32", 106.0)) == "a/fp32"


def test_without_anything_measured_the_reference_serves() -> None:
    assert choose([], reference=REFERENCE).engine == REFERENCE
    unmeasured = report(REFERENCE, None, error="out of memory")
    assert choose([unmeasured, report("a/fp32", 50.0)], reference=REFERENCE).engine == "a/fp32"


def test_the_bound_can_be_tightened() -> None:
    assert chosen(report("b/bf16", 200.0, min_cosine=0.9999), bound=ParityBound(min_cosine=0.99999)) == REFERENCE


def test_equal_speeds_give_the_same_choice_in_any_order() -> None:
    a, b = report("a/fp32", 200.0), report("b/fp32", 200.0)
    assert chosen(a, b) == chosen(b, a)
