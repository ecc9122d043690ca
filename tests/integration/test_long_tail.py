"""Classes without rows on some side, through every method: what trains, what is reported, and what is served."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.check import ROWS_FILE, write_checked
from finetune.jobs.failures import RunError
from finetune.jobs.link import ChildJob, DatasetInput
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec
from finetune.training import methods
from finetune.training.recipe import run_job
from finetune.training.run_context import Run
from model_registry.manifest import ModelManifest
from model_registry.store import FileStore
from modeling.backbone import ingest
from modeling.testing import write_tiny_checkpoint
from tests.integration.test_recipe_data import RegisteringLink

METHODS = ["baseline", "linear_probe", "setfit", "lora", "full", "auto"]
SHORT = {"epochs": 1, "setfit": {"max_pairs": 1000}, "export": [], "refit": False}


class Registered(RegisteringLink):
    card: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    ingest(FileStore(folder / "store"), write_tiny_checkpoint(folder / "tiny"), name="tiny", source="file:tiny")
    return folder


@pytest.fixture
def train(home: Path, tmp_path: Path) -> Callable[..., Registered]:
    def run(rows: list[dict[str, str]], **hyperparameters: Any) -> Registered:
        data = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        data.mkdir()
        (data / "raw").write_text("\n".join(map(json.dumps, rows)))
        assert write_checked(data / "raw", "jsonl", data).is_valid
        (backbone,) = (home / "store" / "backbones").glob("[!.]*/model.safetensors")
        given = DatasetInput(id="ds_1", sha256="1" * 64, rows_file=data / ROWS_FILE)
        spec = {
            "dataset": "ds_1",
            "backbone": "tiny",
            "register_as": "m",
            "hyperparameters": {**SHORT, **hyperparameters},
        }
        job = ChildJob(
            job_id="ft_1",
            tenant="default",
            attempt=1,
            spec=JobSpec.model_validate(spec),
            train=given,
            backbone_folder=backbone.parent,
            store_root=home / "store",
            work_dir=data,
            worker=WorkerProfile(),
        )
        link = Registered()
        run_job(job, link)
        prefix = ModelManifest.model_validate(link.manifest).prefix
        link.card = (FileStore(home / "store").local_path(prefix) / "MODEL_CARD.md").read_text()
        return link

    return run


def rows_of(sizes: dict[str, int]) -> list[dict[str, str]]:
    draw = random.Random(0)
    rows = []
    for label, count in sizes.items():
        for _ in range(count):
            words = [label.replace(" ", ""), *(draw.choice("alpha beta gamma delta epsilon".split()) for _ in range(6))]
            rows.append({"text": " ".join([*words, str(draw.random())]), "label": label})
    draw.shuffle(rows)
    return rows


SIXTY = {f"kind {number}": 1 + number % 3 if number < 20 else 6 for number in range(60)}


@pytest.mark.parametrize("method", METHODS)
def test_sixty_classes_of_which_twenty_are_rare_train(train: Callable[..., Registered], method: str) -> None:
    link = train(rows_of(SIXTY), method=method, max_seconds=60)
    evaluation = link.evaluation
    rare = {label for label, count in SIXTY.items() if count < 3}
    assert set(link.manifest["labels"]) == set(SIXTY)
    absent = {one["label"]: one for one in evaluation["not_judged"]}
    assert rare <= set(absent)
    assert all(absent[label]["train"] == SIXTY[label] and absent[label]["test"] == 0 for label in rare)
    (verdict,) = [one for one in evaluation["verdict"] if one["code"] == "classes_not_judged"]
    told = [event["message"] for event in link.of("data_warning") if event["data"].get("code") == "class_too_small"]
    assert all(repr(label) in verdict["message"] and any(repr(label) in one for one in told) for label in rare)
    figures = {row["label"]: row["f1"] for row in evaluation["test"]["per_class"]}
    assert all((figures[label] is None) == (label in absent) for label in SIXTY)
    (limits,) = [line for line in link.card.splitlines() if line.startswith("Nothing is known")]
    assert all(label in limits for label in rare)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_a_training_row_is_never_answered_and_breaks_nothing(
    train: Callable[..., Registered], method: str
) -> None:
    rows = [
        {**row, "side": ["train", "val", "test"][number % 3]} for number, row in enumerate(rows_of({"a": 40, "b": 40}))
    ]
    rows += [{"text": f"late words {number}", "label": "late", "side": "val"} for number in range(3)]
    rows += [{"text": f"never seen {number}", "label": "new", "side": "test"} for number in range(2)]
    link = train(rows, method=method, split={"strategy": "predefined", "column": "side"}, max_seconds=60)
    evaluation = link.evaluation
    assert link.manifest["labels"] == ["a", "b", "late", "new"]
    matrix = np.array(evaluation["test"]["confusion_matrix"])
    assert matrix[:, 3].sum() == 0, "it is never answered"
    assert all(np.isfinite(item["validation"]["loss"]) for item in evaluation["methods"])
    assert 0.05 < evaluation["temperature"] < 20, "rows that nothing can answer do not rule the temperature"


@pytest.mark.parametrize("method", ["baseline", "linear_probe", "full"])
@pytest.mark.parametrize("sizes", [{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 1, "b": 5}])
def test_next_to_no_rows_train_and_the_report_says_what_the_figures_are_of(
    train: Callable[..., Registered], method: str, sizes: dict[str, int]
) -> None:
    evaluation = train(rows_of(sizes), method=method).evaluation
    codes = {one["code"] for one in evaluation["verdict"]}
    assert ("nothing_held_out" in codes) == (max(sizes.values()) == 1)


TEXTLESS = "😀 😂 😡 👍 👎 💩 🔥 🎉".split()


@pytest.mark.parametrize("method", ["baseline", "auto"])
def test_texts_without_a_word_train(train: Callable[..., Registered], method: str) -> None:
    draw = random.Random(1)
    rows = []
    for number in range(80):
        own = TEXTLESS[:4] if number % 2 else TEXTLESS[4:]
        rows.append({"text": " ".join(draw.choices(own, k=draw.randint(2, 6))), "label": "ab"[number % 2]})
    link = train(rows, method=method, max_seconds=60)
    found = {item["method"]: item["validation"]["accuracy"] for item in link.evaluation["methods"]}
    assert found["baseline"] > 0.9 and link.evaluation["failed_methods"] == []


def test_one_method_that_fails_leaves_the_others_running(
    train: Callable[..., Registered], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Run) -> Any:
        raise ValueError("out of luck")

    def unlucky(run: Run) -> Any:
        raise RunError("non_finite_loss", "the loss became infinite")

    monkeypatch.setitem(methods.METHODS, "baseline", broken)
    monkeypatch.setitem(methods.METHODS, "linear_probe", unlucky)
    link = train(rows_of({"a": 20, "b": 20}), method="auto", max_seconds=60)
    failed = {one["method"]: one["reason"] for one in link.evaluation["failed_methods"]}
    assert set(failed) == {"baseline", "linear_probe"}
    assert "infinite" in failed["linear_probe"] and "ValueError" in failed["baseline"]
    assert [item["method"] for item in link.evaluation["methods"]], "the others go on"
    told = [event for event in link.of("data_warning") if event["data"].get("code") == "method_failed"]
    assert [event["data"]["method"] for event in told] == ["baseline", "linear_probe"]
    with pytest.raises(ValueError, match="out of luck"):
        train(rows_of({"a": 20, "b": 20}), method="baseline")
    for name in methods.METHODS:
        monkeypatch.setitem(methods.METHODS, name, broken)
    with pytest.raises(ValueError, match="out of luck"):
        train(rows_of({"a": 20, "b": 20}), method="auto")
