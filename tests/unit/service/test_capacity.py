"""The cost model is found in noise and follows a drift slowly; admission keeps its bounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.inputs import MODALITIES
from service.inference.capacity import AdmissionController, CostEstimate, CostModel, DrainRate, Forecast, Slippage
from service.inference.errors import DeadlineExceeded, QueueFull

SIZES = (8, 32, 128, 256, 512, 1024)
fixed = st.floats(1e-5, 1e-1)
slope = st.floats(1e-7, 1e-3)
seeds = st.integers(0, 10_000)
IDLE = Forecast(0, 0, 0)


@given(fixed, slope, seeds)
def test_a_noisy_line_is_found(fixed_s: float, per_token_s: float, seed: int) -> None:
    noise = random.Random(seed)
    points = [(x, (fixed_s + per_token_s * x) * noise.uniform(0.95, 1.05)) for x in SIZES]
    model = CostModel.fit(points)
    for tokens in SIZES:
        assert model.seconds(tokens) == pytest.approx(fixed_s + per_token_s * tokens, rel=0.12)


@given(st.floats(20, 2000), slope, seeds, st.integers(1, 5), st.floats(2, 20))
def test_one_disturbed_run_does_not_spoil_the_fit(
    fixed_tokens: float, per_token_s: float, seed: int, victim: int, slowdown: float
) -> None:
    noise = random.Random(seed)
    line = [(x, per_token_s * (fixed_tokens + x)) for x in SIZES]
    points = [(x, y * noise.uniform(0.98, 1.02)) for x, y in line]
    points[victim] = (points[victim][0], points[victim][1] * slowdown)
    model = CostModel.fit(points)
    for tokens, seconds in line:
        assert model.seconds(tokens) == pytest.approx(seconds, rel=0.2)


@given(st.lists(st.tuples(st.integers(1, 16384), st.floats(1e-6, 100)), min_size=1, max_size=12))
def test_whatever_was_measured_neither_term_is_negative(points: list[tuple[int, float]]) -> None:
    model = CostModel.fit(points)
    assert model.fixed_s > 0 and model.per_token_s > 0
    for tokens, seconds in points:
        model.observe(tokens, seconds)
    assert model.fixed_s > 0 and model.per_token_s > 0


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_a_lasting_change_is_followed_by_small_and_large_batches_alike(factor: float) -> None:
    model, draw = CostModel.fit([(x, 1e-3 + 2e-5 * x) for x in SIZES]), random.Random(1)
    for _ in range(400):
        tokens = draw.choice((16, 64, 500, 1000))
        model.observe(tokens, factor * (1e-3 + 2e-5 * tokens))
    assert model.fixed_s == pytest.approx(factor * 1e-3, rel=0.1)
    assert model.per_token_s == pytest.approx(factor * 2e-5, rel=0.1)


def test_batches_of_one_size_leave_the_prediction_for_it_right() -> None:
    model = CostModel.fit([(x, 1e-3 + 2e-5 * x) for x in SIZES])
    for _ in range(400):
        model.observe(500, 0.02)
    assert model.seconds(500) == pytest.approx(0.02, rel=0.01)


@given(st.integers(1, 16384), st.floats(1e-6, 1000))
def test_one_batch_moves_a_fitted_model_little(tokens: int, seconds: float) -> None:
    model = CostModel.fit([(x, 1e-3 + 2e-5 * x) for x in SIZES])
    before = [model.seconds(x) for x in SIZES]
    model.observe(tokens, seconds)
    for x, old in zip(SIZES, before, strict=True):
        assert model.seconds(x) == pytest.approx(old, rel=0.026)


def test_a_guess_becomes_a_measurement_within_a_few_batches() -> None:
    model = CostModel()
    for _ in range(60):
        model.observe(200, 0.5)
    assert model.seconds(200) == pytest.approx(0.5, rel=0.1)


def test_a_queue_of_full_batches_drains_at_the_models_pace() -> None:
    cost = CostModel.fit([(x, 1e-3 + 2e-5 * x) for x in SIZES])
    drain = DrainRate(cost, 1024)
    assert drain.seconds(10 * 1024, cost) == pytest.approx(10 * cost.seconds(1024))


def test_padding_and_small_batches_slow_the_drain_down() -> None:
    cost = CostModel.fit([(x, 1e-3 + 2e-5 * x) for x in SIZES])
    drain = DrainRate(cost, 1024)
    for _ in range(200):
        drain.observe(useful=400, padded=500, fixed_tokens=cost.fixed_tokens)
    assert drain.seconds(4000, cost) == pytest.approx(10 * cost.seconds(500), rel=0.01)


@given(seeds, st.floats(0.3, 1.9))
def test_slippage_finds_what_nearly_all_waits_stay_below(seed: int, center: float) -> None:
    noise = random.Random(seed)
    slippage = Slippage()
    waits = [noise.gauss(center, 0.05) for _ in range(4000)]
    exceeded = 0
    for number, wait in enumerate(waits):
        exceeded += number >= 1000 and wait > slippage.factor
        slippage.observe(wait, 1.0)
    assert exceeded / 3000 < 0.06
    assert 1.0 <= slippage.factor <= max(1.0, min(2.0, center + 0.3))


def test_slippage_is_bounded_and_forgets() -> None:
    slippage = Slippage()
    for _ in range(500):
        slippage.observe(100.0, 1.0)
    assert slippage.factor == 2.0
    for _ in range(5000):
        slippage.observe(0.5, 1.0)
    assert slippage.factor == pytest.approx(1.0)


def test_the_estimate_follows_the_texts_and_keeps_to_the_limit() -> None:
    estimate = CostEstimate(MODALITIES["text"].size, 4.0)
    assert estimate.cost(["x" * 400], 1000) == 102
    for _ in range(300):
        estimate.observe("x" * 400, 400, 1000)  # a token a character
    assert 380 <= estimate.cost(["x" * 400], 1000) <= 420
    assert estimate.cost(["x" * 4000, ("x" * 10, "y" * 10)], 512) < 512 + 30
    before = estimate.cost(["x" * 400], 1000)
    estimate.observe("x" * 100_000, 512, 512)  # it was cut
    assert estimate.cost(["x" * 400], 1000) == before


# Admission


def admit(admission: AdmissionController, inputs: int, forecast: Forecast = IDLE, *, time_left_s: float = 30) -> None:
    admission.admit(inputs, forecast=forecast, time_left_s=time_left_s)


def test_a_batch_is_admitted_as_a_whole_or_not_at_all() -> None:
    admission = AdmissionController(max_inputs=10, max_queue_delay_s=2)
    admit(admission, 8)
    with pytest.raises(QueueFull) as refused:
        admit(admission, 3)
    assert refused.value.reason == "queue_full"
    assert admission.inputs == 8
    admit(admission, 2)
    assert admission.inputs == 10


def test_a_batch_larger_than_the_bound_is_admitted_alone() -> None:
    admission = AdmissionController(max_inputs=4, max_queue_delay_s=2)
    admit(admission, 9)
    with pytest.raises(QueueFull):
        admit(admission, 1)


def test_work_that_could_start_too_late_is_refused_with_a_time_to_come_back() -> None:
    admission = AdmissionController(max_inputs=10, max_queue_delay_s=2)
    with pytest.raises(QueueFull) as refused:
        admit(admission, 1, Forecast(wait_s=1.5, latest_s=5, done_s=5))
    assert refused.value.reason == "token_budget"
    assert refused.value.retry_after_s is not None
    assert 3 < refused.value.retry_after_s < 5


def test_what_could_not_be_in_time_is_refused_as_too_late() -> None:
    admission = AdmissionController(max_inputs=10, max_queue_delay_s=2)
    admit(admission, 1, Forecast(0.1, 0.2, 0.3), time_left_s=0.4)
    for time_left_s in (0.2, 0.0, -1.0):
        with pytest.raises(DeadlineExceeded):
            admit(admission, 1, Forecast(0.1, 0.2, 0.3), time_left_s=time_left_s)
    with pytest.raises(DeadlineExceeded):
        admit(admission, 1, IDLE, time_left_s=0)
    assert admission.inputs == 1


@given(st.lists(st.tuples(st.integers(1, 6), st.floats(0, 4), st.floats(-1, 4)), max_size=30))
def test_permits_add_up_whatever_is_refused(requests: list[tuple[int, float, float]]) -> None:
    admission = AdmissionController(max_inputs=12, max_queue_delay_s=2)
    held: list[int] = []
    for inputs, wait_s, time_left_s in requests:
        try:
            admit(admission, inputs, Forecast(wait_s, wait_s, wait_s), time_left_s=time_left_s)
        except (QueueFull, DeadlineExceeded):
            if held:
                admission.release(held.pop())
        else:
            held.append(inputs)
        assert admission.inputs == sum(held) <= 12
