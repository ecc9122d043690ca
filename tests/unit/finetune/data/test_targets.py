"""How label columns are read by task, and how rows with several labels or numbers fall on the sides of a split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.check import ROWS_FILE, write_checked
from finetune.data.labelled import LabelledRows
from finetune.data.load import load_sides
from finetune.data.options import Columns, SplitOptions
from finetune.data.sides import Sides, divide
from finetune.data.splits import split_rows
from finetune.data.targets import parse_list
from finetune.data.targets.multi_label import LabelSetTarget
from finetune.data.targets.regression import NumberTarget

WORDS = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima".split()


def text(number: int) -> str:
    return " ".join(f"{WORDS[(number * 7 + place * 5) % 12]}{number}" for place in range(5))


def load(folder: Path, content: str | bytes, *, kind: Any = "jsonl", task: Any = "auto", **options: Any) -> Sides:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "raw").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert write_checked(folder / "raw", kind, folder).is_valid
    split = SplitOptions.model_validate(options)
    return load_sides({"train": folder / ROWS_FILE}, columns=Columns(), options=split, seed=1, task=task)


def jsonl(labels: Sequence[Any]) -> str:
    return "\n".join(json.dumps({"text": text(number), "label": label}) for number, label in enumerate(labels))


def csv(cells: Sequence[str]) -> str:
    quoted = [cell.replace('"', '""') for cell in cells]
    return "text,label\n" + "\n".join(f'{text(number)},"{cell}"' for number, cell in enumerate(quoted))


def everything(sides: Sides) -> dict[int, str]:
    """Labels by row number."""
    rows = (sides.train, sides.validation, sides.test)
    return {
        number: label for side in rows for number, label in zip(side.row_numbers.tolist(), side.labels, strict=True)
    }


def errors(sides: Sides) -> dict[str, Any]:
    return {finding.code: finding for finding in sides.findings if finding.severity == "error"}


SETS = [["b", "a"], [], ["a"], ["c", "a", "c"], ["  b "]] * 12


def test_lists_of_jsonl_are_several_labels_without_being_asked(tmp_path: Path) -> None:
    sides = load(tmp_path, jsonl(SETS))
    assert sides.train.target.task == "text-multi-label"
    assert sides.train.names() == {"a", "b", "c"}
    found = everything(sides)
    assert [json.loads(found[row]) for row in range(1, 6)] == [["a", "b"], [], ["a"], ["a", "c"], ["b"]]
    assert len(found) == len(SETS), "a row without labels is a row"


@pytest.mark.parametrize(("separator", "told"), [("|", "'|'"), (";", "';'")])
def test_separated_labels_are_read_and_the_separator_told(tmp_path: Path, separator: str, told: str) -> None:
    cells = [separator.join(own) or "[]" if own else "" for own in SETS]
    cells = [cell if cell else "a" for cell in cells]
    sides = load(tmp_path, csv(cells), kind="csv", task="text-multi-label")
    (finding,) = [finding for finding in sides.findings if finding.code == "label_separator"]
    assert told in finding.message and finding.column == "label"
    assert json.loads(everything(sides)[1]) == ["a", "b"]


def test_a_bar_anywhere_leaves_semicolons_to_the_labels(tmp_path: Path) -> None:
    sides = load(tmp_path, csv(["a;b|c", "a;b", "c", "c|a;b"] * 15), kind="csv", task="text-multi-label")
    assert sides.train.names() == {"a;b", "c"}


def test_a_cell_of_csv_may_hold_a_json_list_and_an_empty_one_is_left_out(tmp_path: Path) -> None:
    sides = load(tmp_path, csv(['["a|b", "c"]', "[]", "", "c"] * 15), kind="csv", task="text-multi-label")
    assert sides.train.names() == {"a|b", "c"}
    (finding,) = [finding for finding in sides.findings if finding.code == "empty_value"]
    assert (finding.severity, finding.count, finding.rows[0]) == ("warning", 15, 3)


def test_lists_of_parquet(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.list_(pa.string()), pa.large_list(pa.large_string()))):
        columns = {"text": [text(row) for row in range(60)], "label": pa.array(SETS, kind)}
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        sides = load(tmp_path / str(number), (tmp_path / "t.parquet").read_bytes(), kind="parquet")
        assert sides.train.names() == {"a", "b", "c"}


def test_the_report_of_a_dataset_counts_the_items_of_lists(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text(jsonl(SETS))
    columns = {column.name: column for column in write_checked(tmp_path / "raw", "jsonl", tmp_path).columns}
    column = columns["label"]
    assert (column.type, column.counts) == ("list", {"a": 36, "c": 24, "b": 12, "  b ": 12})


@pytest.mark.parametrize(
    ("labels", "task", "code", "row"),
    [
        (["a", "b", ["a"]] * 20, "text-classification", "unexpected_list", 3),
        (["a", "b", ["a"]] * 20, "auto", "unexpected_list", 3),
        ([1.5, "two", 3] * 20, "text-regression", "non_numeric_target", 2),
        ([1.5, ["2"], 3] * 20, "text-regression", "non_numeric_target", 2),
        ([1, 2, "1,000"] * 20, "text-regression", "non_numeric_target", 3),
        ([1, "NaN", 2] * 20, "text-regression", "non_numeric_target", 2),
        ([1, "inf", 2] * 20, "text-regression", "non_numeric_target", 2),
        ([1, 2, "1e999"] * 20, "text-regression", "non_numeric_target", 3),
        ([1, 2, "١"] * 20, "text-regression", "non_numeric_target", 3),
        ([3, 3.0, "3"] * 20, "text-regression", "constant_target", 1),
        ([[], [], []] * 20, "text-multi-label", "single_class", 1),
        ([["Price"], ["price"], []] * 20, "text-multi-label", "label_case_collision", 2),
    ],
)
def test_labels_that_do_not_fit_the_task_name_row_column_and_way_out(
    tmp_path: Path, labels: list[Any], task: str, code: str, row: int
) -> None:
    found = errors(load(tmp_path, jsonl(labels), task=task))
    assert list(found) == [code]
    assert row in found[code].rows and found[code].fix
    if code in {"unexpected_list", "non_numeric_target"}:
        assert found[code].column == "label" and f"row {row}" in found[code].message and found[code].count == 20


def test_rows_without_a_number_are_left_out_and_told(tmp_path: Path) -> None:
    sides = load(tmp_path, jsonl([1, None, 2.5, " "] * 20), task="text-regression")
    assert not errors(sides) and len(everything(sides)) == 40
    (finding,) = [finding for finding in sides.findings if finding.code == "non_numeric_target"]
    assert (finding.severity, finding.count, finding.rows[:2]) == ("warning", 40, [2, 4])


def test_equal_texts_with_far_numbers_conflict_and_near_ones_do_not(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text(number), "label": number % 10}) for number in range(60)]
    far = json.dumps({"text": text(0), "label": 9})
    near = json.dumps({"text": text(1), "label": 1.1})
    conflicts = [
        [
            finding
            for finding in load(tmp_path / name, "\n".join([*lines, extra]), task="text-regression").findings
            if finding.code == "conflicting_labels"
        ]
        for name, extra in (("far", far), ("near", near))
    ]
    assert [len(found) for found in conflicts] == [1, 0]
    assert conflicts[0][0].rows == [1, 61]


def test_labels_that_only_a_given_side_has_are_unknown(tmp_path: Path) -> None:
    for name, labels in (("train", SETS), ("test", [["a", "new"], ["b"]] * 10)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "raw").write_text(jsonl(labels))
        write_checked(folder / "raw", "jsonl", folder)
    files = {name: tmp_path / name / ROWS_FILE for name in ("train", "test")}
    sides = load_sides(files, columns=Columns(), options=SplitOptions(), seed=1, task="auto")
    assert "'new'" in errors(sides)["unknown_label"].message and errors(sides)["unknown_label"].count == 10


# Splits


def rows_of(labels: list[str], target: Any) -> LabelledRows:
    numbers = np.arange(1, len(labels) + 1)
    return LabelledRows(numbers, [text(number) for number in range(len(labels))], labels, {}, target)


def test_every_label_has_its_share_on_every_side_of_a_stratified_split() -> None:
    draw = np.random.default_rng(0)
    chances = np.array([0.5, 0.3, 0.1, 0.04])
    labels = [
        json.dumps([name for name, is_due in zip("abcd", draw.random(4) < chances, strict=True) if is_due])
        for _ in range(1000)
    ]
    rows = rows_of(labels, LabelSetTarget("text-multi-label"))
    sides = divide(rows, None, None, options=SplitOptions(strategy="stratified"), seed=1)
    for side, share in ((sides.train, 0.7), (sides.validation, 0.15), (sides.test, 0.15)):
        for name in "abcd":
            count = sum(f'"{name}"' in label for label in side.labels)
            total = sum(f'"{name}"' in label for label in labels)
            assert abs(count - share * total) <= max(3, 0.15 * share * total), (name, share)


@given(st.lists(st.sets(st.sampled_from("abc")), min_size=1, max_size=30))
def test_a_stratum_is_one_of_the_rows_labels_and_the_rarest_keeps_all_of_its_rows(sets: list[set[str]]) -> None:
    labels = [json.dumps(sorted(own)) for own in sets]
    strata = LabelSetTarget("text-multi-label").strata(labels)
    assert all(stratum in own if own else stratum == "(none)" for stratum, own in zip(strata, sets, strict=True))
    counts = {name: sum(name in own for own in sets) for name in "abc"}
    present = [name for name in "abc" if counts[name]]
    if present:
        rarest = min(present, key=lambda name: (counts[name], name))
        assert strata.count(rarest) == counts[rarest]


@pytest.mark.parametrize("strategy", ["hash", "random", "stratified"])
@given(st.lists(st.sets(st.sampled_from("abcdef"), max_size=4), min_size=6, max_size=25), st.integers(0, 99))
def test_every_label_stands_in_training_however_rare(strategy: Any, sets: list[set[str]], seed: int) -> None:
    rows = rows_of([json.dumps(sorted(own)) for own in sets], LabelSetTarget("text-multi-label"))
    split = split_rows(rows, strategy=strategy, validation=0.3, test=0.3, seed=seed)
    assert rows.take(split.train).names() == rows.names()


def test_numbers_are_spread_over_the_sides_by_their_size() -> None:
    values = np.random.default_rng(1).lognormal(size=600)
    rows = rows_of([repr(float(value)) for value in values], NumberTarget("text-regression"))
    sides = divide(rows, None, None, options=SplitOptions(strategy="stratified"), seed=1)
    middle = np.median(values)
    for side in (sides.train, sides.validation, sides.test):
        own = np.array([float(label) for label in side.labels])
        assert abs((own > middle).mean() - 0.5) < 0.08 and own.max() > np.quantile(values, 0.9)


@given(st.text(max_size=20))
def test_lists_are_told_from_other_cells(cell: str) -> None:
    assert parse_list(json.dumps([cell])) == [cell]
    assert parse_list(json.dumps(cell)) is None and parse_list(f"{{{cell}") is None
    assert parse_list("[1]") == ["1"] and parse_list("[" * 5000) is None
