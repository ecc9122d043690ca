from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.duplicates import Duplicates, find_duplicates, largest_group
from finetune.data.text_shingles import shingle_hashes, word_hashes
from modeling.inputs.text import Text
from modeling.inputs.text_identity import normalise

WORDS = [f"word{number}" for number in range(400)]
# Few words, so that near duplicates are common.
TEXTS = st.lists(st.lists(st.sampled_from(["ab", "Cd", "é!", "漢字", "f"]), max_size=9).map(" ".join), max_size=25)


def shingles(text: str) -> set[tuple[str, ...]]:
    """The definition, word by word, for texts of plain words."""
    words = text.split()
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))} if words else set()


def similarity(one: str, other: str) -> float:
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second) if first | second else 0.0


def altered(text: str, draw: random.Random, changes: int) -> str:
    words = text.split()
    for _ in range(changes):
        words[draw.randrange(len(words))] = draw.choice(WORDS)
    return " ".join(words)


def as_sets(found: Duplicates, texts: list[str]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for text, group in zip(texts, found.group_of.tolist(), strict=True):
        groups.setdefault(group, set()).add(normalise(text))
    return {frozenset(group) for group in groups.values()}


def test_pairs_from_the_threshold_on_are_found_and_no_others() -> None:
    draw = random.Random(3)
    texts: list[str] = []
    for _ in range(300):
        text = " ".join(draw.choices(WORDS, k=40))
        texts += [text, altered(text, draw, draw.randrange(0, 4))]
    found = find_duplicates(texts, Text()).group_of
    near = [similarity(texts[row], texts[row + 1]) >= 0.8 for row in range(0, 600, 2)]
    together = [bool(found[row] == found[row + 1]) for row in range(0, 600, 2)]
    assert 30 < sum(near) < 270, "both kinds are needed, or the comparison shows nothing"
    assert together == near
    assert len(set(found.tolist())) == 600 - sum(near)


@given(texts=TEXTS)
def test_a_group_is_connected_by_exact_similarity(texts: list[str]) -> None:
    found = find_duplicates(texts, Text())
    sets = [set(own.tolist()) for own in np.split(*_sets(texts))] if texts else []
    for row, group in enumerate(found.group_of.tolist()):
        others = [other for other in range(len(texts)) if found.group_of[other] == group and other != row]
        different = [other for other in others if found.input_of[other] != found.input_of[row]]
        if different and not found.is_cut:
            assert any(_jaccard(sets[row], sets[other]) >= 0.8 for other in different)


def _sets(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    sets = shingle_hashes(texts).as_sets()
    return sets.hashes, sets.offsets[1:-1]


def _jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / max(1, len(one | other))


@given(texts=TEXTS, data=st.data())
def test_row_order_and_copies_do_not_matter(texts: list[str], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(texts + texts[:3]))
    one, other = find_duplicates(texts, Text()), find_duplicates(shuffled, Text())
    assert as_sets(one, texts) == as_sets(other, shuffled)
    assert one.digests == other.digests


def test_equal_texts_have_one_number_and_differ_from_others() -> None:
    found = find_duplicates(["Hello  World", "hello world", "hello, world", "hello there", "?", "!"], Text())
    assert found.input_of[0] == found.input_of[1] != found.input_of[2]
    assert found.group_of[0] == found.group_of[2] != found.group_of[3]
    assert len(set(found.group_of.tolist())) == 4, "texts without a word are no near duplicates of each other"


def test_a_chain_through_the_whole_data_is_cut() -> None:
    draw = random.Random(5)
    chain = [" ".join(draw.choices(WORDS, k=60))]
    for step in range(199):
        words = chain[-1].split()
        words[(step * 7) % 60] = f"new{step}"
        chain.append(" ".join(words))
    found = find_duplicates(chain, Text())
    assert found.is_cut
    sizes = np.bincount(found.group_of)
    assert 1 < sizes.max() <= largest_group(200)
    for group in np.flatnonzero(sizes > 1).tolist():
        members = [chain[row] for row in np.flatnonzero(found.group_of == group)]
        assert any(all(similarity(one, other) >= 0.8 for other in members) for one in members)


def test_copies_of_one_letter_form_groups_within_the_limit() -> None:
    letter = " ".join(WORDS[:60])
    texts = [f"{letter} signed{number}" for number in range(400)]
    found = find_duplicates(texts, Text())
    sizes = np.bincount(found.group_of)
    assert found.is_cut and sizes.max() == largest_group(400) == 20


def test_nothing_and_no_words() -> None:
    assert len(find_duplicates([], Text()).group_of) == 0
    assert find_duplicates(["", "  ", "?"], Text()).group_of.tolist() in ([0, 0, 1], [1, 1, 0])


@given(st.lists(st.text(max_size=30), max_size=6))
def test_words_do_not_depend_on_their_neighbours(texts: list[str]) -> None:
    together, hashes = word_hashes(texts)
    for row, text in enumerate(texts):
        assert hashes[together == row].tolist() == word_hashes([text])[1].tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [("one two", 2), ("it's a well-known fact", 6), ("漢字かな", 4), ("naïve café", 2), ("", 0), ("a1 2b", 2)],
)
def test_words(text: str, words: int) -> None:
    assert len(word_hashes([text])[1]) == words
    assert len(shingle_hashes([text]).hashes) == max(min(words, 1), words - 2)


def test_case_and_punctuation_do_not_count_but_order_does() -> None:
    one, same, other = (set(own.tolist()) for own in np.split(*_sets(["A b, c d", "a B c (d)", "b a c d"])))
    assert one == same != other
