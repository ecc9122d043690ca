"""The data directory and its id, over SQLite and PostgreSQL: adopted once, refused when it is another, found again."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from finetune.data.store import DatasetStore
from model_registry.data_folder import MARKER, DataFolder
from model_registry.db import Database
from model_registry.errors import StoreUnavailable
from model_registry.manifest import MANIFEST_NAME, ModelManifest
from model_registry.registry import Registry
from model_registry.store import FileStore


def publish(database: Database, root: Path) -> None:
    registry = Registry(database)
    with registry.transaction() as connection:
        version = registry.reserve(
            connection, tenant="t", name="m", task="text-classification", kind="head", method="x", job_id=None
        )
    manifest = ModelManifest(
        tenant="t", name="m", version=version, kind="head", method="x", labels=("a",), created_at=0.0, files=()
    )
    FileStore(root / "store").put_bytes(f"{manifest.prefix}/{MANIFEST_NAME}", manifest.to_bytes())
    with registry.transaction() as connection:
        registry.publish(connection, manifest, actor="test")


def upload(database: Database, root: Path) -> None:
    store = DatasetStore(database)
    record = store.create("t", filename="x.csv", file_format="csv", sha256="0" * 64, size_bytes=1)
    (root / "datasets" / "t" / record.id).mkdir(parents=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_a_new_directory_is_made_with_its_folders_and_an_id_that_stays(database: Database, root: Path) -> None:
    DataFolder.open(root, database).check()
    marker = (root / MARKER).read_text()
    assert (root / "store").is_dir() and (root / "datasets").is_dir()
    DataFolder.open(root, database).check()
    assert (root / MARKER).read_text() == marker


@pytest.mark.parametrize("content", [publish, upload])
def test_a_directory_of_an_earlier_release_is_adopted(database: Database, root: Path, content: object) -> None:
    content(database, root)  # type: ignore[operator]
    DataFolder.open(root, database).check()
    assert (root / MARKER).is_file()


@pytest.mark.parametrize("content", [publish, upload])
@pytest.mark.parametrize("is_known", [True, False])
def test_an_empty_directory_beside_a_database_that_knows_more_is_refused_and_told_how_to_proceed(
    database: Database, root: Path, content: object, is_known: bool
) -> None:
    if is_known:
        DataFolder.open(root, database)
    content(database, root)  # type: ignore[operator]
    shutil.rmtree(root)
    for is_there in (False, True):
        if is_there:
            root.mkdir()
        with pytest.raises(StoreUnavailable, match=r"Mount its volume.*echo") as refused:
            DataFolder.open(root, database)
        assert not (root / "store").exists()
    command = str(refused.value).rpartition("run: ")[2]
    assert command.startswith(f"mkdir -p {root}; echo ") and command.endswith(f" > {root / MARKER}")
    id_ = command.split()[4]
    (root / MARKER).write_text(f"{id_}\n")
    DataFolder.open(root, database).check()


def test_a_backup_without_the_marker_is_known_by_what_it_holds(database: Database, root: Path) -> None:
    first = DataFolder.open(root, database)
    publish(database, root)
    id_ = (root / MARKER).read_text()
    (root / MARKER).unlink()
    with pytest.raises(StoreUnavailable):
        first.check()
    DataFolder.open(root, database)
    assert (root / MARKER).read_text() == id_
    first.check()


def test_the_directory_of_another_database_is_refused(database: Database, root: Path) -> None:
    DataFolder.open(root, database)
    (root / MARKER).write_text("0" * 32)
    with pytest.raises(StoreUnavailable, match="belongs to another database"):
        DataFolder.open(root, database)
    (root / MARKER).write_text("")
    with pytest.raises(StoreUnavailable, match="32 hex digits"):
        DataFolder.open(root, database)


def test_processes_that_start_together_agree_on_the_id(database: Database, root: Path) -> None:
    gate, opened, failures = threading.Barrier(4), [], []

    def start() -> None:
        gate.wait()
        try:
            opened.append(DataFolder.open(root, database))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for folder in opened:
        folder.check()


def test_a_volume_that_goes_and_comes_back_is_seen_and_never_made_anew(
    database: Database, root: Path, tmp_path: Path
) -> None:
    folder = DataFolder.open(root, database)
    store = FileStore(root / "store", is_there=True)
    root.rename(tmp_path / "away")
    for is_there in (False, True):  # gone, and the empty folder under the mount
        if is_there:
            root.mkdir()
        with pytest.raises(StoreUnavailable, match="missing, or its volume"):
            folder.check()
        for write in (lambda: store.put_bytes("a/b", b"x"), lambda: store.delete_tree("a")):
            with pytest.raises(StoreUnavailable):
                write()
        with pytest.raises(StoreUnavailable):
            FileStore(root / "store", is_there=True)
        assert not root.exists() or list(root.iterdir()) == []
    (root / MARKER).write_text("1" * 32)
    with pytest.raises(StoreUnavailable, match="not the one"):
        folder.check()
    (root / MARKER).write_text("spoilt")
    with pytest.raises(StoreUnavailable, match="no id of 32") as refused:
        folder.check()
    assert str(root) not in str(refused.value)  # the probe shows it to everyone
    shutil.rmtree(root)
    (tmp_path / "away").rename(root)
    folder.check()
    store.put_bytes("a/b", b"x")


def test_sqlite_is_not_made_anew_in_the_place_of_one_that_is_gone(tmp_path: Path) -> None:
    from model_registry.errors import DatabaseUnavailable
    from model_registry.migrations import migrate

    database = Database(f"sqlite:///{tmp_path / 'data' / 'polyhead.db'}")
    (tmp_path / "data").mkdir()
    migrate(database)
    database.is_made = True
    database.dispose()
    (tmp_path / "data").rename(tmp_path / "away")
    (tmp_path / "data").mkdir()
    with pytest.raises(DatabaseUnavailable):
        Registry(database).epoch()
    assert list((tmp_path / "data").iterdir()) == []
    (tmp_path / "data").rmdir()
    (tmp_path / "away").rename(tmp_path / "data")
    assert Registry(database).epoch() == 0
    database.dispose()
