from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from modeling.backbone import Backbone
from modeling.errors import InputTooLong
from modeling.preprocess import TextPreprocessor, _shares


@pytest.fixture(scope="session")
def tokenizer(backbone: Backbone) -> TextPreprocessor:
    return TextPreprocessor(backbone.folder / "tokenizer.json", max_length=16)


def test_special_tokens_survive_truncation(tokenizer: TextPreprocessor) -> None:
    (encoded,) = tokenizer.encode(["film " * 100])
    assert (encoded.length, encoded.is_truncated) == (16, True)
    assert (encoded.input_ids[0], encoded.input_ids[-1]) == (2, 3)


def test_pairs_carry_types_and_share_the_room(tokenizer: TextPreprocessor) -> None:
    (encoded,) = tokenizer.encode([("film", "plot " * 100)])
    assert encoded.length == 16
    assert encoded.type_ids.tolist() == [0] * 3 + [1] * 13


def test_an_input_that_may_not_be_cut_is_named(tokenizer: TextPreprocessor) -> None:
    with pytest.raises(InputTooLong) as refused:
        tokenizer.encode(["film", "plot " * 100], truncate=False)
    assert refused.value.index == 1


def test_a_request_can_shorten_but_not_lengthen(tokenizer: TextPreprocessor) -> None:
    assert tokenizer.encode(["film " * 100], max_length=8)[0].length == 8
    assert tokenizer.encode(["film " * 100], max_length=800)[0].length == 16


def test_padding_and_truncation_of_the_file_are_overridden(backbone: Backbone, tmp_path: object) -> None:
    from pathlib import Path

    baked = Tokenizer.from_file(str(backbone.folder / "tokenizer.json"))
    baked.enable_padding(length=12)
    baked.enable_truncation(6)
    path = Path(str(tmp_path)) / "tokenizer.json"
    baked.save(str(path))
    short, long = TextPreprocessor(path, max_length=16).encode(["film", "film plot actor movie story it was"])
    assert (short.length, long.length) == (3, 9)


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.sampled_from(["film", "plot", "good", "zebra", "x1", "…", "wheat"]), min_size=1, max_size=60))
def test_cutting_characters_first_changes_nothing_for_ordinary_text(
    words: list[str], tokenizer: TextPreprocessor
) -> None:
    text = " ".join(words)
    (encoded,) = tokenizer.encode([text])
    whole = tokenizer._tokenizer.encode(text).ids
    expected = whole if len(whole) <= 16 else [*whole[:15], whole[-1]]
    assert encoded.input_ids.tolist() == expected


def test_huge_words_and_strange_text_stay_cheap_and_bounded(tokenizer: TextPreprocessor) -> None:
    for text in ("x" * 1_000_000, "😀" * 200_000, "\u200b" * 100_000, "\u202e" + "ab" * 50_000):
        assert tokenizer.encode([text])[0].length <= 16


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 60))
def test_shares_fit_the_room_and_waste_none(first: int, second: int, room: int) -> None:
    if first + second > room:
        shares = _shares([first, second], room)
        kept = [min(length, share) for length, share in zip((first, second), shares, strict=True)]
        assert sum(kept) == room


def test_batches_equal_single_texts(tokenizer: TextPreprocessor) -> None:
    texts = ["a film", ("good", "bad"), "plot " * 40]
    for alone, together in zip((tokenizer.encode([text])[0] for text in texts), tokenizer.encode(texts), strict=True):
        np.testing.assert_array_equal(alone.input_ids, together.input_ids)
