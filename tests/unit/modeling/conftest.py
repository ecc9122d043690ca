from __future__ import annotations

from pathlib import Path

import pytest

from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest
from modeling.testing import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def backbone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return ingest(FileStore(tmp_path_factory.mktemp("store")), checkpoint, name="tiny", source="file:tiny")
