"""Which files of a folder are read: regular ones, below its root, of a bounded number and size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modeling.errors import CheckpointRefused
from modeling.ingestion import taking
from modeling.ingestion.taking import take_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "checkpoint"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


def take(folder: Path, *, max_bytes: int = 1 << 20) -> list[str]:
    target = folder.parent.parent / "target"
    target.mkdir()
    total = take_folder(folder, target, root=folder.parent, max_bytes=max_bytes)
    taken = sorted(path for path in target.rglob("*") if path.is_file())
    assert total == sum(path.stat().st_size for path in taken)
    assert not any(path.is_symlink() for path in taken)
    return [path.relative_to(target).as_posix() for path in taken]


def test_json_and_safetensors_are_taken_and_nothing_else(folder: Path) -> None:
    assert take(folder) == ["1_Pooling/config.json", "config.json", "model.safetensors"]


def test_a_link_is_followed_below_the_root_alone(folder: Path) -> None:
    (folder.parent / "blobs").mkdir()
    (folder / "model.safetensors").rename(folder.parent / "blobs" / "0123")
    (folder / "model.safetensors").symlink_to("../blobs/0123")
    assert "model.safetensors" in take(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "1_Pooling/config.json"])
def test_a_link_to_outside_of_the_root_is_refused(folder: Path, name: str) -> None:
    secret = folder.parent.parent / "secret.json"
    secret.write_text('{"password": 1}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointRefused, match=f"{name} is a link to outside of the import root"):
        take(folder)


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/environ", "/dev/null", "nowhere", "tokenizer.json"])
def test_devices_and_loops_are_refused(folder: Path, target: str) -> None:
    (folder / "tokenizer.json").symlink_to(target)
    with pytest.raises(CheckpointRefused, match=r"tokenizer\.json (is no regular|cannot be opened|is a link)"):
        take(folder)


def test_a_pipe_is_refused_and_holds_nobody_up(folder: Path) -> None:
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(CheckpointRefused, match=r"tokenizer\.json is no regular file"):
        take(folder)


def test_a_file_without_permission_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").mkdir()  # unlike a mode, it holds for root too
    (folder / "tokenizer.json" / "x.json").symlink_to("/nowhere/x.json")
    with pytest.raises(CheckpointRefused, match="cannot be opened"):
        take(folder)


def test_sizes_are_bounded_and_holes_are_not_written_out(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointRefused, match="import_memory_bytes"):
        take(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    (folder.parent.parent / "target").rename(folder.parent.parent / "before")
    with pytest.raises(CheckpointRefused, match=r"tokenizer\.json has 1,073,741,824 bytes"):
        take(folder, max_bytes=1 << 41)


def test_the_number_of_files_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "MAX_FILES", 4)
    with pytest.raises(CheckpointRefused, match="more than 4 files"):
        take(folder)


def test_a_copy_is_made_where_there_cannot_be_a_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert take(folder) == ["1_Pooling/config.json", "config.json", "model.safetensors"]
    assert (folder.parent.parent / "target" / "model.safetensors").read_bytes() == b"x" * 1000
