"""The draws that methods are compared on."""

from __future__ import annotations

from benchmarks.few_shot import few

ROWS = [{"text": str(number), "label": "abc"[number % 3 if number < 30 else 2]} for number in range(100)]


def test_each_class_gives_as_many_rows_and_a_seed_always_the_same() -> None:
    drawn = few(ROWS, 8, 1)
    assert [row["label"] for row in drawn] == ["a"] * 8 + ["b"] * 8 + ["c"] * 8
    assert len({row["text"] for row in drawn}) == 24
    assert drawn == few(ROWS, 8, 1) != few(ROWS, 8, 2)


def test_a_class_with_fewer_rows_gives_all_of_them() -> None:
    assert sum(row["label"] == "a" for row in few(ROWS, 50, 1)) == 10
