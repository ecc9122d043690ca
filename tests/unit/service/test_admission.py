from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.inference.admission import AdmissionController
from service.inference.cost import Forecast
from service.inference.errors import DeadlineExceeded, QueueFull

IDLE = Forecast(0, 0, 0)


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
