"""One percent and one estimate over all stages, with a clock in hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.training.pace import Pace, Stage, beating


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def planned(clock: Clock, **options: Any) -> Pace:
    pace = Pace(clock=clock, **options)
    pace.plan([Stage("baseline", 10, is_telling=False), Stage("probe", 20), Stage("full", 60), Stage("finishing", 10)])
    return pace


def test_a_run_that_keeps_to_its_estimates_shows_the_share_of_its_time(clock: Clock) -> None:
    pace = planned(clock)
    for name, seconds, percent in (("baseline", 10, 10), ("probe", 20, 30), ("full", 60, 90), ("finishing", 10, 99)):
        pace.enter(name)
        for step in range(1, 11):
            clock.time += seconds / 10
            values = pace.at(step, 10)
        assert values["percent"] == pytest.approx(percent, abs=1)
        assert values["eta_seconds"] == pytest.approx(100 - clock.time, abs=1)


def test_what_was_measured_corrects_the_stages_to_come(clock: Clock) -> None:
    pace = planned(clock)
    pace.enter("probe")
    for step in range(11):  # three times as slow as expected
        pace.at(step, 10)
        clock.time += 6
    pace.enter("full")
    assert pace.values()["eta_seconds"] == pytest.approx(3.3 * 60 + 10 * 3.3, rel=0.1)


def test_a_resumed_stage_goes_by_the_speed_since_then(clock: Clock) -> None:
    pace = planned(clock)
    pace.enter("full")
    for step in range(80, 101, 2):
        values = pace.at(step, 100)
        clock.time += 2
    assert values["eta_seconds"] == pytest.approx(10 * 100 / 60, abs=0.1), "the last stage alone, as slow as this one"


def test_what_is_left_out_takes_no_time(clock: Clock) -> None:
    pace = planned(clock)
    pace.enter("baseline")
    whole = pace.values()["eta_seconds"]
    pace.leave_out("full")
    assert pace.values()["eta_seconds"] == pytest.approx(whole - 60)


def test_a_budget_bounds_the_methods(clock: Clock) -> None:
    pace = planned(clock)
    pace.deadline = 15.0
    pace.enter("baseline")
    assert pace.values()["eta_seconds"] == pytest.approx(25)


def test_parts_of_a_stage_share_it(clock: Clock) -> None:
    pace = planned(clock)
    pace.enter("full")
    for trial in range(3):
        with pace.part(trial, 3):
            for step in range(5):
                values = pace.at(step, 4)
                clock.time += 4
    assert values["eta_seconds"] == pytest.approx(10, abs=2)


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.01, 500), st.integers(0, 20)), max_size=40))
def test_the_percent_never_falls_and_leaves_the_last_to_the_registration(steps: list[tuple[int, float, int]]) -> None:
    clock = Clock()
    pace = planned(clock, elapsed_s=3.0, percent=7.0)
    names = ["baseline", "probe", "full", "finishing"]
    shown = [pace.values()["percent"]]
    for stage, seconds, done in steps:
        if stage < 4:
            pace.enter(names[stage])
        clock.time += seconds
        shown.append(pace.at(done, 20)["percent"])
    assert shown[0] >= 7.0 and shown == sorted(shown) and shown[-1] <= 99.0
    eta = pace.values()["eta_seconds"]
    assert eta is None or eta >= 0


def test_a_process_that_computes_is_heard_and_one_that_waits_is_not() -> None:
    heard: list[dict[str, Any]] = []
    with beating(Pace(percent=12.0), lambda **values: heard.append(values), every_s=0.01):
        while not heard:
            sum(range(10_000))
    assert heard[0]["percent"] == 12.0
