from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.labelled import LabelledRows
from finetune.data.splits import Split, Strategy, fraction, split_rows
from modeling.inputs.text import Text
from modeling.inputs.text_identity import normalise

STRATEGIES: list[Strategy] = ["hash", "stratified", "random"]
SHARES = st.sampled_from([(0.15, 0.15), (0.0, 0.2), (0.2, 0.0), (0.0, 0.0), (0.01, 0.01), (0.45, 0.5)])
# Few letters in both cases, so that equal and nearly equal texts are common.
PAIRS = st.lists(st.tuples(st.text("aAbB ", max_size=4), st.sampled_from("xyz")), max_size=40)

# Another hash would put every row of every dataset on another side.
GOLDEN = (0.5921875160229714, 0.4503148581826796)


def rows_of(pairs: list[tuple[str, str]]) -> LabelledRows:
    numbers = np.arange(1, len(pairs) + 1, dtype=np.int64)
    return LabelledRows(numbers, [text for text, _ in pairs], [label for _, label in pairs])


def consistent(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same texts, each with the label it came with first."""
    labels: dict[str, str] = {}
    return [(text, labels.setdefault(normalise(text), label)) for text, label in pairs]


def split(pairs: list[tuple[str, str]], strategy: Strategy, shares: tuple[float, float], seed: int = 42) -> Split:
    return split_rows(rows_of(pairs), strategy=strategy, validation=shares[0], test=shares[1], seed=seed)


def sides(result: Split) -> list[np.ndarray]:
    return [result.train, result.validation, result.test]


def side_of_text(pairs: list[tuple[str, str]], result: Split) -> dict[str, int]:
    return {normalise(pairs[row][0]): number for number, side in enumerate(sides(result)) for row in side.tolist()}


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(pairs=PAIRS, shares=SHARES, seed=st.integers(-5, 2**70))
def test_a_split_is_a_partition_that_never_parts_equal_texts(
    strategy: Strategy, pairs: list[tuple[str, str]], shares: tuple[float, float], seed: int
) -> None:
    result = split(pairs, strategy, shares, seed)
    together = np.concatenate(sides(result))
    assert together.dtype == np.int64 and sorted(together.tolist()) == list(range(len(pairs)))
    found: defaultdict[str, set[int]] = defaultdict(set)
    for number, side in enumerate(sides(result)):
        for row in side.tolist():
            found[normalise(pairs[row][0])].add(number)
    assert all(len(numbers) == 1 for numbers in found.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(data=st.data(), pairs=PAIRS, shares=SHARES)
def test_row_order_does_not_matter(
    strategy: Strategy, data: st.DataObject, pairs: list[tuple[str, str]], shares: tuple[float, float]
) -> None:
    shuffled = data.draw(st.permutations(pairs))
    one = side_of_text(pairs, split(pairs, strategy, shares))
    assert one == side_of_text(shuffled, split(shuffled, strategy, shares))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(pairs=PAIRS, shares=SHARES)
def test_every_class_with_three_texts_stands_on_every_side(
    strategy: Strategy, pairs: list[tuple[str, str]], shares: tuple[float, float]
) -> None:
    pairs = consistent(pairs)
    texts: defaultdict[str, set[str]] = defaultdict(set)
    for text, label in pairs:
        texts[label].add(normalise(text))
    result = split(pairs, strategy, shares)
    labels_on = [{pairs[row][1] for row in side.tolist()} for side in sides(result)]
    for label, own in texts.items():
        assert label in labels_on[0], "a class that is not trained on cannot be predicted"
        if len(own) >= 3:
            assert all(label in labels_on[side] for side, share in ((1, shares[0]), (2, shares[1])) if share > 0)
    for side, share in ((result.validation, shares[0]), (result.test, shares[1])):
        assert share > 0 or len(side) == 0


@given(pairs=PAIRS, added=PAIRS)
def test_hash_moves_only_texts_that_top_up_a_class(pairs: list[tuple[str, str]], added: list[tuple[str, str]]) -> None:
    everything = consistent(pairs + added)
    for some in (everything[: len(pairs)], everything):
        moved: defaultdict[str, set[str]] = defaultdict(set)
        placed = side_of_text(some, split(some, "hash", (0.2, 0.2)))
        for text, label in some:
            drawn = fraction(Text().digest(text), 0)
            if placed[normalise(text)] != (2 if drawn >= 0.8 else 1 if drawn >= 1 - 0.2 - 0.2 else 0):
                moved[label].add(normalise(text))
        assert all(len(texts) <= 2 for texts in moved.values())


def many(count: int) -> list[tuple[str, str]]:
    return [(f"text {number}", "xyz"[number % 3]) for number in range(count)]


def test_rows_stay_on_their_side_when_rows_are_added_and_the_seed_changes() -> None:
    before = side_of_text(many(300), split(many(300), "hash", (0.15, 0.15), seed=1))
    after = side_of_text(many(900), split(many(900), "hash", (0.15, 0.15), seed=2))
    assert before.items() <= after.items()


def test_another_validation_share_leaves_test_alone() -> None:
    tests = [split(many(900), "hash", (share, 0.15)).test.tolist() for share in (0.0, 0.1, 0.3)]
    assert tests[0] == tests[1] == tests[2]


@pytest.mark.parametrize("strategy", ["stratified", "random"])
def test_the_seed_draws_another_split(strategy: Strategy) -> None:
    one, same, other = (split(many(300), strategy, (0.15, 0.15), seed=seed).test.tolist() for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(("strategy", "slack"), [("hash", 45), ("stratified", 2), ("random", 1)])
def test_shares_are_met(strategy: Strategy, slack: int) -> None:
    result = split(many(1000), strategy, (0.2, 0.1))
    assert abs(len(result.validation) - 200) <= slack and abs(len(result.test) - 100) <= slack


def test_stratified_meets_the_shares_in_every_class() -> None:
    pairs = [(f"a {number}", "a") for number in range(400)] + [(f"b {number}", "b") for number in range(40)]
    result = split(pairs, "stratified", (0.1, 0.1))
    assert sum(pairs[row][1] == "b" for row in result.test.tolist()) == 4


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.1), (0.1, float("nan"))])
def test_impossible_shares_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        split(many(9), "hash", shares)


def test_normalise_and_the_hash_never_change() -> None:
    assert normalise("  Ｆｕｌｌ\twidth  STRASSE Straße ") == "full width strasse strasse"
    assert fraction(Text().digest("hello world"), 0) == fraction(Text().digest(" Hello\nWORLD "), 0) == GOLDEN[0]
    assert fraction(Text().digest("hello world"), 7) == GOLDEN[1]


@given(st.text(), st.integers(0, 3))
def test_fractions_lie_in_the_unit_interval_and_normalising_is_idempotent(text: str, seed: int) -> None:
    assert 0 <= fraction(Text().digest(text), seed) < 1
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("groups", [3, 4, 9])
def test_as_many_groups_as_sides_leave_none_empty(groups: int) -> None:
    for salt in range(20):
        rows = rows_of([(f"text {n}", "ab"[n % 2]) for n in range(36)])
        values = [f"group {salt} {n % groups}" for n in range(36)]
        found = split_rows(rows, strategy="group", validation=0.15, test=0.15, seed=1, groups=values)
        assert all(len(side) for side in sides(found)), (groups, salt)
