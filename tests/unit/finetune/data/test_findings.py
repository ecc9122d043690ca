from __future__ import annotations

import numpy as np
import pytest

from finetune.data.findings import inspect_rows
from finetune.data.labelled import LabelledRows
from finetune.data.records import Finding


def rows_of(*pairs: tuple[str, str], first_row: int = 1) -> LabelledRows:
    numbers = np.arange(first_row, first_row + len(pairs), dtype=np.int64)
    return LabelledRows(numbers, [text for text, _ in pairs], [label for _, label in pairs])


def many(label: str, count: int) -> list[tuple[str, str]]:
    return [(f"{label} text {number}", label) for number in range(count)]


def named(findings: list[Finding], code: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.code == code]
    assert finding.message and finding.fix
    return finding


def test_sound_rows_have_no_findings() -> None:
    assert inspect_rows(rows_of(*many("a", 10), *many("b", 10)), rows_of(("new", "a")), rows_of(("other", "b"))) == []


def test_one_row_and_no_row_are_errors() -> None:
    finding = named(inspect_rows(rows_of(("hello", "x"), first_row=7)), "single_class")
    assert (finding.severity, finding.rows) == ("error", [7]) and "only 1 row" in finding.message
    assert named(inspect_rows(rows_of()), "single_class").severity == "error"


def test_single_class() -> None:
    finding = named(inspect_rows(rows_of(*many("x", 50))), "single_class")
    assert (finding.severity, finding.count, len(finding.rows)) == ("error", 50, 20) and "'x'" in finding.message


def test_small_classes_are_told_below_the_minimum_as_not_judged_and_below_ten_as_poor() -> None:
    rows = rows_of(*many("big", 12), *many("tiny", 2), *many("small", 3))
    rare, small = [finding for finding in inspect_rows(rows) if finding.code == "class_too_small"]
    assert (rare.severity, rare.rows, rare.count) == ("warning", [13, 14], 1) and "'tiny' (2)" in rare.message
    assert "cannot be judged" in rare.message and "rare_classes" in rare.fix
    assert (small.severity, small.rows) == ("warning", [15, 16, 17]) and "'small' (3)" in small.message
    (told,) = [f for f in inspect_rows(rows, min_rows_per_class=2) if f.code == "class_too_small"]
    assert "cannot be judged" not in told.message


def test_copies_do_not_make_a_class_larger() -> None:
    finding = named(inspect_rows(rows_of(*many("a", 10), *[("same", "b")] * 10)), "class_too_small")
    assert "cannot be judged" in finding.message and "'b' (1)" in finding.message


def test_a_quantity_as_label_is_pointed_to_regression() -> None:
    rows = rows_of(*((f"text {number}", str(number / 7)) for number in range(30)))
    assert "regression" in named(inspect_rows(rows), "class_too_small").fix


@pytest.mark.parametrize(("count", "is_told"), [(200, False), (201, True)])
def test_imbalance(count: int, is_told: bool) -> None:
    findings = inspect_rows(rows_of(*many("a", count), *many("b", 10)))
    assert [(f.code, f.severity) for f in findings] == ([("imbalance", "warning")] if is_told else [])


def test_duplicates_are_told_with_the_rows_of_the_copies() -> None:
    rows = rows_of(*many("a", 20), *many("b", 20), ("A  Text 0", "a"))
    finding = named(inspect_rows(rows), "duplicate_row")
    assert (finding.severity, finding.rows, finding.count) == ("info", [41], 1)
    rows = rows_of(*many("a", 10), *many("a", 10), *many("b", 10))
    assert named(inspect_rows(rows), "duplicate_row").severity == "warning"


def test_conflicting_labels() -> None:
    rows = rows_of(*many("a", 10), *many("b", 10), ("ＡＢＣ", "a"), ("abc ", "b"))
    findings = inspect_rows(rows)
    finding = named(findings, "conflicting_labels")
    assert (finding.severity, finding.rows, finding.count) == ("warning", [21, 22], 2)
    assert "'a', 'b'" in finding.message and len(findings) == 1


def test_label_case_collision_names_spellings_and_rows() -> None:
    rows = rows_of(*many("Sport", 12), *many("news", 12), ("x", "sport"), ("y", "SPORT"))
    finding = named(inspect_rows(rows), "label_case_collision")
    assert (finding.severity, finding.rows) == ("error", [25, 26])
    assert "'Sport' / 'sport' / 'SPORT'" in finding.message


def test_unknown_label_and_overlap_name_the_split() -> None:
    train = rows_of(*many("a", 10), *many("b", 10))
    findings = inspect_rows(train, rows_of(("fresh", "c"), first_row=5), rows_of(("A TEXT 3", "a"), ("n", "b")))
    unknown, overlap = named(findings, "unknown_label"), named(findings, "split_overlap")
    assert (unknown.severity, unknown.rows) == ("error", [5]) and "validation" in unknown.message
    assert (overlap.severity, overlap.rows) == ("warning", [1]) and "test" in overlap.message
    assert [finding.severity for finding in findings] == ["error", "warning"]
    of_a_cut = inspect_rows(train, rows_of(("fresh", "c"), first_row=5), cut=["validation"])
    told = named(of_a_cut, "unknown_label")
    assert told.severity == "warning" and "never answered" in told.message


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([str(number) for number in range(10_001)], "more than 10,000 labels"),
        (["x" * 900 + str(number) for number in range(300)], "names have more than 256,000 bytes"),
        (["a", "ü" * 1001], "1,001 characters"),
    ],
)
def test_labels_that_no_version_could_hold_are_an_error(labels: list[str], says: str) -> None:
    finding = named(inspect_rows(rows_of(*((f"text {label}", label) for label in labels))), "too_many_labels")
    assert finding.severity == "error" and says in finding.message


def test_as_many_labels_as_a_version_can_hold_are_none() -> None:
    rows = rows_of(*((f"text {number}", str(number)) for number in range(10_000)))
    assert "too_many_labels" not in {finding.code for finding in inspect_rows(rows)}


@pytest.mark.parametrize("other", ["cafe\u0301", "caf\u00e9\u200b", "\ufeffcaf\u00e9"])
def test_labels_that_look_alike_are_shown_by_their_code_points(other: str) -> None:
    rows = rows_of(*many("caf\u00e9", 12), *many("news", 12), ("x", other))
    finding = named(inspect_rows(rows), "label_case_collision")
    assert (finding.severity, finding.rows) == ("error", [25])
    assert ascii("caf\u00e9") in finding.message and ascii(other) in finding.message


@pytest.mark.parametrize("label", ["nan", "None", "NULL", "<NA>"])
def test_a_class_that_is_called_like_no_value_is_told(label: str) -> None:
    finding = named(inspect_rows(rows_of(*many("a", 12), *many(label, 12))), "empty_value")
    assert (finding.severity, finding.count) == ("warning", 12) and repr(label) in finding.message
    assert not [one for one in inspect_rows(rows_of(*many("a", 12), *many("none", 12))) if one.code == "empty_value"]
