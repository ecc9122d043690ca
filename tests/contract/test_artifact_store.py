"""Artefact stores: whole files or none, never overwritten by a create-only write, no way out of the root."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_registry.errors import (
    ArtifactError,
    ArtifactExists,
    HashMismatch,
    InvalidReference,
    StoreFull,
    StoreUnavailable,
)
from model_registry.store import ArtifactStore, FileStore, put_tree, verify_files
from tests.support.memory_store import MemoryStore


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    if request.param == "file":
        yield FileStore(tmp_path / "store")
        return
    memory = MemoryStore()
    yield memory
    memory.close()


def test_what_is_put_can_be_got(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    entry = store.put_file("a/b/c.bin", tmp_path / "source")
    assert (entry.path, entry.size) == ("c.bin", 3)
    assert store.get_bytes("a/b/c.bin", max_bytes=3) == b"abc"
    assert store.local_path("a/b/c.bin").read_bytes() == b"abc"
    assert store.exists("a/b/c.bin") and store.exists("a/b") and not store.exists("a/x")


def test_create_only_never_overwrites(store: ArtifactStore) -> None:
    store.put_bytes("a/manifest.json", b"first", create_only=True)
    with pytest.raises(ArtifactExists):
        store.put_bytes("a/manifest.json", b"second", create_only=True)
    assert store.get_bytes("a/manifest.json", max_bytes=100) == b"first"


def test_missing_and_oversized_files_are_errors(store: ArtifactStore) -> None:
    store.put_bytes("a/x", b"12345")
    with pytest.raises(ArtifactError):
        store.get_bytes("a/x", max_bytes=4)
    for call in (lambda: store.get_bytes("a/y", max_bytes=9), lambda: store.local_path("a/y")):
        with pytest.raises(ArtifactError):
            call()


def test_trees_are_stored_verified_and_deleted(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "v" / "eval").mkdir(parents=True)
    (tmp_path / "v" / "labels.json").write_text("[]")
    (tmp_path / "v" / "eval" / "report.json").write_text("{}")
    files = put_tree(store, "models/t/m/1", tmp_path / "v")
    assert [entry.path for entry in files] == ["eval/report.json", "labels.json"]
    verify_files(store, "models/t/m/1", files)
    for damaged in (b"[", b"{}"):
        store.put_bytes("models/t/m/1/labels.json", damaged)
        with pytest.raises(HashMismatch):
            verify_files(store, "models/t/m/1", files)
    store.delete_tree("models/t/m/1")
    store.delete_tree("models/t/m/1")
    assert not store.exists("models/t/m/1")
    with pytest.raises(ArtifactError):
        verify_files(store, "models/t/m/1", files)


BAD_KEYS = [
    "",
    "/",
    "a/",
    "/a",
    "a//b",
    ".",
    "..",
    "../a",
    "a/..",
    "a/../b",
    "a/./b",
    "./a",
    ".hidden",
    "a/.b",
    "a\\b",
    "a b",
    "a\0b",
    "a\nb",
    "é",
    "a/é",
    "%2e%2e/a",
    "..%2fa",
    "a:b",
    "C:/a",
    "~",
    "~root/x",
    "a*",
    "a?b",
    "$HOME",
    "`x`",
    "-a",
    "a/-b",
    "x" * 129,
    "a/" + "x" * 129,
    "ａ",
    "a\u202eb",
    "a\u2215b",
    "file:///etc/passwd",
    "//etc/passwd",
    " a",
    "a ",
]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_that_are_no_plain_names_are_refused(store: ArtifactStore, key: str) -> None:
    for call in (
        lambda: store.put_bytes(key, b"x"),
        lambda: store.get_bytes(key, max_bytes=9),
        lambda: store.exists(key),
        lambda: store.delete_tree(key),
    ):
        with pytest.raises(InvalidReference):
            call()


def test_links_inside_the_root_are_not_followed(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("s")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidReference):
        store.get_bytes("link/secret", max_bytes=9)
    with pytest.raises(InvalidReference):
        store.put_bytes("link/new", b"x")
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret"]


def test_a_full_disk_keeps_nothing_of_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path / "store")
    store.put_bytes("a/kept", b"old")

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("model_registry.store.os.fsync", no_space)
    for key in ("a/kept", "a/new"):
        with pytest.raises(StoreFull):
            store.put_bytes(key, b"new")
    monkeypatch.undo()
    assert store.get_bytes("a/kept", max_bytes=9) == b"old"
    assert [path.name for path in (tmp_path / "store" / "a").iterdir()] == ["kept"]


def test_a_real_full_file_system_is_reported(tmp_path: Path) -> None:
    import subprocess

    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        store = FileStore(mount / "store")
        store.put_bytes("a/small", b"x" * 100)
        with pytest.raises(StoreFull):
            store.put_bytes("a/large", b"x" * 200_000)
        assert not store.exists("a/large")
        assert store.get_bytes("a/small", max_bytes=100) == b"x" * 100
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_the_name_is_durable_before_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    FileStore(tmp_path / "store").put_bytes("a/b/c", b"x")
    assert len(synced) == 4, "the file, then each folder up to the root"


def unsupported(*arguments: object, **options: object) -> None:
    raise OSError(errno.EPERM, "operation not permitted")


@pytest.fixture(params=["links", "renames", "claims"])
def by_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the filesystem can do: all; no hard links, as SMB and exFAT; nor renames that replace nothing, as FUSE."""
    if request.param != "links":
        monkeypatch.setattr("pathlib.Path.hardlink_to", unsupported)
    if request.param == "claims":
        monkeypatch.setattr("model_registry.store._rename_without_replacing", unsupported)
    return str(request.param)


def test_create_only_needs_no_hard_links(tmp_path: Path, by_way: str) -> None:
    store = FileStore(tmp_path / "store")
    store.put_bytes("a/manifest.json", b"first", create_only=True)
    with pytest.raises(ArtifactExists):
        store.put_bytes("a/manifest.json", b"second", create_only=True)
    assert store.get_bytes("a/manifest.json", max_bytes=9) == b"first"
    assert [path.name for path in (tmp_path / "store" / "a").iterdir()] == ["manifest.json"]


def test_of_many_that_create_one_name_at_once_one_does(tmp_path: Path, by_way: str) -> None:
    store, gate = FileStore(tmp_path / "store"), threading.Barrier(8)
    created: list[bytes] = []

    def create(content: bytes) -> None:
        gate.wait()
        with contextlib.suppress(ArtifactExists):
            store.put_bytes("a/x", content, create_only=True)
            created.append(content)

    threads = [threading.Thread(target=create, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1 and store.get_bytes("a/x", max_bytes=9) == created[0]


def test_a_write_that_fails_leaves_the_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path / "store")
    monkeypatch.setattr("pathlib.Path.hardlink_to", unsupported)
    monkeypatch.setattr("model_registry.store._rename_without_replacing", unsupported)

    def broken(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(StoreFull):
        patched.setattr("pathlib.Path.replace", broken)
        store.put_bytes("a/x", b"1", create_only=True)
    store.put_bytes("a/x", b"2", create_only=True)
    assert store.get_bytes("a/x", max_bytes=9) == b"2"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_volume_that_takes_no_writes_is_no_fault_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = FileStore(tmp_path / "store")

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("model_registry.store.os.fsync", refuse)
    with pytest.raises(StoreUnavailable, match=errno.errorcode[number]):
        store.put_bytes("a/x", b"1")


def test_a_volume_that_takes_no_writes_takes_no_removals_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path / "store")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for call in ("open", "unlink"):
        monkeypatch.setattr(f"pathlib.Path.{call}", refuse)
    with pytest.raises(StoreUnavailable, match="EROFS"):
        store.put_bytes("a/x", b"1")


def test_two_may_remove_one_tree_at_once(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    for number in range(200):
        store.put_bytes(f"a/{number % 10}/{number}", b"x")
    gate, failures = threading.Barrier(4), []

    def remove() -> None:
        gate.wait()
        try:
            store.delete_tree("a")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=remove) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and not store.exists("a")
