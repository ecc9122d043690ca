"""Which adapter is merged: only what dominates for long, and not back and forth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.inference.merge_choice import MergePolicy, Rows, choose_merged

POLICY = MergePolicy(0.8, windows=2, min_rows=100)
BUSY: Rows = {"a": 90, "b": 5, None: 15}


def test_an_adapter_that_dominates_both_windows_is_merged() -> None:
    assert choose_merged([BUSY, BUSY], None, POLICY) == "a"
    assert choose_merged([BUSY], None, POLICY) is None
    assert choose_merged([{"b": 100}, BUSY], None, POLICY) is None


def test_rows_without_an_adapter_count_and_are_never_merged() -> None:
    assert choose_merged([{"a": 90, None: 60}, BUSY], None, POLICY) is None
    assert choose_merged([{None: 500}, {None: 500}], None, POLICY) is None


def test_few_rows_merge_nothing() -> None:
    assert choose_merged([{"a": 99}, BUSY], None, POLICY) is None
    assert choose_merged([{}, {}], None, POLICY) is None


def test_a_share_that_wavers_changes_nothing() -> None:
    wavering: Rows = {"a": 60, "b": 40}
    assert choose_merged([wavering, wavering], None, POLICY) is None
    assert choose_merged([wavering, wavering], "a", POLICY) == "a"


def test_what_no_longer_dominates_is_given_up_or_replaced() -> None:
    other: Rows = {"a": 40, "b": 60}
    assert choose_merged([other, other], "a", POLICY) is None
    assert choose_merged([{"b": 3}, {}], "a", POLICY) is None
    assert choose_merged([{"b": 100}, {"b": 100, "a": 5}], "a", POLICY) == "b"


def test_while_nothing_is_computed_nothing_changes() -> None:
    assert choose_merged([{}, {}], "a", POLICY) == "a"
    assert choose_merged([], "a", POLICY) == "a"


def test_with_a_share_of_zero_nothing_is_merged() -> None:
    assert choose_merged([BUSY, BUSY], None, MergePolicy(0.0)) is None
    assert choose_merged([BUSY, BUSY], "a", MergePolicy(0.0)) is None


ROWS = st.dictionaries(st.sampled_from(["a", "b", "c", None]), st.integers(1, 1000))


@given(st.lists(ROWS, max_size=4), st.sampled_from(["a", "b", None]), st.floats(0.05, 1))
def test_the_same_traffic_never_changes_it_twice(windows: list[Rows], merged: str | None, share: float) -> None:
    policy = MergePolicy(share, min_rows=100)
    chosen = choose_merged(windows, merged, policy)
    assert choose_merged(windows, chosen, policy) == chosen
