from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.inference.admission import AdmissionController
from service.inference.errors import QueueFull


def test_a_batch_is_admitted_as_a_whole_or_not_at_all() -> None:
    admission = AdmissionController(max_inputs=10, max_queue_delay_s=2)
    with admission.reserve(8, predicted_wait_s=0):
        with pytest.raises(QueueFull) as refused, admission.reserve(3, predicted_wait_s=0):
            raise AssertionError("admitted")
        assert admission.inputs == 8
        assert refused.value.reason == "queue_full"
        with admission.reserve(2, predicted_wait_s=0):
            assert admission.inputs == 10
    assert admission.inputs == 0


def test_a_batch_larger_than_the_bound_is_admitted_alone() -> None:
    admission = AdmissionController(max_inputs=4, max_queue_delay_s=2)
    with admission.reserve(9, predicted_wait_s=0), pytest.raises(QueueFull), admission.reserve(1, predicted_wait_s=0):
        raise AssertionError("admitted")


def test_work_that_could_not_start_in_time_is_refused_with_a_time_to_come_back() -> None:
    admission = AdmissionController(max_inputs=10, max_queue_delay_s=2)
    with pytest.raises(QueueFull) as refused, admission.reserve(1, predicted_wait_s=5):
        raise AssertionError("admitted")
    assert refused.value.reason == "token_budget"
    assert refused.value.retry_after_s is not None
    assert 3 < refused.value.retry_after_s < 5


@given(st.lists(st.integers(1, 6), max_size=20))
def test_permits_add_up(sizes: list[int]) -> None:
    admission = AdmissionController(max_inputs=12, max_queue_delay_s=2)
    for size in sizes:
        with admission.reserve(size, predicted_wait_s=0):
            assert admission.inputs == size
    assert admission.inputs == 0


def test_the_permit_is_given_back_after_an_error() -> None:
    admission = AdmissionController(max_inputs=2, max_queue_delay_s=2)
    with pytest.raises(ZeroDivisionError), admission.reserve(2, predicted_wait_s=0):
        raise ZeroDivisionError
    assert admission.inputs == 0
