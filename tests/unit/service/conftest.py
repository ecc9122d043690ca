from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model_registry.db import Database
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.backbone import ingest
from modeling.testing import write_tiny_checkpoint
from tests.support.exports import Exports
from tests.support.world import World


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def world(tmp_path: Path, tiny_checkpoint: Path, exports: Exports) -> Iterator[World]:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    migrate(database)
    store = FileStore(tmp_path / "store")
    backbone = ingest(store, tiny_checkpoint, name="tiny", source="file:tiny")
    yield World(Registry(database), store, backbone, tmp_path, export=exports)
    database.dispose()
