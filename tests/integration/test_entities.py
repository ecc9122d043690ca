"""Entities from annotated rows to a version: every method on a tiny backbone, and what the version answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.check import ROWS_FILE, write_checked
from finetune.evaluation.tagged import ragged
from finetune.jobs.link import ChildJob, DatasetInput
from finetune.jobs.records import JobSpec
from finetune.training.windows import tagged_by
from model_registry.manifest import ModelManifest
from model_registry.store import FileStore
from modeling.assemble import check_golden, read_version
from modeling.backbone import Backbone
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.inputs import open_preprocessor
from modeling.linear_tokens import LinearTokens
from modeling.tasks import TASKS, Options, RowOutput
from modeling.weights import FloatArray
from tests.integration.test_recipe import RecordingLink, backbone_folder, finish, job, store
from tests.support import entities

__all__ = ["backbone_folder", "job", "store"]

TASK = "token-classification"


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entities")
    (folder / "raw").write_text("".join(json.dumps(row) + "\n" for row in entities.rows(160)))
    report = write_checked(folder / "raw", "jsonl", folder)
    assert report.is_valid and [column.name for column in report.columns] == ["text", "spans"]
    return folder / ROWS_FILE


def of_entities(job: ChildJob, **asked: Any) -> ChildJob:
    spec = JobSpec(dataset="ds_1", backbone="tiny", register_as="m", task=TASK, hyperparameters={"export": [], **asked})
    return job.model_copy(update={"spec": spec})


@pytest.mark.parametrize("method", ["baseline", "linear_probe", "lora", "full"])
def test_every_method_makes_a_version_that_reproduces_its_golden_rows(
    job: Callable[..., ChildJob], store: FileStore, method: str
) -> None:
    patient = {"epochs": 40, "early_stopping": {"patience": 80}} if method == "lora" else {"epochs": 8}
    result = finish(of_entities(job(), method=method, learning_rate=3e-3, **patient), RecordingLink())
    manifest, evaluation = ModelManifest.model_validate(result["manifest"]), result["evaluation"]
    assert manifest.task == TASK and manifest.labels == ("LOC", "PER")
    parts = read_version(store, manifest)
    check_golden(parts, logits_of(store, parts))
    test = evaluation["test"]
    assert test["entity_f1"] > (0.9 if method == "baseline" else 0.3), test
    assert {row["label"] for row in test["per_class"]} == {"LOC", "PER"}
    assert test["intervals_95"]["entity_f1"][0] <= test["entity_f1"] <= test["intervals_95"]["entity_f1"][1]
    assert np.sum(test["confusion"]) >= sum(row["rows"] for row in test["per_class"])


def logits_of(store: FileStore, parts: Any) -> Callable[[Any], list[FloatArray]]:
    """What a server computes from the artefact alone, by position."""
    if isinstance(parts.linear, LinearTokens):
        return parts.linear.margins
    backbone = parts.backbone or Backbone.open(store.local_path(f"backbones/{parts.manifest.base.digest}"))
    engine, preprocessor = TorchEngine(backbone), open_preprocessor(backbone, limit=parts.max_length)
    key = None
    if parts.adapter is not None:
        key = "a"
        engine.load_adapter(key, parts.adapter)

    def computed(examples: Any) -> list[FloatArray]:
        rows = [own[0] for own in preprocessor.windows(examples)]
        states = engine.run(EngineBatch(rows, [key] * len(rows) if key else None, range(len(rows)))).states
        return [parts.head.logits(states[row]) for row in range(len(rows))]

    return computed


def test_auto_trains_the_cheap_first_and_tells_the_best(job: Callable[..., ChildJob]) -> None:
    link = RecordingLink()
    result = finish(of_entities(job(), method="auto", epochs=2), link)
    methods = [one["method"] for one in result["evaluation"]["methods"]]
    assert methods[:2] == ["baseline", "linear_probe"]
    assert result["evaluation"]["metric"] == "entity_f1"
    assert result["evaluation"]["chosen"] in methods


def test_a_text_in_windows_is_answered_as_one(backbone_folder: Path) -> None:
    """Each word has one answer, in order, whatever the window; a text that fits is answered as by a single one."""
    backbone = Backbone.open(backbone_folder)
    preprocessor = open_preprocessor(backbone, limit=16)
    text = " ".join(row["text"] for row in entities.rows(12))
    ((*windows,),) = preprocessor.windows([text])
    assert len(windows) > 3 and all(row.cost <= 16 for row in windows)
    words = np.concatenate([row.extra["located"].words for row in windows])
    assert (np.diff(words[:, 0]) > 0).all()
    whole = open_preprocessor(backbone).windows([text[:60]])[0]
    assert len(whole) == 1
    task, labels = TASKS[TASK], ("LOC", "PER")
    scores = [np.full((row.cost, 5), 0.1, np.float32) for row in windows]
    for own, row in zip(scores, windows, strict=True):
        own[row.extra["located"].first, 1] = 0.9
    outputs = [RowOutput(own, row.extra) for own, row in zip(scores, windows, strict=True)]
    answer: Any = task.reduce(outputs, labels, task.calibration({"temperature": 1.0}, labels, None), Options())
    assert [(one.start, one.end) for one in answer.entities] == [tuple(place) for place in words.tolist()]
    assert all(one.text == text[one.start : one.end] for one in answer.entities)


def test_batched_is_alone(backbone_folder: Path) -> None:
    from modeling.heads import DenseLayer, TaskHead

    backbone = Backbone.open(backbone_folder)
    engine, preprocessor = TorchEngine(backbone), open_preprocessor(backbone, limit=16)
    draw = np.random.default_rng(0)
    width = backbone.info.hidden_size
    head = TaskHead((DenseLayer(draw.normal(size=(5, width)).astype(np.float32), np.zeros(5, np.float32)),))
    texts = [row["text"] for row in entities.rows(9)]
    together = tagged_by(engine, head, preprocessor, texts)
    alone = ragged(tagged_by(engine, head, preprocessor, [text])[0] for text in texts)
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.words, other.words)
        np.testing.assert_allclose(one.logits, other.logits, atol=2e-5)


def test_a_dataset_without_spans_is_refused(job: Callable[..., ChildJob], tmp_path: Path) -> None:
    from finetune.jobs.failures import DatasetInvalid

    (tmp_path / "raw").write_text("".join(json.dumps({"text": f"a text {i}", "spans": []}) + "\n" for i in range(30)))
    write_checked(tmp_path / "raw", "jsonl", tmp_path)
    given = DatasetInput(id="d", sha256="0" * 64, rows_file=tmp_path / ROWS_FILE)
    bare = of_entities(job(), method="baseline").model_copy(update={"train": given})
    with pytest.raises(DatasetInvalid, match="none of the 30 rows has a span"):
        finish(bare, RecordingLink())
