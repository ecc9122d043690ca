"""A backbone that is read otherwise than before is ingested anew beside the old one: versions go on as they were, and
it is said which of them should be trained again, and why."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from model_registry.db import Database
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest, why_retrain
from modeling.testing import write_tiny_checkpoint
from service import wiring
from tests.integration.test_served_tasks import ServedWorld
from tests.support.world import World

SAYS = "pooling mean before, cls now"


def pooled_by(folder: Path, mode: str) -> Path:
    names = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in names]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    migrate(database)
    store, folder = FileStore(tmp_path / "store"), write_tiny_checkpoint(tmp_path / "tiny")
    before = ingest(store, pooled_by(folder, "mean"), name="tiny", source="file:tiny")
    made = World(Registry(database), store, before, tmp_path)
    made.publish("m", seed=1)
    made.publish_baseline("words")
    now = ingest(store, pooled_by(folder, "cls"), name="tiny", source="file:tiny")
    assert now.info.digest != before.info.digest
    yield replace(made, backbone=now)
    database.dispose()


def test_an_old_version_answers_as_before_and_says_why_to_train_it_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(ServedWorld(world)) as served:
        assert served.rows("m", ["a good film"])  # its golden rows are those of the earlier reading
        for path in ("/models/m/versions/1", "/models/m/versions", "/models/words/versions/1"):
            document = served.ask(path, b"", method="GET").document
            found = document["data"][0] if "data" in document else document
            assert (found["retrain"] is None) == ("words" in path)
            assert "words" in path or SAYS in found["retrain"]
    with caplog.at_level(logging.WARNING):
        wiring._name_outdated(world.registry, world.store, {"tiny": world.backbone})
    (record,) = caplog.records
    assert record.getMessage().startswith("default/m:1: ") and SAYS in record.getMessage()


def test_versions_of_the_same_backbone_need_no_training(world: World) -> None:
    world.publish("new", seed=2)
    with closing(ServedWorld(world)) as served:
        assert served.ask("/models/new/versions/1", b"", method="GET").document["retrain"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: write_tiny_checkpoint(folder, seed=9), "its weights"),
        (lambda folder: _edit(folder, "config.json", layer_norm_eps=0.5), "config.json: layer_norm_eps"),
        (lambda folder: _edit(folder, "tokenizer.json", normalizer=None), "its tokenizer"),
        (lambda folder: _edit(folder, "sentence_bert_config.json", max_seq_length=20), "max_length 66 before, 20 now"),
        (
            lambda folder: _edit(
                folder, "config_sentence_transformers.json", prompts={"q": "x: "}, default_prompt_name="q"
            ),
            "its default prompt",
        ),
    ],
)
def test_what_has_changed_is_named(tmp_path: Path, change: object, says: str) -> None:
    store, folder = FileStore(tmp_path / "store"), write_tiny_checkpoint(tmp_path / "tiny")
    before = ingest(store, folder, name="tiny", source="file:tiny")
    assert callable(change)
    change(folder)
    now = ingest(store, folder, name="tiny", source="file:tiny")
    assert says in str(why_retrain(store, before.info.digest, now))
    assert why_retrain(store, now.info.digest, now) is None
    assert "no longer in the store" in str(why_retrain(store, "0" * 64, now))
    assert Backbone.open(before.folder).info == before.info


def _edit(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    document = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(document | values))
