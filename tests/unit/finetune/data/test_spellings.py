"""Lists, names and numbers as people and programs write them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.spellings import label_name, number_spelling, plain_number, read_list

NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5)


@given(NAMES)
def test_lists_of_json_and_of_python_are_read_back(names: list[str]) -> None:
    for text, spelling in ((json.dumps(names), "json"), (repr(names), "python")):
        found = read_list(text)
        assert found is not None and found.items == names
        assert found.spelling in {spelling, "json"}
    if names:
        assert read_list(repr(tuple(names))) is not None or "(" not in repr(tuple(names))


@given(st.lists(st.from_regex(r"[a-z]{1,9}( [a-z]{1,5})?", fullmatch=True), min_size=1, max_size=30))
def test_arrays_as_numpy_prints_them(names: list[str]) -> None:
    for array in (np.array(names), np.array(names, dtype=object)):
        for text in (str(array), repr(array)):
            found = read_list(text)
            assert found is not None and found.items == names, text


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ("[1, 2]", ["1", "2"]),
        ("[1 2]", ["1", "2"]),
        ("[1. 2.5]", ["1", "2.5"]),
        ("[True, False]", ["True", "False"]),
        ("[true, 1]", ["true", "1"]),
        ("[]", []),
        (" ['a',\n 'b'] ", ["a", "b"]),
        ("('a', 'b')", ["a", "b"]),
        ("('a',)", ["a"]),
        ("{'a', 'b'}", ["a", "b"]),
        ("array(['a', 'b'], dtype=object)", ["a", "b"]),
        ("array(['a'], dtype='<U5')", ["a"]),
        (
            r"['it\'s', "
            r'"a \"b\""]',
            ["it's", 'a "b"'],
        ),
    ],
)
def test_lists(cell: str, items: list[str]) -> None:
    found = read_list(cell)
    assert found is not None and found.items == items


@pytest.mark.parametrize(
    "cell",
    [
        *(
            "",
            "[",
            "]",
            "a",
            "[a]",
            "[price, battery]",
            "['a' 'b' ... 'z']",
            "['a''b']",
            "['a",
            "[['a']]",
            "[{'a': 1}]",
        ),
        *(
            "(1)",
            "(a)",
            "{1}",
            "()",
            "{}",
            "[None]",
            "[null]",
            "['a'] b",
            "[\\x]",
            "['\\x']",
            "[" * 5000,
            "['" + "\\" * 999,
        ),
        *('{"a": 1}', "array(", "array(['a']", "array('a')", "[" + " " * 5000, "[" + "1 " * 5000 + "x]"),
    ],
)
def test_what_is_no_list(cell: str) -> None:
    assert read_list(cell) is None


@pytest.mark.parametrize(
    ("written", "name"),
    [
        *(("True", "true"), ("TRUE", "true"), ("true", "true"), ("False", "false")),
        *(("1.0", "1"), ("1", "1"), ("-2.00", "-2"), ("1.50", "1.5"), ("0.0", "0"), ("10.0", "10")),
        *(("01", "01"), ("1.", "1."), ("1e3", "1e3"), ("1.0.0", "1.0.0"), (".50", ".50"), ("true story", "true story")),
        *(("007.0", "007.0"), ("one", "one"), ("", ""), ("1" * 50 + ".0", "1" * 50 + ".0")),
    ],
)
def test_one_value_has_one_name(written: str, name: str) -> None:
    assert label_name(written) == name
    assert label_name(name) == name


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["0,5", "1,5", "10"], [0.5, 1.5, 10.0]),
        (["1.200,50", "3,25", "12.000"], [1200.5, 3.25, 12000.0]),
        (["1 200,50", "3,25"], [1200.5, 3.25]),
        (["1\u00a0200,5", "1\u202f300,5"], [1200.5, 1300.5]),
        (["0,125", "0,250"], [0.125, 0.25]),
        (["-0,5", "+1,5e3"], [-0.5, 1500.0]),
        (["1,200.50", "3.25"], [1200.5, 3.25]),
        (["1,200", "3.5"], [1200.0, 3.5]),
        (["1,200,000", "12"], [1200000.0, 12.0]),
        (["1'200.5", "3"], [1200.5, 3.0]),
        (["1 200", "15"], [1200.0, 15.0]),
        (["1.200", "0.5"], [1.2, 0.5]),
        ([None, " ", "2,5 "], [None, None, 2.5]),
    ],
)
def test_numbers_are_read_as_their_column_is_spelled(cells: list[str | None], values: list[float | None]) -> None:
    spelling, _ = number_spelling(cells)
    for cell, value in zip(cells, values, strict=True):
        if value is not None:
            assert float(plain_number((cell or "").strip(), spelling)) == value


@pytest.mark.parametrize("cells", [["1,200", "3"], ["1,200"], ["0,5", "0.5"], ["0,5", "1,200.5"]])
def test_columns_that_could_be_read_in_two_ways_are_unclear(cells: list[str]) -> None:
    spelling, first = number_spelling(cells)
    assert spelling == "unclear" and first == cells[0]


@given(st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 2)), min_size=1, max_size=20))
def test_plain_numbers_need_no_spelling(values: list[float]) -> None:
    assert number_spelling([repr(value) for value in values]) == (None, "")


@given(st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 2)), min_size=1, max_size=20), st.booleans())
def test_a_column_of_one_country_is_read_back_or_called_unclear(values: list[float], is_comma: bool) -> None:
    def written(value: float) -> str:
        text = f"{value:,.2f}"
        return text.translate(str.maketrans(",.", ".,")) if is_comma else text

    cells = [written(value) for value in values]
    spelling, _ = number_spelling(cells)
    assert spelling in {None, "comma" if is_comma else "point"}
    assert [float(plain_number(cell, spelling)) for cell in cells] == values


@given(st.text(max_size=50))
def test_no_cell_breaks_it(cell: str) -> None:
    found: Any = read_list(cell)
    assert found is None or all(isinstance(item, str) for item in found.items)
    spelling, _ = number_spelling([cell])
    assert isinstance(plain_number(cell, spelling), str) and isinstance(label_name(cell), str)
