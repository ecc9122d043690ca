from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.engines.protocol import stepped_width
from modeling.inputs import Features, padded
from tests.support.rows import row_of


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
    rows = [row_of(np.arange(1, length + 1)) for length in lengths]
    arrays = padded(rows, width, padding={"input_ids": 99}, mask="attention_mask")
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    assert ids.shape == mask.shape == arrays["token_type_ids"].shape == (len(lengths), width)
    assert mask.sum(axis=1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert ids[row, :length].tolist() == list(range(1, length + 1))
        assert set(ids[row, length:].tolist()) <= {99}


def test_arrays_may_have_further_axes() -> None:
    rows = [Features({"frames": np.full((length, 3), length, np.float32)}, length) for length in (2, 5)]
    frames = padded(rows, 6)["frames"]
    assert frames.shape == (2, 6, 3) and frames.dtype == np.float32
    assert frames[0, :2].tolist() == [[2.0] * 3] * 2 and not frames[0, 2:].any()


def test_a_width_that_holds_not_every_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        padded([row_of(np.ones(7))], 6)
