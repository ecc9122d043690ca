from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.engines.protocol import pad, stepped_width
from modeling.preprocess import Encoded


def encoded(length: int) -> Encoded:
    return Encoded(np.arange(1, length + 1), np.zeros(length, dtype=np.int64))


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_stepped_width_holds_the_longest_within_the_positions_and_is_a_width_itself(longest: int, limit: int) -> None:
    width = stepped_width(longest, limit=limit)
    assert longest <= width < longest + 32
    assert width % 8 == 0 or width in {longest, limit}
    assert width <= max(longest, limit)
    assert stepped_width(width, limit=limit) == width


def test_widths_are_few_and_grow() -> None:
    widths = [stepped_width(longest, limit=512) for longest in range(1, 513)]
    assert widths == sorted(widths)
    assert len(set(widths)) == 24


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 20))
def test_padding_keeps_the_rows_and_masks_the_rest(lengths: list[int], extra: int) -> None:
    width = max(lengths) + extra
    ids, mask, _ = pad([encoded(length) for length in lengths], pad_id=99, width=width)
    assert ids.shape == mask.shape == (len(lengths), width)
    assert mask.sum(axis=1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert ids[row, :length].tolist() == list(range(1, length + 1))
        assert set(ids[row, length:].tolist()) <= {99}


def test_by_default_the_longest_sets_the_width() -> None:
    assert pad([encoded(3), encoded(7)], pad_id=0)[0].shape == (2, 7)


def test_a_width_that_holds_not_every_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        pad([encoded(7)], pad_id=0, width=6)
