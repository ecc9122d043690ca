from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.readers import detect_format, open_rows, unrecognised
from finetune.data.record_batches import FindingLog, Limits
from finetune.data.records import FileFormat, Finding

Rows = list[tuple[int, dict[str, str | None]]]


def read(
    tmp_path: Path, content: bytes, file_format: FileFormat, limits: Limits | None = None
) -> tuple[Rows, list[Finding]]:
    path = tmp_path / "upload"
    path.write_bytes(content)
    return read_file(path, file_format, limits)


def read_file(path: Path, file_format: FileFormat, limits: Limits | None = None) -> tuple[Rows, list[Finding]]:
    log = FindingLog()
    rows: Rows = []
    with open_rows(path, file_format, log, limits) as source:
        for batch in source.batches:
            for number, *cells in zip(batch.row_numbers, *batch.columns, strict=True):
                rows.append((number, dict(zip(source.columns, cells, strict=True))))
    return rows, log.findings()


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    assert findings[0].fix
    return findings[0]


def test_csv_keeps_quoted_newlines_quotes_and_whitespace(tmp_path: Path) -> None:
    rows, findings = read(tmp_path, b'text,label\r\n"two\nlines, ""quoted""", a \r\n\r\n5" disk,\r\n', "csv")
    assert rows == [(1, {"text": 'two\nlines, "quoted"', "label": " a "}), (2, {"text": '5" disk', "label": ""})]
    assert findings == []


def test_csv_accepts_a_byte_order_mark_and_a_missing_last_line_end(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufefftext,label\nä,b".encode(), "csv") == ([(1, {"text": "ä", "label": "b"})], [])


def test_line_separators_inside_a_cell_are_no_line_ends(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, "text,label\na\u2028b\x85c,d\n".encode(), "csv")
    assert rows == [(1, {"text": "a\u2028b\x85c", "label": "d"})]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_are_recognised_and_told(tmp_path: Path, delimiter: str) -> None:
    content = f"text{delimiter}label\na, b{delimiter}c\n".encode()
    rows, findings = read(tmp_path, content, "csv")
    assert rows == [(1, {"text": "a, b", "label": "c"})]
    assert only(findings).severity == "info"


def test_mixed_encodings_give_row_byte_offset_and_fix(tmp_path: Path) -> None:
    head = "text,label\nfür,a\n".encode()
    rows, findings = read(tmp_path, head + b"caf\xe9,b\nthe,c\nna\xefve,d\n", "csv")
    finding = only(findings)
    assert (finding.code, finding.severity, finding.rows, finding.count) == ("encoding", "error", [2, 4], 2)
    assert f"offset {len(head) + 3} " in finding.message and "0xe9" in finding.message and "'é'" in finding.message
    assert "UTF-8" in finding.fix
    assert [number for number, _ in rows] == [1, 3]


def test_bad_encoding_inside_a_quoted_cell_is_filed_under_its_record(tmp_path: Path) -> None:
    content = 'text,label\nä,b\n"x\n'.encode() + b'\xff\ny",c\nd,e\n'
    _, findings = read(tmp_path, content, "csv")
    assert only(findings).rows == [2]


def test_ragged_rows(tmp_path: Path) -> None:
    rows, findings = read(tmp_path, b"text,label\na,b\nc\nd,e,f\ng,h\n", "csv")
    finding = only(findings)
    assert (finding.code, finding.rows, finding.count) == ("parse_error", [2, 3], 2)
    assert finding.message == "row 2 has 1 field, the header has 2"
    assert [number for number, _ in rows] == [1, 4]


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path: Path) -> None:
    rows, findings = read(tmp_path, b'text,label\na,b\n"c,d\ne,f\n', "csv")
    assert (only(findings).code, findings[0].rows) == ("parse_error", [2])
    assert len(rows) == 1


def test_text_after_a_closing_quote_is_an_error(tmp_path: Path) -> None:
    rows, findings = read(tmp_path, b'text,label\n"He said "hi"",b\nc,d\n', "csv")
    assert (only(findings).code, findings[0].rows) == ("parse_error", [1])
    assert rows == [(2, {"text": "c", "label": "d"})]


def test_nul_in_csv(tmp_path: Path) -> None:
    _, findings = read(tmp_path, b"text,label\na,b\nc\0,d\n", "csv")
    assert (only(findings).code, findings[0].rows) == ("parse_error", [2]) and "NUL" in findings[0].message


def test_huge_cell_in_csv_stops_with_its_row(tmp_path: Path) -> None:
    rows, findings = read(tmp_path, b"text,label\na,b\n" + b"x" * 1_000_001 + b",c\nd,e\n", "csv")
    assert (only(findings).code, findings[0].rows) == ("parse_error", [2]) and "1,000,000" in findings[0].message
    assert len(rows) == 1


def test_the_cell_limit_counts_bytes(tmp_path: Path) -> None:
    content = ("text,label\n" + "ä" * 600 + ",b\n").encode()
    assert read(tmp_path, content, "csv", Limits(cell_bytes=1200))[1] == []
    finding = only(read(tmp_path, content, "csv", Limits(cell_bytes=1199))[1])
    assert (finding.rows, finding.column) == ([1], "text")


def test_an_over_long_line_is_skipped_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    content = b"text,label\n" + b"x" * 500 + b",b\nc,d\n"
    rows, findings = read(tmp_path, content, "csv", Limits(row_bytes=100))
    assert (only(findings).code, findings[0].rows) == ("parse_error", [1])
    assert rows == [(2, {"text": "c", "label": "d"})]


@pytest.mark.parametrize(
    ("header", "expected"), [(b"a,a", "twice"), (b"__row__,b", "reserved"), (b"a\0,b", "NUL"), (b"x" * 300, "longer")]
)
def test_bad_headers(tmp_path: Path, header: bytes, expected: str) -> None:
    rows, findings = read(tmp_path, header + b"\n1,2\n", "csv")
    assert rows == [] and expected in only(findings).message and findings[0].code == "parse_error"


def test_an_unnamed_column_gets_a_name_and_a_warning(tmp_path: Path) -> None:
    rows, findings = read(tmp_path, b",text\n0,a\n", "csv")
    assert rows == [(1, {"column_1": "0", "text": "a"})]
    assert only(findings).severity == "warning"


@pytest.mark.parametrize("file_format", ["csv", "jsonl"])
def test_row_and_column_limits(tmp_path: Path, file_format: FileFormat) -> None:
    content = {"csv": b"a,b\n1,2\n3,4\n5,6\n", "jsonl": b'{"a":1}\n{"b":2}\n{"a":3}\n'}[file_format]
    rows, findings = read(tmp_path, content, file_format, Limits(rows=2))
    assert len(rows) == 2 and findings[0].rows == [3] and findings[0].code == "parse_error"
    assert read(tmp_path, content, file_format, Limits(rows=3))[1] == []
    rows, findings = read(tmp_path, content, file_format, Limits(columns=1))
    assert rows == [] and "columns" in only(findings).message


def test_batches_stay_within_their_limits(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(b"a,b\n" + b"1,2\n" * 10)
    for limits in (Limits(batch_rows=3), Limits(batch_cells=6), Limits(batch_characters=6)):
        with open_rows(path, "csv", FindingLog(), limits) as source:
            assert [len(batch.row_numbers) for batch in source.batches] == [3, 3, 3, 1]


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("content", "word"), [(b"", "empty"), (b"\x1f\x8b\x08\x00abc", "gzip"), (b"PK\x03\x04", "zip")]
)
def test_empty_and_compressed_files(tmp_path: Path, file_format: FileFormat, content: bytes, word: str) -> None:
    rows, findings = read(tmp_path, content, file_format)
    assert rows == [] and word in only(findings).message and findings[0].code == "parse_error"
    assert findings[0].severity == "error" and (word == "empty" or findings[0].fix == "uncompress it first")


def test_jsonl_keeps_numbers_as_written_and_fills_missing_keys(tmp_path: Path) -> None:
    content = b'{"text":"a","label":1.50}\n\n{"text":null,"label":true,"late":10000000000000000000000}\n'
    rows, findings = read(tmp_path, content, "jsonl")
    assert rows == [
        (1, {"text": "a", "label": "1.50", "late": None}),
        (3, {"text": None, "label": "true", "late": "10000000000000000000000"}),
    ]
    assert findings == []


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b'{"text": "a", "label"', "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'["a", "b"]', "not an object"),
        (b'"a"', "not an object"),
        (b'{"text": "a", "text": "b"}', "twice"),
        (b'{"text": NaN}', "NaN"),
        (b'{"text": -Infinity}', "Infinity"),
        (b'{"text": [{"a": 1}]}', "single value"),
        (b'{"text": [["a"]]}', "single value"),
        (b'{"text": {"a": 1}}', "single value"),
        (b'{"text": ' + b"[" * 200_000, "nested"),
        (b'{"text": "\\u0000"}', "NUL"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "' + b"x" * 1_000_001 + b'"}', "larger"),
        (b'{"text": "a\0"}', "NUL"),
    ],
)
def test_broken_jsonl_lines(tmp_path: Path, line: bytes, word: str) -> None:
    rows, findings = read(tmp_path, b'{"text": "fine"}\n' + line + b'\n{"text": "fine too"}\n', "jsonl")
    finding = only(findings)
    assert (finding.code, finding.severity, finding.rows, finding.count) == ("parse_error", "error", [2], 1)
    assert word in finding.message
    assert [number for number, _ in rows] == [1, 3]


def test_jsonl_encoding(tmp_path: Path) -> None:
    _, findings = read(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xe9"}\n', "jsonl")
    assert (only(findings).code, findings[0].rows) == ("encoding", [2])


def test_a_key_that_is_half_a_character(tmp_path: Path) -> None:
    rows, findings = read(tmp_path, b'{"\\ud800": "a"}\n', "jsonl")
    assert rows == [] and only(findings).code == "parse_error"


def test_findings_show_twenty_rows_and_count_all(tmp_path: Path) -> None:
    _, findings = read(tmp_path, b"a,b\n" + b"1\n" * 50, "csv")
    assert (only(findings).rows, findings[0].count) == (list(range(1, 21)), 50)


def test_parquet_values_become_strings(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b"]).dictionary_encode(),
            "label": [1.0, float("nan")],
            "flag": [True, None],
            "tokens": [[1], [2]],
            "nested": [[["a"]], [["b"]]],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    rows, findings = read_file(tmp_path / "t.parquet", "parquet")
    assert rows == [
        (1, {"text": "a", "label": "1", "flag": "true", "tokens": '["1"]'}),
        (2, {"text": "b", "label": None, "flag": None, "tokens": '["2"]'}),
    ]
    assert (only(findings).severity, findings[0].column) == ("warning", "nested")


def test_truncated_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 1000}), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    for length in (4, len(whole) // 2, len(whole) - 1):
        rows, findings = read(tmp_path, whole[:length], "parquet")
        assert rows == [] and only(findings).code == "parse_error"


def test_parquet_damaged_in_the_middle_names_the_row(tmp_path: Path) -> None:
    texts = [f"text number {number}" for number in range(3000)]
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "t.parquet", row_group_size=1000, compression="zstd", use_dictionary=False
    )
    second = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(0)
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    start = second.data_page_offset
    content[start : start + second.total_compressed_size] = b"\xff" * second.total_compressed_size
    rows, findings = read(tmp_path, bytes(content), "parquet", Limits(batch_rows=1000))
    assert len(rows) == 1000 and (only(findings).code, findings[0].rows) == ("parse_error", [1001])


def test_parquet_with_bad_cells(tmp_path: Path) -> None:
    bad_text = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad_text, "other": ["x\0", "y"]}), tmp_path / "t.parquet")
    _, findings = read_file(tmp_path / "t.parquet", "parquet")
    assert {(finding.code, finding.column, tuple(finding.rows)) for finding in findings} == {
        ("encoding", "text", (2,)),
        ("parse_error", "other", (1,)),
    }


def test_parquet_limits(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x" * 50, "y"], "b": ["1", "2"]}), tmp_path / "t.parquet")
    assert read_file(tmp_path / "t.parquet", "parquet", Limits(cell_bytes=49))[1][0].rows == [1]
    assert read_file(tmp_path / "t.parquet", "parquet", Limits(rows=1))[1][0].rows == [2]
    assert "columns" in only(read_file(tmp_path / "t.parquet", "parquet", Limits(columns=1))[1]).message


@pytest.mark.parametrize(
    ("filename", "first_bytes", "expected"),
    [
        ("a.csv", b"text,label\n", "csv"),
        ("A.TSV", b"text\tlabel\n", "csv"),
        ("a.jsonl", b'{"a": 1}', "jsonl"),
        ("a.ndjson", b"", "jsonl"),
        ("a.json", b'\xef\xbb\xbf {"a": 1}', "jsonl"),
        ("a.json", b'[{"a": 1}]', "json"),
        ("noname", b"text,label\na,b", "csv"),
        ("a.csv", b"PAR1\x15", "parquet"),
        ("a.parquet", b"text,label", "parquet"),
        ("a.csv", b"\x1f\x8b\x08", None),
        ("a.jsonl.gz", b"\x1f\x8b\x08", None),
        ("a.bin", b"\0,\0", None),
        ("a.txt", b"some words", None),
    ],
)
def test_detect_format(filename: str, first_bytes: bytes, expected: str | None) -> None:
    assert detect_format(filename, first_bytes) == expected


def test_unrecognised_says_how_to_mend() -> None:
    assert unrecognised("a.csv.gz", b"\x1f\x8b\x08").fix == "uncompress it first"
    assert ".csv" in unrecognised("a.bin", b"\0\0").fix
