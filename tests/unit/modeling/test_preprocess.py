from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from modeling.backbone import Backbone
from modeling.errors import InputTooLong, PreprocessorFailed
from modeling.inputs import Features, single
from modeling.inputs.text import Prompted, TextInput, TextPreprocessor, _shares
from modeling.testing import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(backbone: Backbone) -> TextPreprocessor:
    return TextPreprocessor(backbone.folder, limit=16)


def rows_of(tokenizer: TextPreprocessor, texts: Sequence[TextInput], **options: Any) -> list[Features]:
    return single(tokenizer.encode(texts, **options))


def described(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def test_special_tokens_survive_truncation(tokenizer: TextPreprocessor) -> None:
    (encoded,) = rows_of(tokenizer, ["film " * 100])
    assert (encoded.cost, encoded.is_truncated) == (16, True)
    assert (encoded.arrays["input_ids"][0], encoded.arrays["input_ids"][-1]) == (2, 3)


def test_pairs_carry_types_and_share_the_room(tokenizer: TextPreprocessor) -> None:
    (encoded,) = rows_of(tokenizer, [("film", "plot " * 100)])
    assert encoded.cost == 16
    assert encoded.arrays["token_type_ids"].tolist() == [0] * 3 + [1] * 13


def test_an_input_that_may_not_be_cut_is_named(tokenizer: TextPreprocessor) -> None:
    with pytest.raises(InputTooLong) as refused:
        rows_of(tokenizer, ["film", "plot " * 100], truncate=False)
    assert refused.value.index == 1


def test_a_request_can_shorten_but_not_lengthen(tokenizer: TextPreprocessor) -> None:
    assert rows_of(tokenizer, ["film " * 100], limit=8)[0].cost == 8
    assert rows_of(tokenizer, ["film " * 100], limit=800)[0].cost == 16


def test_padding_and_truncation_of_the_file_are_overridden(backbone: Backbone, tmp_path: Path) -> None:
    baked = Tokenizer.from_file(str(backbone.folder / "tokenizer.json"))
    baked.enable_padding(length=12)
    baked.enable_truncation(6)
    path = tmp_path / "tokenizer.json"
    baked.save(str(path))
    short, long = rows_of(
        TextPreprocessor(described(tmp_path), limit=16), ["film", "film plot actor movie story it was"]
    )
    assert (short.cost, long.cost) == (3, 9)


def written(folder: Path, tokenizer: Tokenizer, *special: AddedToken) -> Path:
    tokenizer.add_special_tokens(list(special))
    specials = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=specials
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def unigram(folder: Path) -> Path:
    """As XLM-R's and ALBERT's: blanks are tokens, and what a mask takes of them stands before it."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        "\u2581a",
        "\u2581film",
        "plot",
        "pl",
        "o",
        "t",
        "fi",
        "\u00e9",
        '"',
        "\u4e2d",
    ]
    vocabulary = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return written(folder, tokenizer, AddedToken("<mask>", lstrip=True), AddedToken("film plot", normalized=True))


def byte_level(folder: Path) -> Path:
    """As RoBERTa's: the blanks before a word depend on how many there are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a film of a plot", "film film", "plots    and films"] * 3, trainer)
    return written(folder, tokenizer, AddedToken("<mask>", lstrip=True), AddedToken("<m>", rstrip=True))


def word_piece(folder: Path) -> Path:
    write_tokenizer(folder)
    return folder / "tokenizer.json"


def with_lookahead(folder: Path) -> Path:
    """No step that only looks around: the end of a text changes its beginning."""
    tokenizer = Tokenizer.from_file(str(word_piece(folder)))
    tokenizer.normalizer = normalizers.Replace(Regex("film(?=.*good$)"), "plot")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="session", params=[word_piece, unigram, byte_level, with_lookahead])
def slicing_and_whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextPreprocessor, Tokenizer]:
    path = request.param(tmp_path_factory.mktemp("tokenizer"))
    return TextPreprocessor(described(path.parent), limit=16), Tokenizer.from_file(str(path))


# Of each text that a slice may cut in half: what holds together, what vanishes, what is long, what is nothing.
PARTS = [
    "a film plot ",
    "good ",
    "x",
    " ",
    "\n",
    "\u3000",
    "\u200b",
    "\u0301",
    "e\u0323",
    "\u00a8",
    "``",
    "'s ",
    "don't ",
]
PARTS += [
    "\U0001f600",
    "\U0001f468\u200d\U0001f469",
    "\u4e2d\u6587",
    "<mask>",
    "<m>",
    "[MASK]",
    "[MA",
    "<ma",
    "film plot",
    "1",
    "\u00a0",
    ".",
]


def texts(*counts: int) -> st.SearchStrategy[str]:
    parts = st.tuples(st.sampled_from(PARTS), st.sampled_from(counts))
    return st.lists(parts, min_size=1, max_size=10).map(lambda found: "".join(part * count for part, count in found))


TEXT = texts(1, 2, 5, 40, 200)
# Less, since tokenizers makes an encoding of each combination of what it cuts off of the two.
SHORTER = texts(1, 2, 5, 30)


@settings(max_examples=300, deadline=None)
@given(text=texts(1, 1, 2, 5), ahead=st.integers(1, 12))
@example(text="a film plot film [MASK] film <mask> a film plot", ahead=3)
def test_no_text_changes_the_tokens_that_a_slice_before_it_is_known_for(
    text: str, ahead: int, slicing_and_whole: tuple[TextPreprocessor, Tokenizer]
) -> None:
    slicing, whole = slicing_and_whole
    if slicing._edge is None:  # reads no slices
        return
    whole.no_truncation()
    cut = "film plot " * 8 + text
    part = whole.encode(cut[: max(0, len(cut) - ahead)], add_special_tokens=False)
    known = slicing._known_tokens(part, cut)
    assert part.ids[:known] == whole.encode(cut, add_special_tokens=False).ids[:known]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(item=st.one_of(TEXT, st.tuples(SHORTER, SHORTER)), limit=st.integers(5, 16))
@example(item=" " * 4000 + "good film", limit=16)
@example(item="\u200b" * 4000 + "good film", limit=16)
@example(item="x" * 4000 + " good film", limit=16)
@example(item="film " * 400 + "good", limit=16)
@example(item="a" + " " * 4000 + "<mask>", limit=16)
def test_a_long_text_has_the_tokens_that_it_has_as_a_whole(
    item: TextInput, limit: int, slicing_and_whole: tuple[TextPreprocessor, Tokenizer]
) -> None:
    slicing, whole = slicing_and_whole
    whole.enable_truncation(limit)
    (encoded,) = rows_of(slicing, [item], limit=limit)
    assert not isinstance(item, Prompted)
    expected = whole.encode(item) if isinstance(item, str) else whole.encode(*item)
    assert encoded.arrays["input_ids"].tolist() == expected.ids
    assert encoded.arrays["token_type_ids"].tolist() == expected.type_ids
    assert encoded.is_truncated == bool(expected.overflowing)


def test_a_text_that_fits_is_not_refused_for_its_characters(tokenizer: TextPreprocessor) -> None:
    for text in (" " * 4000 + "a good film", "\u200b" * 4000 + "a good film"):
        (encoded,) = rows_of(tokenizer, [text], truncate=False)
        np.testing.assert_array_equal(
            encoded.arrays["input_ids"], rows_of(tokenizer, ["a good film"])[0].arrays["input_ids"]
        )
        np.testing.assert_array_equal(encoded.arrays["input_ids"], rows_of(tokenizer, [text])[0].arrays["input_ids"])


def test_huge_words_and_strange_text_stay_cheap_and_bounded(tokenizer: TextPreprocessor) -> None:
    for text in ("x" * 1_000_000, "😀" * 200_000, "\u200b" * 100_000, "\u202e" + "ab" * 50_000):
        assert rows_of(tokenizer, [text])[0].cost <= 16


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 60))
def test_shares_fit_the_room_and_waste_none(first: int, second: int, room: int) -> None:
    if first + second > room:
        shares = _shares([first, second], room)
        kept = [min(length, share) for length, share in zip((first, second), shares, strict=True)]
        assert sum(kept) == room


def test_batches_equal_single_texts(tokenizer: TextPreprocessor) -> None:
    texts: list[TextInput] = ["a film", ("good", "bad"), "plot " * 40]
    for alone, together in zip(
        (rows_of(tokenizer, [text])[0] for text in texts), rows_of(tokenizer, texts), strict=True
    ):
        np.testing.assert_array_equal(alone.arrays["input_ids"], together.arrays["input_ids"])


def test_a_panic_of_the_tokenizer_is_an_error_of_ours_and_the_next_text_is_read(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reader = TextPreprocessor(described(tmp_path), limit=16)
    with pytest.raises(PreprocessorFailed, match="panicked") as told:
        reader.encode(["fine", "a" * 40 + "!"])
    assert not isinstance(told.value.__cause__, Exception), "pyo3's panics are no exceptions"
    assert rows_of(reader, ["fine"])[0].cost == 1
