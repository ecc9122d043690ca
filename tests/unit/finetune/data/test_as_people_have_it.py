"""Files as people have them: other encodings, delimiters, line ends and workbooks, each told by a finding."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import zipfile
from datetime import date, datetime
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.canonical import read_batches
from finetune.data.check import ROWS_FILE, write_checked
from finetune.data.labelled import load_labelled
from finetune.data.load import load_sides
from finetune.data.options import Columns, SideColumns, SplitOptions
from finetune.data.profile import class_counts
from finetune.data.readers import detect_format, open_rows, unrecognised
from finetune.data.record_batches import FindingLog, Limits
from finetune.data.records import DatasetReport, Finding
from finetune.data.sides import Sides

TABLE = [["text", "label"], ["a lovely, long day", "good"], ["50 % of it; or so", "bad"], ["one|two\tthree", "good"]]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


def written(table: list[list[str]], delimiter: str = ",", line_end: str = "\n") -> str:
    sink = io.StringIO()
    csv.writer(sink, delimiter=delimiter, lineterminator=line_end).writerows(table)
    return sink.getvalue()


def read(path: Path, kind: Any = "csv", limits: Limits | None = None) -> tuple[list[list[str | None]], list[Finding]]:
    log = FindingLog()
    with open_rows(path, kind, log, limits) as source:
        rows: list[list[str | None]] = [list(source.columns)]
        rows += [list(cells) for batch in source.batches for cells in zip(*batch.columns, strict=True)]
    return rows, log.findings()


def put(folder: Path, content: bytes) -> Path:
    (folder / "raw").write_bytes(content)
    return folder / "raw"


CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6),
    encoding=st.sampled_from(ENCODINGS),
    delimiter=st.sampled_from(",;\t|"),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_a_table_is_the_same_however_it_is_written(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    encoding: str,
    delimiter: str,
    line_end: str,
) -> None:
    table = [["text", "label"], *(list(row) for row in rows)]
    path = put(tmp_path_factory.mktemp("t"), written(table, delimiter, line_end).encode(encoding))
    found, findings = read(path)
    assert found == table
    assert all(finding.severity != "error" for finding in findings)
    told = " ".join(finding.message for finding in findings)
    assert ("carriage return" in told) == (line_end == "\r")
    assert ("UTF-16" in told or "UTF-32" in told) == (not encoding.startswith("utf-8"))
    assert ("separated by" in told) == (delimiter != ",")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_windows_1252_is_read_and_told(tmp_path: Path, kind: str) -> None:
    texts = ["le café coûte 3 €", "naïve “quotes” – déjà vu", "plain words", "Zürich, Straße"]
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = "\n".join(lines) if kind == "jsonl" else written([["text", "label"], *([*row.values()] for row in rows)])
    found, findings = read(put(tmp_path, content.encode("cp1252")), kind)
    assert found[1:] == [[*row.values()] for row in rows]
    (finding,) = findings
    assert (finding.code, finding.severity) == ("encoding", "warning") and "Windows-1252" in finding.message


@pytest.mark.parametrize(
    "content",
    [
        "text,label\nпривет мир,a\nкак дела,b\n".encode("cp1251"),
        "text,label\n你好世界,a\n很好很好,b\n".encode("gbk"),
        "text,label\nこんにちは,a\n".encode("shift-jis"),
        "text,label\nfür,a\n".encode() + b"caf\xe9,b\n",
        b"text,label\ncut \xe2\x82,b\n",
        b"\xef\xbb\xbftext,label\ncaf\xe9,b\n",
    ],
)
def test_other_bytes_are_refused_and_not_guessed(tmp_path: Path, content: bytes) -> None:
    _, findings = read(put(tmp_path, content))
    assert any((finding.code, finding.severity) == ("encoding", "error") for finding in findings)
    assert not any("Windows-1252, which" in finding.message for finding in findings)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_utf_16_that_breaks_off_is_refused_by_name(tmp_path: Path, mark: bytes) -> None:
    content = written(TABLE).encode("utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be")
    found, findings = read(put(tmp_path, mark + content + b"x"))
    assert found == [[]] and findings[0].severity == "error" and "UTF-16" in findings[0].message


def test_large_files_are_transcoded_across_their_chunks(tmp_path: Path) -> None:
    table = [["text", "label"], *([f"grüße 世界 {number} 😀" * 9, "ab"[number % 2]] for number in range(20_000))]
    for encoding in ("utf-16", "utf-32", "utf-8"):
        found, findings = read(put(tmp_path, written(table, ";", "\r").encode(encoding)))
        assert found == table and not any(finding.severity == "error" for finding in findings)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("text;label, final\na, b;x\nc;y\n", [["text", "label, final"], ["a, b", "x"], ["c", "y"]]),
        ('"text, long";label\na;x\n', [["text, long", "label"], ["a", "x"]]),
        ("text|label\na, b|x\nc; d|y\n", [["text", "label"], ["a, b", "x"], ["c; d", "y"]]),
        ("text,label;kind\na,b\nc,d\n", [["text", "label;kind"], ["a", "b"], ["c", "d"]]),
        ("text,label\na;b|c\td,x\n", [["text", "label"], ["a;b|c\td", "x"]]),
        ("text\nonly one column\n", [["text"], ["only one column"]]),
        ('text\tlabel\n"a\nb"\tx\n', [["text", "label"], ["a\nb", "x"]]),
    ],
)
def test_the_delimiter_is_the_one_that_divides_the_rows_alike(
    tmp_path: Path, content: str, rows: list[list[str]]
) -> None:
    found, findings = read(put(tmp_path, content.encode()))
    assert found == rows and all(finding.severity == "info" for finding in findings)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_text_files_of_an_archive_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    with zipfile.ZipFile(tmp_path / "raw", "w") as archive:
        for number in range(4):
            archive.writestr(f"{'ab'[number % 2]}/{number}.txt", f"café number {number}".encode(encoding))
    found, findings = read(tmp_path / "raw", "zip")
    assert [row[1] for row in found[1:]] == [f"café number {number}" for number in range(4)]
    assert [finding.count for finding in findings if finding.code == "encoding"] == [4]


@pytest.mark.parametrize(
    ("filename", "content", "expected"),
    [
        ("a.txt", b"text|label\na|b\n", "csv"),
        ("a.dat", written(TABLE, "\t").encode("utf-16"), "csv"),
        ("a", '{"text": "a"}'.encode("utf-16"), "jsonl"),
        ("a.xlsx", b"PK\x03\x04rest", "xlsx"),
        ("book", b"PK\x03\x04....xl/workbook.xml", "xlsx"),
        ("a.zip", b"PK\x03\x04rest", "zip"),
        ("a.xls", b"\xd0\xcf\x11\xe0rest", None),
    ],
)
def test_formats_by_content_and_name(filename: str, content: bytes, expected: str | None) -> None:
    assert detect_format(filename, content) == expected


def test_an_old_workbook_is_refused_by_name() -> None:
    assert "old format" in unrecognised("a.xls", b"\xd0\xcf\x11\xe0").message


# Workbooks


def workbook(folder: Path, *sheets: tuple[str, list[list[Any]]], states: tuple[str, ...] = ()) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for place, (title, rows) in enumerate(sheets):
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
        sheet.sheet_state = states[place] if place < len(states) else "visible"
    book.save(folder / "raw")
    return folder / "raw"


def test_a_workbook_gives_the_rows_of_its_first_sheet(tmp_path: Path) -> None:
    rows: list[list[Any]] = [
        ["text", "label", "when", "stars", None],
        ["fine, “really” 😀\nsecond line", "good", date(2026, 3, 9), 4],
        [],
        ["dull", True, datetime(2026, 3, 9, 14, 30), 2.5, None],
        [None, "bad", None, 1e20],
    ]
    path = workbook(tmp_path, ("empty", []), ("Data", rows), ("Notes", [["other"]]))
    found, findings = read(path, "xlsx")
    assert found == [
        ["text", "label", "when", "stars"],
        ["fine, “really” 😀\nsecond line", "good", "2026-03-09", "4"],
        ["dull", "true", "2026-03-09T14:30:00", "2.5"],
        [None, "bad", None, "1e+20"],
    ]
    (finding,) = findings
    assert finding.severity == "warning" and "'Data'" in finding.message and "'Notes'" in finding.message
    log = FindingLog()
    with open_rows(path, "xlsx", log) as source:
        assert [number for batch in source.batches for number in batch.row_numbers] == [2, 4, 5], (
            "as the sheet has them"
        )


def test_hidden_sheets_and_cells_beside_the_header(tmp_path: Path) -> None:
    sheets = (("old", [["x"], ["y"]]), ("new", [["text", "label"], ["a", "b", "note"]]))
    found, findings = read(workbook(tmp_path, *sheets, states=("hidden",)), "xlsx")
    assert found == [["text", "label"], ["a", "b"]]
    assert [(finding.severity, finding.rows) for finding in findings] == [("warning", [2])]


@pytest.mark.parametrize(
    ("rows", "word"), [([], "no sheet"), ([["a", "a"]], "twice"), ([["text"], ["x" * 40]], "larger")]
)
def test_workbooks_that_cannot_be_read(tmp_path: Path, rows: list[list[Any]], word: str) -> None:
    _, findings = read(workbook(tmp_path, ("s", rows)), "xlsx", Limits(cell_bytes=30))
    assert word in findings[0].message and findings[0].severity == "error" and findings[0].fix


def test_a_damaged_workbook_is_a_finding_wherever_it_breaks(tmp_path: Path) -> None:
    whole = workbook(tmp_path, ("s", [["text", "label"], *([f"t{n}", "a"] for n in range(200))])).read_bytes()
    for place in range(0, len(whole), 97):
        content = bytearray(whole)
        content[place : place + 9] = b"\xff" * 9
        _, findings = read(put(tmp_path, bytes(content)), "xlsx")
        _, cut = read(put(tmp_path, whole[:place] or b"PK\x03\x04"), "xlsx")
        assert any(finding.severity == "error" for finding in cut)
        assert all(finding.fix for finding in findings)


def test_a_workbook_that_would_unpack_to_too_much_is_refused_before_it_does(tmp_path: Path) -> None:
    source = workbook(tmp_path, ("s", [["text", "label"], ["a", "b"]]))
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            extra = b" " * (64 << 20) if name == "xl/worksheets/sheet1.xml" else b""
            new.writestr(name, old.read(name) + extra)
    _, findings = read(tmp_path / "bomb", "xlsx", Limits(unpacked_slack_bytes=1 << 20))
    assert [finding.code for finding in findings] == ["archive_unsafe"]


# What a job makes of the cells


def job(folder: Path, content: bytes, kind: Any = "csv", *, task: str = "auto", columns: Any = None) -> Sides:
    report = write_checked(put(folder, content), kind, folder)
    assert report.is_valid, report.findings
    return load_sides(
        {"train": folder / ROWS_FILE}, columns=columns or Columns(), options=SplitOptions(), seed=1, task=task
    )


def codes(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings}


LISTS = [["price"], ["battery", "price"], [], ["screen's"]] * 15


@pytest.mark.parametrize("spelled", [repr, json.dumps, lambda own: f"array({own!r}, dtype=object)"])
@pytest.mark.parametrize("task", ["auto", "text-multi-label"])
def test_lists_as_programs_print_them_are_several_labels(tmp_path: Path, spelled: Any, task: str) -> None:
    table = [["text", "label"], *([f"text number {n}", spelled(own)] for n, own in enumerate(LISTS))]
    sides = job(tmp_path, written(table).encode(), task=task)
    assert sides.train.target.task == "text-multi-label"
    assert sides.train.names() == {"price", "battery", "screen's"}
    assert ("label_list" in codes(sides.findings)) == (spelled is not json.dumps)


def test_lists_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    table = [["text", "label"], *([f"text number {n}", f"[{'ab'[n % 2]}, c]"] for n in range(40))]
    assert codes(job(tmp_path, written(table).encode()).findings)["unexpected_list"].severity == "warning"
    found = codes(job(tmp_path, written(table).encode(), task="text-multi-label").findings)["unexpected_list"]
    assert found.severity == "error" and "[a, c]" in found.message and "JSON list" in found.fix


@pytest.mark.parametrize("values", [pa.array([[1, 2], [3]] * 30), pa.array([[1.0, 2.0], [3.0]] * 30)])
def test_lists_of_numbers_in_parquet_are_labels(tmp_path: Path, values: Any) -> None:
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(60)], "label": values}), tmp_path / "t")
    sides = job(tmp_path, (tmp_path / "t").read_bytes(), "parquet")
    assert sides.train.names() == {"1", "2", "3"}


def test_one_value_has_one_name_in_every_format(tmp_path: Path) -> None:
    flags, numbers = [True, False] * 15, [1.0, 2.5] * 15
    texts = [f"text number {n}" for n in range(30)]
    names = set()
    for column in (flags, numbers):
        lines = [json.dumps({"text": text, "label": value}) for text, value in zip(texts, column, strict=True)]
        pq.write_table(pa.table({"text": texts, "label": column}), tmp_path / "t")
        table = [["text", "label"], *([text, str(value)] for text, value in zip(texts, column, strict=True))]
        contents = (
            ("\n".join(lines).encode(), "jsonl"),
            ((tmp_path / "t").read_bytes(), "parquet"),
            (written(table).encode(), "csv"),
            (
                workbook(
                    tmp_path, ("s", table[:1] + [list(row) for row in zip(texts, column, strict=True)])
                ).read_bytes(),
                "xlsx",
            ),
        )
        for content, kind in contents:
            sides = job(tmp_path, content, kind)
            names.add(frozenset(sides.train.names()))
            if kind == "csv":
                assert codes(sides.findings)["label_name"].severity == "info"
                report = DatasetReport.model_validate_json((tmp_path / "report.json").read_bytes())
                counted = class_counts(report.columns, None)
                assert counted is not None and set(counted["rows"]) == set(sides.train.names())
    assert names == {frozenset({"true", "false"}), frozenset({"1", "2.5"})}


@pytest.mark.parametrize(("label", "value"), [("{},5", 0.5), ("1.20{},25", 1200.25)])
def test_decimal_commas_are_read_and_told(tmp_path: Path, label: str, value: float) -> None:
    table = [["text", "label"], *([f"text number {n}", label.format(n % 5)] for n in range(40))]
    sides = job(tmp_path, written(table, ";").encode(), task="text-regression")
    assert min(map(float, [*sides.train.labels, *sides.validation.labels, *sides.test.labels])) == value
    finding = codes(sides.findings)["number_format"]
    assert finding.severity == "info" and "decimal comma" in finding.message


def test_numbers_that_could_be_read_in_two_ways_are_refused_with_the_cause(tmp_path: Path) -> None:
    table = [["text", "label"], *([f"text number {n}", f"{n},500"] for n in range(1, 40))]
    finding = codes(job(tmp_path, written(table, ";").encode(), task="text-regression").findings)["non_numeric_target"]
    assert finding.severity == "error" and "decimal comma" in finding.message and "1234.5" in finding.fix


def test_labels_apart_by_case_are_told_when_the_file_is_checked(tmp_path: Path) -> None:
    labels = ["positive", "Positive", "positive ", "negative"] * 10
    table = [["text", "label"], *([f"text number {n}", label] for n, label in enumerate(labels))]
    report = write_checked(put(tmp_path, written(table).encode()), "csv", tmp_path)
    finding = codes(report.findings)["label_case_collision"]
    assert finding.severity == "warning" and report.is_valid
    assert all(spelling in finding.message for spelling in ("'positive'", "'Positive'", "'positive '"))


# Columns


def test_several_columns_make_one_text_and_empty_parts_do_not_count(tmp_path: Path) -> None:
    table = [
        ["title", "body", "label"],
        ["A", "b c", "x"],
        ["", "only body", "y"],
        ["only title", " ", "x"],
        ["", "", "y"],
    ]
    write_checked(put(tmp_path, written(table).encode()), "csv", tmp_path)
    rows, findings = load_labelled(tmp_path / ROWS_FILE, Columns.model_validate({"text": ["title", "body"]}))
    assert rows.examples == ["A\nb c", "only body", "only title"]
    assert [(finding.code, finding.rows, finding.column) for finding in findings] == [
        ("empty_value", [4], "title and body")
    ]
    pairs, _ = load_labelled(
        tmp_path / ROWS_FILE, Columns.model_validate({"text": ["title", "body"], "text_pair": "label"})
    )
    assert pairs.examples[0] == ("A\nb c", "x")


def test_rows_that_a_job_excludes_are_left_out_and_unknown_ones_told(tmp_path: Path) -> None:
    table = [["text", "label"], *([f"text number {n}", "ab"[n % 2]] for n in range(1, 41))]
    write_checked(put(tmp_path, written(table).encode()), "csv", tmp_path)
    sides = load_sides(
        {"train": tmp_path / ROWS_FILE}, columns=Columns(), options=SplitOptions(), seed=1, exclude=[3, 7, 99]
    )
    kept = sorted(row for side in (sides.train, sides.validation, sides.test) for row in side.row_numbers.tolist())
    assert kept == [row for row in range(1, 41) if row not in (3, 7)]
    assert codes(sides.findings)["unknown_row"].rows == [99]


@pytest.mark.parametrize("offset", [0, 1, 7, 12, 19, 20, 99])
def test_a_preview_may_begin_anywhere(tmp_path: Path, offset: int) -> None:
    table = [["text", "label"], *([f"text number {n}", "a"] for n in range(1, 21))]
    write_checked(put(tmp_path, written(table).encode()), "csv", tmp_path, Limits(batch_rows=7))
    found = [row for batch in read_batches(tmp_path / ROWS_FILE, ["text"], offset=offset) for row in batch.row_numbers]
    assert found == list(range(offset + 1, 21))


def test_a_side_may_have_other_column_names(tmp_path: Path) -> None:
    files = {}
    for side, header in (("train", ["text", "label"]), ("test", ["sentence", "gold"])):
        (tmp_path / side).mkdir()
        table = [header, *([f"{side} text number {n}", "ab"[n % 2]] for n in range(40))]
        write_checked(put(tmp_path / side, written(table).encode()), "csv", tmp_path / side)
        files[side] = tmp_path / side / ROWS_FILE
    columns = Columns()
    by_side = {
        "train": columns,
        "test": columns.of_side(SideColumns.model_validate({"text": "sentence", "label": "gold"})),
    }
    sides = load_sides(files, columns=by_side, options=SplitOptions(), seed=1, task="auto")
    assert len(sides.test) == 40 and sides.test.names() == {"a", "b"}
    assert all(example.startswith("test text") for example in sides.test.examples)
    assert codes(load_sides(files, columns=columns, options=SplitOptions(), seed=1).findings)["missing_column"]


@pytest.mark.parametrize(
    "content", [b"text,label\r\ngood,pos\r\nbad,neg\rugly,neg\r\n", b'text,label\r"a\nb",x\rc,y\r']
)
def test_a_carriage_return_among_other_line_ends_is_named(tmp_path: Path, content: bytes) -> None:
    _, findings = read(put(tmp_path, content))
    (finding,) = [finding for finding in findings if finding.severity == "error"]
    assert "carriage return" in finding.message and "universal-newline" not in finding.message
    assert "one kind of line end" in finding.fix


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
def test_a_line_that_states_the_delimiter_is_no_header(tmp_path: Path, first: str) -> None:
    rows, findings = read(put(tmp_path, f"{first}\r\ntext;label\r\na, b;pos\r\n".encode("utf-16")))
    assert rows == [["text", "label"], ["a, b", "pos"]]
    assert {finding.severity for finding in findings} == {"info"}
    column = put(tmp_path, b"sep=,text\na,b\n")
    assert read(column)[0] == [["sep=", "text"], ["a", "b"]]


@pytest.mark.parametrize(
    "content",
    [b'{"text": "a", "label": ["x", null]}\n', b'text,label\na,"[""x"", null]"\n', b"text,label\na,\"['x', None]\"\n"],
)
def test_nothing_in_a_list_is_no_label(tmp_path: Path, content: bytes) -> None:
    sides = job(tmp_path, content, "jsonl" if content[:1] == b"{" else "csv", task="text-multi-label")
    assert sides.train.labels == ['["x"]']


def test_nothing_in_a_list_of_parquet_is_no_label(tmp_path: Path) -> None:
    for values, expected in ((["x", None], '["x"]'), ([1.0, math.nan], '["1"]'), ([2, None], '["2"]')):
        pq.write_table(pa.table({"text": ["a"], "label": [values]}), tmp_path / "raw")
        assert read(tmp_path / "raw", "parquet")[0][1] == ["a", expected]


def test_texts_of_parquet_may_be_views(tmp_path: Path) -> None:
    texts = pa.array(["a", "b"], pa.string_view())
    pq.write_table(
        pa.table({"text": texts, "label": pa.array([["x"], ["y"]], pa.list_(pa.string_view()))}), tmp_path / "raw"
    )
    assert read(tmp_path / "raw", "parquet") == ([["text", "label"], ["a", '["x"]'], ["b", '["y"]']], [])


def test_an_error_of_a_formula_is_no_value(tmp_path: Path) -> None:
    path = workbook(tmp_path, ("s", [["text", "label"], ["a", "#DIV/0!"], ["#N/A", "x"], ["# 1", "#N/A yet"]]))
    rows, findings = read(path, "xlsx")
    assert rows[1:] == [["a", None], [None, "x"], ["# 1", "#N/A yet"]]
    (finding,) = findings
    assert finding.severity == "warning" and finding.rows == [2, 3] and "#DIV/0!" in finding.message


def test_a_table_may_begin_far_down_a_sheet(tmp_path: Path) -> None:
    path = workbook(tmp_path, ("s", [*[[]] * 500, ["text", "label"], ["a", "x"]]))
    assert read(path, "xlsx")[0] == [["text", "label"], ["a", "x"]]


def test_an_array_of_something_else_than_objects_is_refused_by_name() -> None:
    finding = unrecognised("rows.json", b'\xef\xbb\xbf [["a", "x"]]')
    assert "JSON array" in finding.message and "one JSON object on each line" in finding.fix


@pytest.mark.parametrize("named", [{"text": "label"}, {"text": ["text", "label"]}, {"text": "text", "label": "text"}])
def test_a_label_that_is_read_as_text_is_refused(tmp_path: Path, named: dict[str, Any]) -> None:
    table = [["text", "label"], *([f"text number {n}", "ab"[n % 2]] for n in range(40))]
    sides = job(tmp_path, written(table).encode(), columns=Columns.model_validate(named))
    assert codes(sides.findings)["label_among_inputs"].severity == "error"
