"""Classes with one or two rows: they train, stay out of validation and test, and are told by name."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.labelled import LabelledRows
from finetune.data.options import RareClasses, SplitOptions
from finetune.data.records import Finding, has_errors
from finetune.data.sides import Sides, divide
from finetune.data.targets import DEFAULT_TARGET, Target
from finetune.data.targets.multi_label import LabelSetTarget

STRATEGIES = ["hash", "stratified", "random"]
SIZES = st.dictionaries(st.sampled_from([f"class {number}" for number in range(12)]), st.integers(1, 12), min_size=2)


def rows_of(sizes: dict[str, int], target: Target = DEFAULT_TARGET) -> LabelledRows:
    labels = [label for label, count in sizes.items() for _ in range(count)]
    texts = [f"word{number} other{number * 7}" for number in range(len(labels))]
    return LabelledRows(np.arange(1, len(labels) + 1), texts, labels, {}, target)


def cut(rows: LabelledRows, *, policy: Any = "keep", least: int = 3, **options: Any) -> Sides:
    rare = RareClasses(policy=policy, least=least)
    return divide(rows, None, None, options=SplitOptions.model_validate(options), seed=1, rare=rare)


def named(findings: list[Finding], code: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.code == code]
    assert finding.message and finding.fix
    return finding


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(sizes=SIZES)
def test_rare_classes_train_and_are_not_held_out(strategy: str, sizes: dict[str, int]) -> None:
    sides = cut(rows_of(sizes), strategy=strategy)
    assert not has_errors(sides.findings)
    assert sides.train.names() == set(sizes)
    assert len(sides.validation) > 0
    if max(sizes.values()) < 3:
        return
    rare = {label for label, count in sizes.items() if count < 3}
    assert rare.isdisjoint(sides.validation.names() | sides.test.names())
    assert sides.validation.names() == sides.test.names() == set(sizes) - rare
    told = [finding for finding in sides.findings if "cannot be judged" in finding.message]
    assert len(told) == bool(rare) and all(repr(label) in told[0].message for label in rare)


@given(sizes=SIZES, least=st.integers(1, 9))
def test_dropped_classes_are_on_no_side(sizes: dict[str, int], least: int) -> None:
    kept = {label: count for label, count in sizes.items() if count >= least}
    sides = cut(rows_of(sizes), policy="drop", least=least)
    if len(kept) < 2:
        assert has_errors(sides.findings)
        return
    everything = Counter([*sides.train.labels, *sides.validation.labels, *sides.test.labels])
    if max(kept.values()) > 1:
        assert everything == kept
    if kept != sizes:
        finding = named(sides.findings, "rare_class")
        assert finding.count == len(sizes) - len(kept) and "left out" in finding.message


@given(sizes=SIZES, least=st.integers(3, 9))
def test_merged_classes_become_one(sizes: dict[str, int], least: int) -> None:
    rare = {label for label, count in sizes.items() if count < least}
    sides = cut(rows_of(sizes), policy="other", least=least)
    names = sides.train.names() | sides.validation.names() | sides.test.names()
    if len(rare) == len(sizes):
        assert has_errors(sides.findings), "one class is left"
        return
    assert names == (set(sizes) - rare) | ({"other"} if rare else set())
    assert sum(map(len, (sides.train, sides.validation, sides.test))) == sum(sizes.values())


def test_a_class_that_is_called_other_takes_them_in() -> None:
    sides = cut(rows_of({"a": 12, "Other": 12, "b": 1, "c": 2}), policy="other")
    assert sides.train.names() == {"a", "Other"} and not has_errors(sides.findings)


def test_given_sides_follow_the_training_rows() -> None:
    train, test = rows_of({"a": 12, "b": 12, "c": 1}), rows_of({"c": 2, "a": 4})
    for policy, names in (("drop", {"a"}), ("other", {"a", "other"}), ("keep", {"a", "c"})):
        rare = RareClasses.model_validate({"policy": policy})
        sides = divide(train, None, test, options=SplitOptions(), seed=1, rare=rare)
        assert sides.test.names() == names and not has_errors(sides.findings)
        numbers = [number for number, label in zip(sides.test.row_numbers.tolist(), sides.test.labels, strict=True)]
        assert numbers == ([3, 4, 5, 6] if policy == "drop" else [1, 2, 3, 4, 5, 6])


def test_several_labels_lose_or_merge_the_rare_ones_and_keep_the_others() -> None:
    target = LabelSetTarget("text-multi-label")
    sizes = {json.dumps(own): 12 for own in (["a"], ["b"], ["a", "b"], [])}
    sizes |= {json.dumps(["a", "rare"]): 1, json.dumps(["seldom"]): 1}
    kept = cut(rows_of(sizes, target))
    assert kept.train.names() == {"a", "b", "rare", "seldom"}
    assert (kept.validation.names() | kept.test.names()) == {"a", "b"}
    dropped = cut(rows_of(sizes, target), policy="drop")
    assert sum(map(len, (dropped.train, dropped.validation, dropped.test))) == 49, "the row of seldom alone went"
    assert dropped.train.names() == {"a", "b"}
    assert cut(rows_of(sizes, target), policy="other").train.names() == {"a", "b", "other"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_class_among_the_near_duplicates_of_others_has_a_row_to_train_on(strategy: str) -> None:
    """Its units count for the other class, and may all be drawn for a later side."""
    for seed in range(30):
        texts = [f"{' '.join(f'w{seed}x{number}y{place}' for place in range(30))}" for number in range(60)]
        labels = ["ab"[number % 2] for number in range(60)]
        for number in range(4):
            texts += [f"{texts[number]} again", f"{texts[number]} once more"]
            labels += ["noisy", labels[number]]
        rows = LabelledRows(np.arange(1, len(texts) + 1), texts, labels)
        sides = cut(rows, strategy=strategy)
        assert sides.train.names() == {"a", "b", "noisy"}


def test_without_two_texts_of_any_class_the_training_rows_stand_in() -> None:
    sides = cut(rows_of({"a": 1, "b": 1, "c": 1}))
    assert len(sides.train) == len(sides.validation) == 3 and len(sides.test) == 0
    assert named(sides.findings, "nothing_held_out").severity == "warning"


@pytest.mark.parametrize("strategy", ["predefined", "time", "group"])
def test_a_class_that_a_column_puts_on_a_later_side_is_told_and_no_error(strategy: str) -> None:
    rows = rows_of({"a": 30, "b": 30, "late": 1})
    column = {"predefined": "column", "time": "time_column", "group": "group_column"}[strategy]
    places = [str(number % 30) for number in range(60)] + ["99"]
    sides_of = ["train" if number % 30 < 20 else "val" if number % 30 < 25 else "test" for number in range(60)] + [
        "test"
    ]
    rows.extras["c"] = list(sides_of if strategy == "predefined" else places)
    options: dict[str, Any] = {"strategy": strategy, column: "c"}
    sides = cut(rows, **options)
    assert not has_errors(sides.findings)
    if strategy == "group":
        assert "late" in sides.train.names()
    else:
        assert "never answered" in named(sides.findings, "unknown_label").message


def test_many_rare_classes_are_all_named() -> None:
    sides = cut(rows_of({"a": 30, "b": 30} | {f"rare {number}": 1 for number in range(60)}))
    message = named(sides.findings, "class_too_small").message
    assert all(f"'rare {number}' (1)" in message for number in range(60))


def test_copies_and_near_copies_count_once() -> None:
    words = " ".join(f"word{number}" for number in range(40))
    texts = [*(f"{words} {number}" for number in range(9)), *rows_of({"a": 40}).examples]
    rows = LabelledRows(np.arange(1, 50), texts, ["same"] * 9 + ["ab"[number % 2] for number in range(40)])
    sides = cut(rows)
    assert sides.train.labels.count("same") == 9
    assert defaultdict(int, Counter(sides.validation.labels))["same"] == 0
