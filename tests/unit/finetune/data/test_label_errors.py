from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from finetune.data.label_errors import suspected_label_errors
from finetune.data.labelled import LabelledRows
from finetune.training import suspects
from finetune.training.feature_cache import FeatureCache
from finetune.training.suspects import FOLDS, all_rows, find_suspects, stratified_folds
from modeling.inputs.text import Text
from tests.support.links import RecordingLink


def test_a_confident_other_answer_is_suspect_and_an_unsure_one_is_not() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.05], [0.2, 0.8], [0.1, 0.9], [0.55, 0.45]], np.float32)
    labels = np.array([0, 0, 1, 1, 1, 1])
    found = suspected_label_errors(probabilities, labels)
    assert (found.rows.tolist(), found.given.tolist(), found.suggested.tolist()) == ([2], [1], [0])
    assert found.margins.tolist() == pytest.approx([0.9])


@given(
    arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(2, 4)), elements=st.floats(0.0625, 1, width=32)),
    st.randoms(use_true_random=False),
)
def test_suspects_are_ranked_and_differ_from_the_given_label(raw: np.ndarray, draw: random.Random) -> None:
    probabilities = raw / raw.sum(1, keepdims=True)
    labels = np.array([draw.randrange(raw.shape[1]) for _ in raw])
    found = suspected_label_errors(probabilities, labels)
    assert (found.given != found.suggested).all() and (labels[found.rows] == found.given).all()
    assert (np.diff(found.margins) <= 0).all() and (found.margins > 0).all()
    assert len(set(found.rows.tolist())) == len(found)


def corpus(count: int = 400) -> tuple[LabelledRows, set[int]]:
    """Rows of four classes with words of their own, and the numbers of those whose label was changed."""
    draw = random.Random(2)
    names = ["earn", "grain", "ship", "trade"]
    texts, labels = [], []
    wrong: set[int] = set()
    for number in range(count):
        true = number % 4
        words = [f"{names[true]}{draw.randrange(12)}" for _ in range(5)] + [f"w{draw.randrange(60)}" for _ in range(10)]
        draw.shuffle(words)
        texts.append(" ".join(words))
        label = true
        if number % 25 == 7:
            label, wrong = (true + 1 + draw.randrange(3)) % 4, {*wrong, number + 1}
        labels.append(names[label])
    return LabelledRows(np.arange(1, count + 1), texts, labels), wrong


def test_flipped_labels_are_found() -> None:
    rows, wrong = corpus()
    link = RecordingLink()
    found = find_suspects(rows, link, seed=1)
    listed = {item["row"] for item in found}
    assert len(listed & wrong) >= 0.7 * len(wrong) and len(listed & wrong) >= 0.9 * len(listed)
    for item in found:
        if item["row"] in wrong:
            true = rows.examples[item["row"] - 1]
            assert item["given"] == rows.labels[item["row"] - 1] and f"{item['suggested']}" in true
    (event,) = link.of("data_warning")
    data = event["data"]
    assert (data["code"], data["severity"], data["count"]) == ("suspected_label_error", "warning", len(found))
    assert data["rows"] == [item["row"] for item in found][:20] and event["level"] == "warn"


def test_sound_labels_raise_no_warning() -> None:
    rows, wrong = corpus()
    fixed = [*rows.labels]
    names = ["earn", "grain", "ship", "trade"]
    for number in wrong:
        fixed[number - 1] = names[(number - 1) % 4]
    link = RecordingLink()
    found = find_suspects(LabelledRows(rows.row_numbers, rows.examples, fixed), link, seed=1)
    assert len(found) <= 4 and all(event["level"] == "info" for event in link.of("data_warning"))


def test_a_class_of_one_row_does_not_disturb_the_search() -> None:
    rows, wrong = corpus()
    lone = LabelledRows(np.arange(1, 402), [*rows.examples, "something else entirely"], [*rows.labels, "lone"])
    listed = {item["row"] for item in find_suspects(lone, RecordingLink(), seed=1)}
    assert len(listed & wrong) >= 0.6 * len(wrong)


def test_every_side_is_searched_and_each_row_says_where_it_is() -> None:
    rows, wrong = corpus()
    parts = [rows.take(np.arange(start, end)) for start, end in ((0, 280), (280, 340), (340, 400))]
    found = find_suspects(all_rows(*parts), RecordingLink(), seed=1)
    sides = {item["row"]: item["side"] for item in found}
    assert len(sides.keys() & wrong) >= 0.7 * len(wrong) and set(sides.values()) == {"train", "validation", "test"}
    for row, side in sides.items():
        assert side == ("train" if row <= 280 else "validation" if row <= 340 else "test")
    assert all(item["text"] == rows.examples[item["row"] - 1][:200] for item in found)
    assert len(all_rows(parts[0], parts[0], parts[2])) == 340, "training rows that stand in are not counted twice"


def test_the_same_rows_are_searched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    searches: list[int] = []
    search = suspects.out_of_fold

    def counted(rows: LabelledRows, *rest: Any, **options: Any) -> Any:
        searches.append(len(rows))
        return search(rows, *rest, **options)

    monkeypatch.setattr(suspects, "out_of_fold", counted)
    rows, _ = corpus()
    cache = FeatureCache(tmp_path, budget_bytes=1 << 20)
    first = find_suspects(rows, RecordingLink(), seed=1, cache=cache)
    link = RecordingLink()
    assert find_suspects(rows, link, seed=1, cache=cache) == first == find_suspects(rows, RecordingLink(), seed=1)
    assert len(searches) == 2 and len(link.of("data_warning")) == 1
    relabelled = LabelledRows(rows.row_numbers, rows.examples, [*rows.labels[1:], rows.labels[0]])
    retold = LabelledRows(rows.row_numbers, [*rows.examples[1:], rows.examples[0]], rows.labels)
    for changed, seed in ((rows, 2), (relabelled, 1), (retold, 1)):
        searches.clear()
        find_suspects(changed, RecordingLink(), seed=seed, cache=cache)
        assert searches == [len(rows)]


def test_too_many_rows_are_left_alone_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "MOST_ROWS", 399)
    link = RecordingLink()
    assert find_suspects(corpus()[0], link, seed=1) == []
    assert link.of("data_warning")[0]["data"]["severity"] == "info"


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 2)), min_size=1, max_size=40), st.data())
def test_folds_keep_equal_texts_together_and_do_not_depend_on_row_order(
    pairs: list[tuple[str, int]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(pairs))
    one = stratified_folds([Text().digest(text) for text, _ in pairs], np.array([label for _, label in pairs]))
    other = stratified_folds([Text().digest(text) for text, _ in shuffled], np.array([label for _, label in shuffled]))
    by_text = dict(zip((text for text, _ in pairs), one.tolist(), strict=True))
    assert all(by_text[text] == fold for (text, _), fold in zip(pairs, one.tolist(), strict=True))
    assert by_text == dict(zip((text for text, _ in shuffled), other.tolist(), strict=True))
    assert set(one.tolist()) <= set(range(FOLDS))
