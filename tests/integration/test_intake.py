"""A checkpoint is read in a process of its own: whatever it does there, the caller gets an error that says what."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from model_registry.errors import StoreFull, StoreUnavailable
from model_registry.store import FileStore
from modeling import intake
from modeling.backbone import Backbone
from modeling.child_process import ChildFailed, ask
from modeling.errors import BackboneUnavailable, CheckpointRefused, ModelingError
from modeling.intake import IntakeLimits, import_classifier, ingest
from modeling.testing import write_tiny_checkpoint
from tests.support import hostile
from tests.support.hostile import LABELS

LIMITS = IntakeLimits(memory_bytes=3 << 30, timeout_s=120)


def take(folder: Path, *, limits: IntakeLimits = LIMITS) -> intake.Imported:
    target = folder.parent / "version"
    return import_classifier(
        folder, target, name="m", source=f"file:{folder.name}", root=folder.parent, offline=True, limits=limits
    )


def test_what_is_written_is_a_version_whose_files_are_ours(tmp_path: Path) -> None:
    imported = take(write_tiny_checkpoint(tmp_path / "fine", labels=LABELS))
    assert (imported.task, imported.labels) == ("text-classification", tuple(LABELS))
    files = {path.relative_to(tmp_path / "version").as_posix() for path in (tmp_path / "version").rglob("*")}
    assert {"full/model.safetensors", "full/tokenizer.json", "head.safetensors", "golden.json", "labels.json"} <= files
    assert Backbone.open(tmp_path / "version" / "full").info.source == "file:fine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine", "version"], "what was taken is gone"


def test_files_of_ours_are_not_believed_in_a_foreign_folder(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "odd", labels=LABELS)
    own = {"pooling": "max", "normalize": True, "max_length": 9, "hidden_size": 7}
    (folder / "backbone.json").write_text(json.dumps(own))
    (folder / "prompts.json").write_text(json.dumps({"prompts": {}, "default": "a bad film: "}))
    take(folder)
    taken = Backbone.open(tmp_path / "version" / "full")
    assert (taken.info.hidden_size, taken.info.max_length, taken.info.pooling) == (32, 66, "cls")
    assert not (taken.folder / "prompts.json").exists()
    assert (folder / "backbone.json").is_file(), "the source stays as it was"


@pytest.mark.parametrize("letter", ["", "q"], ids=["at once", "for its letter"])
def test_a_bomb_is_refused_before_it_has_grown(tmp_path: Path, letter: str) -> None:
    folder = hostile.write(tmp_path / "bomb", hostile.bomb(before=letter))
    with pytest.raises(CheckpointRefused, match="remove the steps that lengthen texts"):
        take(folder, limits=IntakeLimits(memory_bytes=1 << 30, timeout_s=60))


@pytest.mark.slow
def test_reading_ends_at_the_limit_of_memory(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "fine", labels=LABELS)
    with pytest.raises(CheckpointRefused, match=r"takes more memory than.*import_memory_bytes"):
        take(folder, limits=IntakeLimits(memory_bytes=100 << 20, timeout_s=60))


@pytest.mark.slow
def test_reading_ends_at_the_limit_of_time(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "fine", labels=LABELS)
    with pytest.raises(CheckpointRefused, match=r"took more than 0\.5 s.*import_timeout_s"):
        take(folder, limits=IntakeLimits(memory_bytes=3 << 30, timeout_s=0.5))


def test_a_checkpoint_too_large_for_the_limit_is_refused_with_the_setting(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "large", labels=LABELS)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 38)
    with pytest.raises(CheckpointRefused, match="import_memory_bytes"):
        take(folder)


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda folder: hostile.change_config(folder, auto_map={"AutoModel": "evil.Evil"}), "auto_map"),
    "link": (lambda folder: (folder / "x.json").symlink_to("/etc/passwd"), "outside of the import root"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_refusal_comes_back_by_its_class_and_in_its_words(tmp_path: Path, case: str) -> None:
    spoil, says = CASES[case]
    spoil(folder := write_tiny_checkpoint(tmp_path / "w", labels=LABELS))
    with pytest.raises(ModelingError, match=says) as told:
        take(folder)
    assert str(tmp_path) not in str(told.value), "a message names no path of the host"
    assert not (tmp_path / "version" / "head.safetensors").exists()


@pytest.mark.slow
def test_thirty_thousand_labels_are_refused_by_their_number(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "many", labels=[f"label {number}" for number in range(30_000)])
    with pytest.raises(CheckpointRefused, match="more than 10,000 labels"):
        take(folder)


def test_a_backbone_is_read_once_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, store = write_tiny_checkpoint(tmp_path / "tiny"), FileStore(tmp_path / "store")
    first = ingest(store, f"file:{folder}", name="tiny", offline=True, limits=LIMITS)
    assert first.folder.is_relative_to(store.root)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it is known, and read again")

    monkeypatch.setattr(intake, "ask", refuse)
    again = ingest(store, f"file:{folder}", name="other", offline=True, limits=LIMITS)
    assert (again.info.digest, again.info.name) == (first.info.digest, "other")


def test_processes_that_start_together_read_a_backbone_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, store, asked = write_tiny_checkpoint(tmp_path / "tiny"), FileStore(tmp_path / "store"), []

    def count(*args: Any, **named: Any) -> Any:
        asked.append(args)
        return ask(*args, **named)

    monkeypatch.setattr(intake, "ask", count)
    with ThreadPoolExecutor(4) as threads:  # each opens the lock's file for itself, as a process does
        take_in = partial(ingest, store, f"file:{folder}", name="tiny", offline=True, limits=LIMITS)
        found = [future.result() for future in [threads.submit(take_in) for _ in range(4)]]
    assert len({backbone.info.digest for backbone in found}) == 1
    assert len(asked) == 1


def test_who_waits_for_a_reader_ends_when_it_is_to_stop(tmp_path: Path) -> None:
    folder, store, stop = write_tiny_checkpoint(tmp_path / "tiny"), FileStore(tmp_path / "store"), threading.Event()
    with intake._turn(store.root / ".reading", None), ThreadPoolExecutor(1) as thread:
        waits = thread.submit(ingest, store, f"file:{folder}", name="tiny", offline=True, limits=LIMITS, stop=stop)
        assert not wait([waits], timeout=0.5).done
        stop.set()
        with pytest.raises(ChildFailed, match="ending"):
            waits.result(timeout=30)


@pytest.mark.parametrize(("number", "expected"), [(errno.EROFS, StoreUnavailable), (errno.ENOSPC, StoreFull)])
def test_a_store_without_room_for_the_lock_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    folder, store, open_file = write_tiny_checkpoint(tmp_path / "tiny"), FileStore(tmp_path / "store"), Path.open

    def refuse(path: Path, *args: Any, **named: Any) -> Any:
        if path.parent == store.root:
            raise OSError(number, os.strerror(number))
        return open_file(path, *args, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(expected, match="the store"):
        ingest(store, f"file:{folder}", name="tiny", offline=True, limits=LIMITS)


def test_a_hostile_backbone_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = hostile.change_tokenizer(write_tiny_checkpoint(tmp_path / "tiny"), hostile.bomb())
    store = FileStore(tmp_path / "store")
    with pytest.raises(CheckpointRefused, match="remove the steps that lengthen texts"):
        ingest(store, f"file:{folder}", name="tiny", offline=True, limits=LIMITS)
    assert not (store.root / "backbones").exists()


def test_a_source_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    hub = f"hub:nobody/nothing@{'0' * 40}"
    with pytest.raises(BackboneUnavailable, match="not in the local cache, and offline is set"):
        import_classifier(None, tmp_path / "v", name="m", source=hub, root=None, offline=True, limits=LIMITS)
