"""Tags become entities by the best legal path, also those of models that learnt other schemes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.checkpoints import tag_types
from modeling.errors import UnsupportedArchitecture
from modeling.inputs.words import codepoint_offsets, find_words, pieces_of_words, utf16_offsets
from modeling.tasks.tagging import are_legal, best_tags, decode, runs_of, tags_of

OUT, BEGIN, INSIDE = [0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]


def cost(probabilities: np.ndarray, tags: tuple[int, ...]) -> float:
    """The logarithm of a path; an inside in the place of a beginning costs 3."""
    total, before = 0.0, -1
    for row, tag in zip(probabilities, tags, strict=True):
        type_ = (tag + 1) // 2 - 1
        total += float(np.log(row[tag])) - (3.0 if tag and tag % 2 == 0 and type_ != before else 0.0)
        before = type_
    return total


@given(st.integers(0, 10**6))
def test_no_path_is_better(seed: int) -> None:
    draw = np.random.default_rng(seed)
    words, types = draw.integers(1, 5), draw.integers(1, 3)
    p = draw.dirichlet(np.ones(1 + 2 * types), size=words).astype(np.float32)
    best = max(itertools.product(range(1 + 2 * types), repeat=int(words)), key=lambda tags: cost(p, tags))
    found = best_tags(p)
    assert are_legal(found)
    assert [run[2] for run in runs_of(found)] == [run[2] for run in runs_of(np.asarray(best))]
    runs = runs_of(found)
    assert (tags_of(runs, int(words)) == found).all()


def test_a_model_that_knows_no_beginnings_gives_whole_entities() -> None:
    """IO, or IOB1, where a beginning only parts neighbours."""
    runs = decode(np.asarray([OUT, INSIDE, INSIDE, OUT, INSIDE], np.float32))
    assert [(run.first, run.stop) for run in runs] == [(1, 3), (4, 5)]
    assert [(run.first, run.stop) for run in decode(np.asarray([INSIDE, BEGIN, INSIDE], np.float32))] == [
        (0, 1),
        (1, 3),
    ]


def test_an_inside_without_a_beginning_is_rather_given_one_before_it() -> None:
    unsure = [0.6, 0.3, 0.1]
    assert [(run.first, run.stop) for run in decode(np.asarray([unsure, [0.1, 0.1, 0.8]], np.float32))] == [(0, 2)]


def test_no_word_has_no_entity() -> None:
    assert decode(np.zeros((0, 3), np.float32)) == []


@pytest.mark.parametrize(
    "names", [["O", "B-PER", "I-PER "], ["O", "B- PER", "I-PER"], ["I-PER", "O"], ["O", "B-PER"], [" O", "B-PER"]]
)
def test_blanks_in_tags_make_no_types_of_their_own(names: list[str]) -> None:
    types, outputs = tag_types(names)
    assert types == ("PER",) and len(outputs) == 3 and names[outputs[0]].strip() == "O"


@pytest.mark.parametrize("names", [["O", "I-PER", "I-PER "], ["O", "E-PER"], ["B-PER", "I-PER"], ["O", "B-"], ["O"]])
def test_other_tags_are_refused(names: list[str]) -> None:
    with pytest.raises(UnsupportedArchitecture):
        tag_types(names)


@given(st.text(max_size=30))
def test_words_cover_all_that_is_not_blank(text: str) -> None:
    words = find_words(text)
    assert (words[:, 0] < words[:, 1]).all() and (words[1:, 0] >= words[:-1, 1]).all()
    covered = {at for start, end in words.tolist() for at in range(start, end)}
    assert {at for at, sign in enumerate(text) if not sign.isspace()} <= covered
    units = utf16_offsets(text, words)
    encoded = text.encode("utf-16-le", "surrogatepass")
    assert [encoded[2 * a : 2 * b] for a, b in units.tolist()] == [
        text[a:b].encode("utf-16-le", "surrogatepass") for a, b in words.tolist()
    ]
    assert (codepoint_offsets(text, units) == words).all()


def test_a_word_has_the_pieces_that_overlap_it() -> None:
    words = np.asarray([[0, 3], [3, 4], [5, 9]], np.int32)
    pieces = np.asarray([[0, 2], [2, 4], [4, 7], [7, 9]], np.int32)  # the second one joins a word and a sign
    first, stop = pieces_of_words(words, pieces)
    assert list(zip(first.tolist(), stop.tolist(), strict=True)) == [(0, 2), (1, 2), (2, 4)]
