"""How many checkpoints are read at once, and what becomes of those that wait."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from model_registry.db import Database
from model_registry.errors import InvalidReference, StoreFull
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.removal import Removal
from model_registry.store import FileStore
from modeling.child_process import ChildFailed
from modeling.errors import CheckpointRefused
from modeling.intake import Imported, IntakeLimits
from service import model_import
from service.inference.errors import ModelNotReady
from service.model_import import ImportRefused, ImportsBusy, ModelImports
from tests.support.turns import settled

LIMITS = IntakeLimits(memory_bytes=1 << 31, timeout_s=60)


class Reader:
    """Takes the place of the process: says when it is entered, and ends when it is told to."""

    def __init__(self) -> None:
        self.entered, self.most, self.end = 0, 0, threading.Event()
        self._lock, self._inside = threading.Lock(), 0

    def __call__(self, *_: Any, stop: threading.Event, **__: Any) -> Imported:
        with self._lock:
            self.entered, self._inside = self.entered + 1, self._inside + 1
            self.most = max(self.most, self._inside)
        while not self.end.wait(0.01):
            if stop.is_set():
                raise ChildFailed("stopped", "the process that asked is ending")
        with self._lock:
            self._inside -= 1
        raise CheckpointRefused("read to its end")


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    reader = Reader()
    monkeypatch.setattr(model_import, "import_classifier", reader)
    return reader


def imports(root: Path | None, stop: threading.Event | None = None) -> ModelImports:
    unused: Any = None
    return ModelImports(
        unused, unused, import_root=root, is_offline=True, limits=LIMITS, stop=stop or threading.Event()
    )


async def run(made: ModelImports, source: str = "folder") -> int:
    return await made.run("m", source, tenant="t", actor="test")


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await settled(1)


def kinds(outcomes: list[Any]) -> list[type]:
    return [type(outcome) for outcome in outcomes]


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, "loop/model"], ids=["nul", "long", "loop"])
def test_a_folder_that_cannot_be_opened_is_an_invalid_reference(tmp_path: Path, source: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidReference, match="cannot be opened"):
        asyncio.run(run(imports(tmp_path), source))


def test_one_is_read_at_a_time_and_so_many_wait(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "folder").mkdir()

    async def scenario() -> list[Any]:
        made = imports(tmp_path)
        tasks = [asyncio.create_task(run(made)) for _ in range(9)]
        await until(lambda: len(made._running) == 9 and reader.entered == 1)
        with pytest.raises(ImportsBusy) as refused:
            await run(made)
        assert refused.value.retry_after_s == 30
        reader.end.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert kinds(asyncio.run(scenario())) == [CheckpointRefused] * 9
    assert (reader.entered, reader.most) == (9, 1)


def test_a_caller_that_leaves_does_not_let_another_in(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "folder").mkdir()

    async def scenario() -> list[Any]:
        made = imports(tmp_path)
        gone, waiting = (asyncio.create_task(run(made)) for _ in range(2))
        await until(lambda: len(made._running) == 2 and reader.entered == 1)
        gone.cancel()
        await asyncio.wait([gone])
        assert len(made._running) == 2
        reader.end.set()
        return list(await asyncio.gather(gone, waiting, return_exceptions=True))

    assert kinds(asyncio.run(scenario())) == [asyncio.CancelledError, CheckpointRefused]
    assert reader.most == 1


def test_what_is_read_when_the_service_ends_is_given_up(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "folder").mkdir()
    stop = threading.Event()

    async def scenario() -> list[Any]:
        task = asyncio.create_task(run(imports(tmp_path, stop)))
        await until(lambda: reader.entered == 1)
        stop.set()
        return list(await asyncio.gather(task, return_exceptions=True))

    assert kinds(asyncio.run(scenario())) == [ModelNotReady]


def test_a_source_outside_of_the_root_reaches_no_process(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    for source in ("../outside", "link", str(tmp_path / "outside"), "file:/etc"):
        with pytest.raises(ImportRefused):
            asyncio.run(run(imports(tmp_path / "root"), source))
    with pytest.raises(ImportRefused, match="import_root"):
        asyncio.run(run(imports(None)))
    assert reader.entered == 0


def test_an_import_that_cannot_be_stored_gives_its_number_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the model could not be deleted until a sweep a day later."""
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    migrate(database)
    registry = Registry(database)

    def written(_: Path, target: Path, **__: Any) -> Imported:
        target.mkdir()
        return Imported("text-classification", ("a", "b"))

    def full(*_: Any) -> None:
        raise StoreFull("no space left")

    monkeypatch.setattr(model_import, "import_classifier", written)
    monkeypatch.setattr(model_import, "put_tree", full)
    (tmp_path / "folder").mkdir()
    store = FileStore(tmp_path / "store")
    made = ModelImports(registry, store, import_root=tmp_path, is_offline=True, limits=LIMITS, stop=threading.Event())
    with pytest.raises(StoreFull):
        asyncio.run(run(made))
    assert [version.status for version in registry.model("t", "m").versions] == ["abandoned"]
    Removal(database, registry, store).delete_model(tenant="t", name="m", is_forced=False, actor="a", reason="")
    assert registry.models("t") == []


def test_a_full_disk_for_what_is_read_is_told(tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(StoreFull):
        asyncio.run(run(imports(tmp_path)))


def test_checks_and_imports_hold_no_thread_of_others(tmp_path: Path, reader: Reader) -> None:
    """Even where there is but one of them."""
    (tmp_path / "folder").mkdir()

    async def scenario() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        task = asyncio.create_task(run(imports(tmp_path)))
        await until(lambda: reader.entered == 1)
        try:
            async with asyncio.timeout(10):
                assert await asyncio.to_thread(lambda: 1) == 1
        finally:
            reader.end.set()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
