from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from finetune.data import check
from finetune.data.check import check_upload, write_checked
from finetune.data.errors import DatasetCheckFailed
from finetune.data.records import ColumnReport, DatasetReport, FileFormat

MEMORY_BYTES = 1 << 30


def run(raw: Path, file_format: FileFormat, out_dir: Path, *, timeout_s: float = 60) -> DatasetReport:
    return check_upload(raw, file_format, out_dir, timeout_s=timeout_s, memory_bytes=MEMORY_BYTES)


def test_the_child_writes_rows_and_report_and_prints_nothing(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"text,label,score\n a ,x,1\nb,x,\nragged\n,y,-2.5e3\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "finetune.data.check", str(raw), "csv", str(out)]
    child = subprocess.run(command, capture_output=True, check=True, cwd=Path(check.__file__).parents[2])
    assert (child.stdout, child.stderr) == (b"", b"")
    table = pq.read_table(out / "rows.parquet")
    assert [str(field.type) for field in table.schema] == ["int64", "string", "string", "string"]
    assert table.to_pylist() == [
        {"__row__": 1, "text": " a ", "label": "x", "score": "1"},
        {"__row__": 2, "text": "b", "label": "x", "score": ""},
        {"__row__": 4, "text": "", "label": "y", "score": "-2.5e3"},
    ]
    report = DatasetReport.model_validate_json((out / "report.json").read_bytes())
    assert (report.rows, report.is_valid) == (3, False)
    assert report.columns == [
        ColumnReport(name="text", type="text", empty=1, distinct=2, example="a", counts={"a": 1, "b": 1}),
        ColumnReport(name="label", type="text", empty=0, distinct=2, example="x", counts={"x": 2, "y": 1}),
        ColumnReport(name="score", type="number", empty=1, distinct=2, example="1", counts={"1": 1, "-2.5e3": 1}),
    ]
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "rows.parquet"]


def test_check_upload_returns_the_childs_report(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b'{"text": "a", "label": false}\n{"text": "b", "label": true}\n')
    report = run(tmp_path / "raw", "jsonl", tmp_path / "out")
    assert (report.rows, report.is_valid, [column.type for column in report.columns]) == (2, True, ["text", "boolean"])


@pytest.mark.parametrize(
    ("file_format", "content"), [("csv", b""), ("csv", b"text,label\n"), ("jsonl", b"\n\n"), ("parquet", b"PAR1")]
)
def test_a_file_without_rows_is_invalid(tmp_path: Path, file_format: FileFormat, content: bytes) -> None:
    (tmp_path / "raw").write_bytes(content)
    report = write_checked(tmp_path / "raw", file_format, tmp_path)
    assert report.rows == 0 and not report.is_valid
    assert report.findings[0].code == "parse_error" and report.findings[0].fix
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == 0


def test_a_header_alone_still_names_its_columns(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"text,label\n")
    report = write_checked(tmp_path / "raw", "csv", tmp_path)
    assert [(column.name, column.type) for column in report.columns] == [("text", "other"), ("label", "other")]


def test_a_remark_does_not_hide_that_there_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"text;label\n")
    assert not write_checked(tmp_path / "raw", "csv", tmp_path).is_valid


def test_distinct_values_are_counted_up_to_a_thousand(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("a,b\n" + "".join(f"{number},{number % 1000}\n" for number in range(1001)))
    assert [column.distinct for column in write_checked(tmp_path / "raw", "csv", tmp_path).columns] == [None, 1000]


def test_a_timeout_becomes_a_finding(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"text,label\na,b\n")
    report = run(tmp_path / "raw", "csv", tmp_path / "out", timeout_s=0.001)
    assert [finding.code for finding in report.findings] == ["parse_error"] and "longer than" in report.findings[
        0
    ].message


def test_lack_of_memory_becomes_a_finding(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"text,label\na,b\n")
    report = check_upload(tmp_path / "raw", "csv", tmp_path / "out", timeout_s=60, memory_bytes=1 << 20)
    assert [finding.code for finding in report.findings] == ["parse_error"] and not report.is_valid


def test_a_crash_becomes_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = tmp_path / "crash"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    (tmp_path / "raw").write_bytes(b"text,label\na,b\n")
    report = run(tmp_path / "raw", "csv", tmp_path / "out")
    assert [finding.code for finding in report.findings] == ["parse_error"] and "-11" in report.findings[0].message


def test_a_failing_machine_is_not_the_files_fault(tmp_path: Path) -> None:
    with pytest.raises(DatasetCheckFailed):
        run(tmp_path / "absent", "csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("cells", "excess"),
    [
        ([f"label {number}" for number in range(10_001)], "there are more than 10,000 labels"),
        ([f"label {number}" for number in range(10_000)], None),
        (["x" * 1001, "y"], "1,001 characters"),
        (["x", "y"] * 20_000, None),
        ([json.dumps([f"a{number}", "b"]) for number in range(10_001)], "there are more than 10,000 labels"),
    ],
)
def test_the_report_says_why_a_column_cannot_be_the_labels(
    tmp_path: Path, cells: list[str], excess: str | None
) -> None:
    rows = "".join(json.dumps({"text": "t", "label": cell}) + "\n" for cell in cells)
    (tmp_path / "raw").write_text(rows)
    text, label = write_checked(tmp_path / "raw", "jsonl", tmp_path).columns
    assert text.excess_as_labels is None
    assert (label.excess_as_labels is None) is (excess is None)
    assert (excess or "") in (label.excess_as_labels or "")


def test_a_wide_file_is_checked_for_labels_by_the_job(tmp_path: Path) -> None:
    header = ",".join(f"c{number}" for number in range(101))
    lines = [",".join([str(row)] * 101) for row in range(10_001)]
    (tmp_path / "raw").write_text("\n".join([header, *lines]))
    assert all(column.excess_as_labels is None for column in write_checked(tmp_path / "raw", "csv", tmp_path).columns)
