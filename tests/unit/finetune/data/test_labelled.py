from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.data.canonical import canonical_writer
from finetune.data.errors import ColumnMissing
from finetune.data.labelled import load_labelled
from finetune.data.options import Columns
from finetune.data.record_batches import RowBatch


def write(path: Path, texts: list[str | None], labels: list[str | None]) -> Path:
    """One row group a row, so that loading crosses row groups."""
    with canonical_writer(path / "rows.parquet", ["text", "label"]) as writer:
        for row, (text, label) in enumerate(zip(texts, labels, strict=True), 10):
            writer.write(RowBatch([row], [[text], [label]]))
    return path / "rows.parquet"


def test_rows_without_text_or_label_are_left_out_and_told(tmp_path: Path) -> None:
    path = write(tmp_path, [" a ", "", None, " \t", "b", "c"], ["x", "x", "x", "x", " y\n", None])
    rows, findings = load_labelled(path, Columns())
    assert (rows.examples, rows.labels, rows.row_numbers.tolist()) == ([" a ", "b"], ["x", "y"], [10, 14])
    assert rows.row_numbers.dtype == np.int64
    assert [(f.code, f.severity, f.column, f.rows, f.count) for f in findings] == [
        ("empty_value", "warning", "text", [11, 12, 13], 3),
        ("empty_value", "warning", "label", [15], 1),
    ]


@pytest.mark.parametrize(("texts", "labels"), [([], []), (["a"], [None])])
def test_no_row_left_is_an_error(tmp_path: Path, texts: list[str | None], labels: list[str | None]) -> None:
    rows, findings = load_labelled(write(tmp_path, texts, labels), Columns())
    assert len(rows) == 0 and [(f.code, f.severity) for f in findings] == [("empty_value", "error")]


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ColumnMissing) as raised:
        load_labelled(write(tmp_path, ["a"], ["b"]), Columns(label="Labels"))
    assert (raised.value.nearest, raised.value.available) == ("label", ["text", "label"])
    finding = raised.value.as_finding()
    assert finding.code == "missing_column" and "'label'" in finding.fix and "'text'" in finding.message


def test_the_row_number_is_not_a_column(tmp_path: Path) -> None:
    with pytest.raises(ColumnMissing):
        load_labelled(write(tmp_path, ["a"], ["b"]), Columns(label="__row__"))


def test_take_keeps_row_numbers(tmp_path: Path) -> None:
    rows, _ = load_labelled(write(tmp_path, ["a", "b", "c"], ["x", "y", "z"]), Columns())
    taken = rows.take(np.array([2, 0]))
    assert (taken.examples, taken.labels, taken.row_numbers.tolist()) == (["c", "a"], ["z", "x"], [12, 10])
