"""Percentiles, spreads and ratios."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import Spread, percentile, ratios, shown, spread


def test_a_percentile_is_a_value_that_was_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([7.0], 0.001) == 7.0
    assert percentile([], 0.5) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_at_least_the_share_lies_at_or_below_it(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found is not None
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def test_ratios_are_taken_round_by_round() -> None:
    # The machine was half as fast in the second round; the ratio does not see it.
    assert ratios([20.0, 10.0, 30.0], [10.0, 5.0, 10.0]) == Spread(2.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0], [1.0, 2.0])


def test_spread_and_shown() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert (shown(1234.56), shown(0.5, 2), shown(None)) == ("1,234.6", "0.50", "–")
