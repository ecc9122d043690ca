from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.given_sides import parse_time, predefined_sides, time_sides
from finetune.data.labelled import LabelledRows
from finetune.data.options import SplitOptions
from finetune.data.records import Finding
from finetune.data.sides import Sides, divide

WORDS = [f"word{number}" for number in range(300)]


def rows_of(count: int, extras: dict[str, Sequence[str | None]] | None = None, seed: int = 0) -> LabelledRows:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=30)) for _ in range(count)]
    labels = ["xyz"[number % 3] for number in range(count)]
    numbers = np.arange(1, count + 1, dtype=np.int64)
    return LabelledRows(numbers, texts, labels, {name: list(values) for name, values in (extras or {}).items()})


def with_text(rows: LabelledRows, place: int, text: str) -> LabelledRows:
    texts = [*rows.examples]
    texts[place] = text
    return LabelledRows(rows.row_numbers, texts, rows.labels, rows.extras)


def cut(rows: LabelledRows, **options: object) -> Sides:
    return divide(rows, None, None, options=SplitOptions.model_validate(options), seed=1)


def named(findings: Sequence[Finding], code: str, severity: str | None = None) -> Finding:
    (finding,) = [f for f in findings if f.code == code and severity in (None, f.severity)]
    assert finding.message and finding.fix
    return finding


def texts_of(sides: Sides) -> list[set[str]]:
    return [set(side.examples) for side in (sides.train, sides.validation, sides.test)]


NEAR = " ".join(WORDS[100:140])
NEARER = f"{NEAR} indeed"


@pytest.mark.parametrize("strategy", ["hash", "stratified", "random"])
def test_near_duplicates_stand_on_one_side(strategy: str) -> None:
    parted = 0
    for seed in range(20):
        base = " ".join(random.Random(seed).choices(WORDS, k=40))
        rows = with_text(with_text(rows_of(90, seed=seed), 4, base), 50, f"{base} indeed")
        sides = cut(rows, strategy=strategy)
        holding = [base in texts for texts in texts_of(sides)]
        assert holding == [f"{base} indeed" in texts for texts in texts_of(sides)]
        parted += not holding[0]
        assert named(sides.findings, "near_duplicate_row").rows == [5, 51]
    assert parted, "if all stand in training, staying together shows nothing"


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_added_near_duplicates_pull_rows_into_training_only(seed: int, added: int) -> None:
    draw = random.Random(seed)
    rows = rows_of(60, seed=seed)
    copies = [f"{draw.choice(rows.examples)} again{number}" for number in range(added)]
    more = LabelledRows(
        np.arange(1, 61 + added), rows.examples + copies, rows.labels + [draw.choice("xyz") for _ in copies]
    )
    before, after = texts_of(cut(rows)), texts_of(cut(more))
    # Classes of twenty texts need no topping up but by rare chance, which may move one text a class and side.
    assert len(before[0] & (after[1] | after[2])) <= 2


def test_groups_never_part_and_keep_their_side() -> None:
    values = [f"customer {number % 40}" for number in range(400)]
    sides = cut(rows_of(400, {"customer": values}), strategy="group", group_column="customer")
    groups = [set(side.extras["customer"]) for side in (sides.train, sides.validation, sides.test)]
    assert all(groups) and not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    later = cut(
        rows_of(900, {"customer": [*values, *(f"new {n % 60}" for n in range(500))]}, seed=9),
        strategy="group",
        group_column="customer",
    )
    again = [set(side.extras["customer"]) for side in (later.train, later.validation, later.test)]
    assert all(before <= after for before, after in zip(groups, again, strict=True))


def test_rows_without_a_group_go_by_their_text_and_are_told() -> None:
    values: list[str | None] = [f"c{number % 10}" for number in range(99)]
    values[7] = values[8] = None
    sides = cut(rows_of(99, {"g": values}), strategy="group", group_column="g")
    assert named(sides.findings, "empty_value").rows == [8, 9]
    assert len(sides.train) + len(sides.validation) + len(sides.test) == 99


def test_too_few_groups_is_an_error() -> None:
    sides = cut(rows_of(40, {"g": [f"c{number % 2}" for number in range(40)]}), strategy="group", group_column="g")
    finding = named(sides.findings, "class_too_small", "error")
    assert finding.column == "g" and "2 groups" in finding.message and finding.rows[:2] == [1, 2]


def test_the_oldest_train_and_the_newest_test() -> None:
    order = random.Random(1).sample(range(200), 200)
    days = [f"2026-{1 + day // 28:02d}-{1 + day % 28:02d}" for day in order]
    sides = cut(rows_of(200, {"day": days}), strategy="time", time_column="day")
    train, validation, test = (side.extras["day"] for side in (sides.train, sides.validation, sides.test))
    assert max(map(str, train)) < min(map(str, validation)) <= max(map(str, validation)) < min(map(str, test))
    assert (len(train), len(validation), len(test)) == (140, 30, 30)


@given(st.lists(st.integers(0, 12), min_size=3, max_size=60), st.sampled_from([(0.15, 0.15), (0.3, 0.0), (0.4, 0.4)]))
def test_ties_of_time_stay_together_and_every_side_has_rows(times: list[int], shares: tuple[float, float]) -> None:
    rows = rows_of(len(times), {"t": [str(time) for time in times]})
    sides, findings = time_sides(rows, "t", validation=shares[0], test=shares[1])
    wanted = 1 + sum(share > 0 for share in shares)
    if findings:
        assert len(set(times)) < wanted and findings[0].code == "invalid_time"
        return
    assert len(set(sides.tolist())) == wanted
    latest = [max(t for t, s in zip(times, sides, strict=True) if s == side) for side in sorted(set(sides.tolist()))]
    earliest = [min(t for t, s in zip(times, sides, strict=True) if s == side) for side in sorted(set(sides.tolist()))]
    assert all(before < after for before, after in zip(latest, earliest[1:], strict=False))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1970-01-02", 86400.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("1970-01-01T00:00:01Z", 1.0),
        (" 1970-01-01 00:01 ", 60.0),
        ("1.5e3", 1500.0),
        ("-3", -3.0),
    ],
)
def test_times_that_parse(value: str, seconds: float) -> None:
    parsed = parse_time(value)
    assert parsed is not None and parsed[0] == seconds


@pytest.mark.parametrize("value", [None, "", "yesterday", "nan", "inf", "1e999", "03/09/2026", "2026-13-01"])
def test_times_that_do_not(value: str | None) -> None:
    assert parse_time(value) is None


def test_unreadable_and_mixed_times_name_their_rows() -> None:
    times: list[str | None] = [f"2026-03-{1 + number % 28:02d}" for number in range(60)]
    times[3], times[9] = "soon", None
    finding = named(cut(rows_of(60, {"t": times}), strategy="time", time_column="t").findings, "invalid_time")
    assert (finding.severity, finding.rows, finding.count, finding.column) == ("error", [4, 10], 2, "t")
    times[3], times[9] = "17", "18"
    finding = named(cut(rows_of(60, {"t": times}), strategy="time", time_column="t").findings, "invalid_time")
    assert finding.rows == [4, 10] and "mixes" in finding.message


def test_names_of_sides_and_their_aliases() -> None:
    values = ["train", " Training", "dev", "VAL", "eval", "validation", "test", "Testing"]
    sides, findings = predefined_sides(rows_of(8, {"s": values}), "s")
    assert findings == [] and sides.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_unknown_names_are_an_error_with_rows() -> None:
    values: list[str | None] = ["train"] * 30
    values[4], values[6] = "tran", None
    finding = named(cut(rows_of(30, {"s": values}), strategy="predefined", column="s").findings, "unknown_split")
    assert (finding.severity, finding.rows, finding.column) == ("error", [5, 7], "s") and "'tran'" in finding.message


def test_predefined_sides_stand_as_named_and_a_missing_one_is_made() -> None:
    values = ["train" if number < 100 else "dev" for number in range(120)]
    rows = rows_of(120, {"s": values})
    sides = cut(rows, strategy="predefined", column="s")
    assert sides.validation.row_numbers.tolist() == list(range(101, 121))
    assert len(sides.test) > 0 and set(sides.test.row_numbers.tolist()) <= set(range(1, 101))
    assert "test" in named(sides.findings, "unknown_split", "info").message
    without = cut(rows, strategy="predefined", column="s", test=0)
    assert len(without.test) == 0 and len(without.train) == 100


def test_a_named_side_and_a_dataset_for_it_contradict() -> None:
    rows = rows_of(60, {"s": ["train" if number < 50 else "test" for number in range(60)]})
    sides = divide(rows, None, rows_of(20, seed=5), options=SplitOptions(strategy="predefined", column="s"), seed=1)
    finding = named(sides.findings, "unknown_split", "error")
    assert finding.rows == list(range(51, 61)) and "test_dataset" in finding.message


@pytest.mark.parametrize("leaks", ["auto", "keep", "drop"])
@pytest.mark.parametrize("strategy", ["time", "predefined"])
def test_what_becomes_of_leaks(strategy: str, leaks: str) -> None:
    values = [
        str(number) if strategy == "time" else "train" if number < 60 else "val" if number < 80 else "test"
        for number in range(100)
    ]
    rows = with_text(with_text(rows_of(100, {"c": values}), 3, NEAR), 97, NEARER)
    rows = with_text(rows, 5, rows.examples[96])
    column = "time_column" if strategy == "time" else "column"
    sides = cut(rows, **{"strategy": strategy, column: "c", "leaks": leaks, "validation": 0.2, "test": 0.2})
    is_dropped = leaks == "drop" or (leaks == "auto" and strategy == "time")
    assert ({4, 6} & set(sides.train.row_numbers.tolist()) == set()) is is_dropped
    if is_dropped:
        finding = named(sides.findings, "near_duplicate_across_splits")
        assert (finding.rows, finding.count) == ([4, 6], 2) and "left out" in finding.message
    else:
        assert named(sides.findings, "split_overlap").rows == [97]
        assert named(sides.findings, "near_duplicate_across_splits").rows == [98]


def test_leaks_between_datasets_are_reported_and_dropped_on_demand() -> None:
    train = with_text(rows_of(90), 10, NEAR)
    test = with_text(with_text(rows_of(30, seed=7), 2, NEARER), 3, train.examples[20])
    kept = divide(train, None, test, options=SplitOptions(), seed=1)
    assert named(kept.findings, "split_overlap").rows == [4]
    assert named(kept.findings, "near_duplicate_across_splits").rows == [3]
    assert len(kept.train) + len(kept.validation) == 90 and len(kept.test) == 30
    dropped = divide(train, None, test, options=SplitOptions(leaks="drop"), seed=1)
    assert len(dropped.train) + len(dropped.validation) == 88 and len(dropped.test) == 30
    assert named(dropped.findings, "near_duplicate_across_splits").rows == [11, 21]


def test_dropping_leaves_every_class_to_training() -> None:
    rows = rows_of(60, {"t": [str(number) for number in range(60)]})
    labels = ["rare" if number in (2, 58) else label for number, label in enumerate(rows.labels)]
    rows = with_text(LabelledRows(rows.row_numbers, rows.examples, labels, rows.extras), 2, rows.examples[58])
    sides = cut(rows, strategy="time", time_column="t")
    assert "rare" in sides.train.labels and named(sides.findings, "split_overlap").rows == [59]


def test_a_group_in_a_dataset_given_apart_is_told() -> None:
    train = rows_of(90, {"g": [f"c{number % 30}" for number in range(90)]})
    test = rows_of(30, {"g": ["c3" if number == 4 else f"d{number}" for number in range(30)]}, seed=3)
    sides = divide(train, None, test, options=SplitOptions(strategy="group", group_column="g"), seed=1)
    assert named(sides.findings, "split_overlap").rows == [5]


def test_a_class_that_only_the_future_has_is_told() -> None:
    rows = rows_of(60, {"t": [str(number) for number in range(60)]})
    rows = LabelledRows(rows.row_numbers, rows.examples, [*rows.labels[:-1], "new"], rows.extras)
    finding = named(cut(rows, strategy="time", time_column="t").findings, "unknown_label")
    assert (finding.severity, finding.rows) == ("warning", [60])


@pytest.mark.parametrize(
    "options", [{"strategy": "group"}, {"strategy": "time"}, {"strategy": "predefined"}, {"time_column": "t"}]
)
def test_a_strategy_and_its_column_go_together(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"needs|no effect"):
        SplitOptions.model_validate(options)
