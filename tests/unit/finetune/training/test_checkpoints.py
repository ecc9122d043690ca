"""Resume state: whole or the one before, never a pickle."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest
import torch

from finetune.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint


def checkpoint(value: float) -> Checkpoint:
    return Checkpoint({"w": torch.full((3,), value)}, {"step": value})


def test_the_newest_comes_back_and_older_files_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(step), step=step)
    found = load_checkpoint(tmp_path)
    assert found is not None and found.state == {"step": 3}
    assert found.tensors["w"].tolist() == [3.0] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-3.safetensors"]


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_write_that_fails_at_any_point_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    import os

    save_checkpoint(tmp_path, checkpoint(1), step=1)
    calls = {"n": 0}
    real = os.fsync

    def failing(descriptor: int) -> None:
        calls["n"] += 1
        if calls["n"] == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("finetune.training.checkpoints.os.fsync", failing)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path, checkpoint(2), step=2)
    found = load_checkpoint(tmp_path)
    assert found is not None and found.state["step"] in ({1} if fails_at < 4 else {1, 2})
    assert not list(tmp_path.glob("*.tmp"))


def test_damaged_tensors_are_not_trusted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), step=1)
    path = tmp_path / "step-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load_checkpoint(tmp_path) is None


def test_planted_pickles_are_ignored(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (open, (str(canary), "w"))

    for name in ("rng_state.pth", "optimizer.pt", "random_states_0.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    save_checkpoint(tmp_path, checkpoint(1), step=1)
    assert load_checkpoint(tmp_path) is not None
    assert not canary.exists()
