from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import pytest

from finetune.data.archive import ArchiveRefused, _Budget, _name_problem
from finetune.data.check import check_upload
from finetune.data.readers import detect_format, open_rows
from finetune.data.record_batches import FindingLog, Limits
from finetune.data.records import Finding

Kind = Literal["zip", "tar", "tar.gz"]
KINDS: list[Kind] = ["zip", "tar", "tar.gz"]
Rows = list[tuple[int, dict[str, str | None]]]


def packed(kind: Kind, files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return sink.getvalue()
    with tarfile.open(fileobj=sink, mode="w:gz" if kind == "tar.gz" else "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def read(tmp_path: Path, content: bytes, limits: Limits | None = None) -> tuple[Rows, list[Finding]]:
    path = tmp_path / "raw"
    path.write_bytes(content)
    file_format = detect_format("upload", content[:4096])
    assert file_format in {"zip", "tar"}
    log = FindingLog()
    rows: Rows = []
    with open_rows(path, file_format, log, limits) as source:
        for batch in source.batches:
            for number, *cells in zip(batch.row_numbers, *batch.columns, strict=True):
                rows.append((number, dict(zip(source.columns, cells, strict=True))))
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"], "nothing unpacked stays"
    return rows, log.findings()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("above", ["", "corpus/", "corpus/v1/"])
def test_class_folders(tmp_path: Path, kind: Kind, above: str) -> None:
    files = {f"{above}pos/1.txt": b"fine", f"{above}neg/1.txt": "dreadful é".encode(), f"{above}pos/2.txt": b""}
    rows, findings = read(tmp_path, packed(kind, files))
    assert findings == []
    assert rows == [
        (1, {"file_name": f"{above}pos/1.txt", "text": "fine", "label": "pos"}),
        (2, {"file_name": f"{above}neg/1.txt", "text": "dreadful é", "label": "neg"}),
        (3, {"file_name": f"{above}pos/2.txt", "text": "", "label": "pos"}),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_a_split_become_a_column(tmp_path: Path, kind: Kind) -> None:
    files = {"train/pos/1.txt": b"a", "dev/neg/1.txt": b"b", "test/pos/1.txt": b"c"}
    rows, findings = read(tmp_path, packed(kind, files))
    assert findings == []
    assert [(row["label"], row["split"]) for _, row in rows] == [("pos", "train"), ("neg", "dev"), ("pos", "test")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["", "data/"])
def test_files_named_by_a_table(tmp_path: Path, kind: Kind, folder: str) -> None:
    files = {
        f"{folder}texts/a.txt": b"one",
        f"{folder}metadata.csv": b"label,file_name,source\nx,texts/b.txt,web\ny,./texts/a.txt,\n",
        f"{folder}texts/b.txt": b"\xef\xbb\xbftwo",
    }
    rows, findings = read(tmp_path, packed(kind, files))
    assert findings == []
    assert sorted(rows) == [
        (1, {"file_name": f"{folder}texts/b.txt", "text": "two", "label": "x", "source": "web"}),
        (2, {"file_name": f"{folder}texts/a.txt", "text": "one", "label": "y", "source": ""}),
    ]


def test_metadata_may_be_jsonl(tmp_path: Path) -> None:
    table = b'{"file_name": "a.txt", "label": "x"}\n{"file_name": "b.txt", "label": "y"}\n'
    rows, _ = read(tmp_path, packed("zip", {"metadata.jsonl": table, "a.txt": b"one", "b.txt": b"two"}))
    assert [(number, row["label"], row["text"]) for number, row in rows] == [(1, "x", "one"), (2, "y", "two")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b"text,label\na,x\n"),
        ("deep/rows.jsonl", b'{"text": "a", "label": "x"}\n'),
        ("metadata.csv", b"text,label\na,x\n"),
    ],
)
def test_a_table_alone(tmp_path: Path, kind: Kind, name: str, content: bytes) -> None:
    rows, findings = read(tmp_path, packed(kind, {name: content, "README.md": b"about", "__MACOSX/._rows.csv": b"\0"}))
    assert (rows, findings) == ([(1, {"text": "a", "label": "x"})], [])


def test_what_file_managers_and_authors_add_is_left_out(tmp_path: Path) -> None:
    files = {
        "d/": b"",
        "d/pos/1.txt": b"a",
        "d/neg/1.txt": b"b",
        "d/.DS_Store": b"\0",
        "d/pos/Thumbs.db": b"\0",
        "d/.ipynb_checkpoints/x.txt": b"c",
        "d/README.txt": b"about",
        "d/LICENSE": b"free",
    }
    for kind in KINDS:
        rows, findings = read(tmp_path, packed(kind, files))
        assert [row["label"] for _, row in rows] == ["pos", "neg"] and findings == []
        (tmp_path / "raw").unlink()


def test_one_class_folder_keeps_its_name(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, packed("zip", {"pos/1.txt": b"a", "pos/2.txt": b"b"}))
    assert [row["label"] for _, row in rows] == ["pos", "pos"]


def test_a_file_may_be_as_large_as_a_cell_and_no_larger(tmp_path: Path) -> None:
    content = packed("zip", {"a/1.txt": b"x" * 100, "b/1.txt": b"y" * 101})
    rows, findings = read(tmp_path, content, Limits(cell_bytes=100))
    assert len(rows) == 1 and [(finding.code, finding.rows) for finding in findings] == [("parse_error", [2])]


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_on_what_comes_out_is_exact_and_not_by_declared_size(tmp_path: Path, kind: Kind) -> None:
    content = packed(kind, {"rows.csv": b"text,label\n" + b"a,b\n" * 30_000})
    unpacked = 120_011 if kind == "zip" else 120_011 + 20_000  # tar has headers and padding
    assert read(tmp_path, content, Limits(unpacked_slack_bytes=unpacked, unpacked_ratio=0))[1] == []
    _, findings = read(tmp_path, content, Limits(unpacked_slack_bytes=119_000, unpacked_ratio=0))
    assert [finding.code for finding in findings] == ["archive_unsafe"] and "119,000" in findings[0].message


def test_the_check_unpacks_in_its_child_and_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(packed("zip", {"rows.csv": b"text,label\n" + b"a,b\n" * 5}))
    (tmp_path / ".unpacked-left").write_bytes(b"of a child that was killed")
    report = check_upload(tmp_path / "raw", "zip", tmp_path, timeout_s=60, memory_bytes=1 << 30)
    assert (report.rows, report.is_valid) == (5, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "report.json", "rows.parquet"]


@pytest.mark.parametrize("name", ["a.txt", "a/b.txt", "über/ß.txt", "a..b/c.txt", "-", "a b/c.txt"])
def test_names_that_are_fine(name: str) -> None:
    assert _name_problem(name) is None


@pytest.mark.parametrize(
    "name", ["", "/a", "..", "a/../../b", "a\\b", "c:x", "a\nb", "a\0b", "x" * 2000, "a/" * 20 + "b"]
)
def test_names_that_are_not(name: str) -> None:
    assert _name_problem(name) is not None


def test_the_budget_is_the_least_of_ratio_and_total() -> None:
    for packed_bytes, most in ((10, 1100), (1000, 5000)):
        budget = _Budget(
            packed_bytes, FindingLog(), Limits(unpacked_bytes=5000, unpacked_ratio=10, unpacked_slack_bytes=1000)
        )
        budget.spend("a", most)
        with pytest.raises(ArchiveRefused):
            budget.spend("a", 1)


@pytest.mark.parametrize(
    ("filename", "content", "expected"),
    [
        ("a.csv", packed("zip", {"a": b"b"}), "zip"),
        ("a.zip", packed("zip", {}), "zip"),
        ("a", packed("tar", {"a": b"b"}), "tar"),
        ("a.csv.gz", packed("tar.gz", {"a": b"b"}), "tar"),
        ("a.tar.gz", b"\x1f\x8b\x08\x00broken", None),
    ],
    ids=["zip", "empty zip", "tar", "gzipped tar", "broken gzip"],
)
def test_archives_are_known_by_their_content(filename: str, content: bytes, expected: str | None) -> None:
    assert detect_format(filename, content[:4096]) == expected
