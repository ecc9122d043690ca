"""Cells that name files: sequences of floats, packed into an archive, on their way to the sides of a job."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.canonical import column_names, file_columns, read_batches
from finetune.data.check import ROWS_FILE, write_checked
from finetune.data.labelled import load_labelled
from finetune.data.load import load_sides
from finetune.data.options import Columns, SplitOptions
from finetune.data.record_batches import Limits
from finetune.data.records import DatasetReport
from finetune.data.targets import target_of
from modeling.inputs import MODALITIES, BadCell, Cell, FileReference
from modeling.tasks import TASKS
from modeling.tasks.single_label import SingleLabel
from tests.unit.finetune.data.test_archives import KINDS, Kind, packed

TASK = "series-classification"


class Series:
    """Floats in files of little-endian float32; nothing that only training or serving asks for."""

    name, plural, unit, ignores = "series", "series", "sample", ""
    roles, suffixes = ("series",), frozenset({".f32"})
    libraries, has_baseline = (), False

    def read(self, cells: Mapping[str, Cell]) -> tuple[float, ...]:
        cell = cells["series"]
        assert isinstance(cell, FileReference)
        content = cell.read(400)
        if len(content) % 4:
            raise BadCell("holds half of a number", code="bad_series", fix="write float32")
        return struct.unpack(f"<{len(content) // 4}f", content)

    def content(self, example: tuple[float, ...]) -> bytes:
        return struct.pack(f"<{len(example)}f", *example)

    def digest(self, example: tuple[float, ...]) -> bytes:
        return blake2b(self.content(example), digest_size=16).digest()

    def size(self, example: tuple[float, ...]) -> int:
        return len(example)


@pytest.fixture(autouse=True)
def series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODALITIES, "series", Series())
    monkeypatch.setitem(TASKS, TASK, SingleLabel(TASK, "series"))


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def checked(folder: Path, content: bytes, kind: Kind, limits: Limits | None = None) -> DatasetReport:
    (folder / "raw").write_bytes(content)
    return write_checked(folder / "raw", "zip" if kind == "zip" else "tar", folder, limits)


@pytest.mark.parametrize("kind", KINDS)
def test_files_in_class_folders_reach_the_modality_by_reference(tmp_path: Path, kind: Kind) -> None:
    files = {"up/a.f32": floats(1, 2), "down/a.F32": floats(3, 2, 1), "up/b.f32": floats()}
    report = checked(tmp_path, packed(kind, files), kind)
    assert report.is_valid and report.rows == 3
    path = tmp_path / ROWS_FILE
    assert column_names(path) == ["file_name", "series", "label"] and file_columns(path) == {"series"}
    (batch,) = read_batches(path, ["file_name", "series"])
    assert batch.columns == [["up/a.f32", "down/a.F32", "up/b.f32"], ["files/1.f32", "files/2.f32", "files/3.f32"]]
    rows, findings = load_labelled(path, Columns(), target=target_of(TASK, []))
    assert findings == [] and rows.labels == ["up", "down", "up"]
    assert rows.examples == [(1.0, 2.0), (3.0, 2.0, 1.0), ()]


def test_files_that_a_table_names_reach_the_modality_by_reference(tmp_path: Path) -> None:
    files = {"metadata.csv": b"file_name,label,who\nx/b.f32,up,me\nx/a.f32,down,you\n"}
    files |= {"x/a.f32": floats(5), "x/b.f32": floats(6)}
    assert checked(tmp_path, packed("zip", files), "zip").is_valid
    rows, findings = load_labelled(tmp_path / ROWS_FILE, Columns(), extra_columns=["who"], target=target_of(TASK, []))
    found = {
        label: (example, who)
        for label, example, who in zip(rows.labels, rows.examples, rows.extras["who"], strict=True)
    }
    assert findings == [] and found == {"up": ((6.0,), "me"), "down": ((5.0,), "you")}


def test_equal_files_never_part_and_no_row_is_a_near_duplicate(tmp_path: Path) -> None:
    files = {f"{'ud'[n % 2]}/{n}.f32": floats(n + n % 2 * 1000, 0, 7) for n in range(120)}
    files |= {f"u/copy{n}.f32": floats(n, 0, 7) for n in range(0, 40, 2)}
    assert checked(tmp_path, packed("zip", files), "zip").is_valid
    path = tmp_path / ROWS_FILE
    sides = load_sides({"train": path}, columns=Columns(), options=SplitOptions(), seed=1, task=TASK)
    parts = [set(side.examples) for side in (sides.train, sides.validation, sides.test)]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == 120
    messages = {finding.code: finding.message for finding in sides.findings}
    assert messages == {"duplicate_row": "20 rows repeat an earlier series with the same label"}


def test_a_file_that_cannot_be_read_is_a_finding_with_its_row(tmp_path: Path) -> None:
    files = {"up/a.f32": floats(1), "down/b.f32": b"abc", "down/c.f32": floats(*range(101))}
    assert checked(tmp_path, packed("zip", files), "zip").is_valid
    _, findings = load_labelled(tmp_path / ROWS_FILE, Columns(), target=target_of(TASK, []))
    (finding,) = findings
    assert (finding.code, finding.severity, finding.column, finding.rows) == ("bad_series", "error", "series", [2, 3])
    assert finding.message == "row 2, column 'series' holds half of a number"


def test_files_of_two_kinds_and_large_ones_are_refused(tmp_path: Path) -> None:
    files = {"up/a.f32": floats(1), "down/b.txt": b"text", "down/c.f32": floats(*range(9))}
    report = checked(tmp_path, packed("zip", files), "zip", Limits(file_bytes=32))
    (finding,) = report.findings
    assert finding.severity == "error" and finding.rows == [2, 3] and "pack files of .f32" in finding.fix


def test_a_text_is_not_read_from_a_file(tmp_path: Path) -> None:
    assert checked(tmp_path, packed("zip", {"up/a.f32": floats(1), "down/a.f32": floats(2)}), "zip").is_valid
    columns = Columns.model_validate({"text": "series"})
    rows, (finding,) = load_labelled(tmp_path / ROWS_FILE, columns)
    assert len(rows) == 0 and (finding.severity, finding.rows) == ("error", [1, 2])


def test_a_check_that_is_repeated_starts_anew(tmp_path: Path) -> None:
    checked(tmp_path, packed("zip", {"up/a.f32": floats(1), "down/a.f32": floats(2)}), "zip")
    checked(tmp_path, packed("zip", {"up/a.f32": floats(1)}), "zip")
    assert [file.name for file in (tmp_path / "files").iterdir()] == ["1.f32"]


# Paths


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file, links that stay inside and that lead out, and a secret beside it."""
    home = tmp_path_factory.mktemp("home")
    (home / "secret").write_bytes(b"secret")
    folder = home / "ds"
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "1").write_bytes(b"12345")
    (folder / "inside").symlink_to(folder / "files" / "1")
    (folder / "out").symlink_to(home / "secret")
    (folder / "up").symlink_to(home)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("name", ["files/1", "./files//1", "inside"])
def test_a_file_inside_is_read(dataset: Path, name: str) -> None:
    assert FileReference(dataset, name).read(5) == b"12345"


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "out", "up/secret", "files/../../secret", "files/../files/1", "loop", "pipe", "files", ""),
        *("nothing", "files/1/2", "a\0b", "\ud800", "x" * 5000, "/etc/passwd", "~/secret", "{}/files/1"),
    ],
)
def test_anything_else_is_no_file_of_the_dataset(dataset: Path, name: str) -> None:
    with pytest.raises(BadCell, match="no file of the dataset"):
        FileReference(dataset, name.format(dataset)).read(1000)


def test_a_large_file_is_refused_and_not_read_to_its_end(dataset: Path) -> None:
    with pytest.raises(BadCell, match="more than 4 bytes"):
        FileReference(dataset, "files/1").read(4)


@given(st.lists(st.sampled_from(["..", ".", "files", "1", "up", "out", "secret", "ds", "", "inside"]), max_size=6))
def test_no_path_leads_out(dataset: Path, parts: list[str]) -> None:
    try:
        content: Any = FileReference(dataset, "/".join(parts)).read(100)
    except BadCell:
        return
    assert content == b"12345"
