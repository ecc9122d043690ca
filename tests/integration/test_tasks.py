"""Several labels and numbers from rows to a registered version: what a server answers is what the report says."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score, root_mean_squared_error

from finetune.data.check import ROWS_FILE, write_checked
from finetune.jobs.failures import DatasetInvalid
from finetune.jobs.hyperparameters import PlanError
from finetune.jobs.link import ChildJob, DatasetInput
from model_registry.manifest import ModelManifest
from model_registry.store import FileStore
from modeling.assemble import check_golden, read_version
from modeling.backbone import Backbone, ingest
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.inputs import single
from modeling.inputs.text import TextPreprocessor
from modeling.tasks import TASKS
from modeling.testing import write_tiny_checkpoint
from tests.support.registering import Record, Workshop, pointer

METHODS = ["baseline", "linear_probe", "lora", "full"]
# A backbone of random weights has everything to learn.
LEARNS: dict[str, dict[str, Any]] = {
    "lora": {"epochs": 2, "learning_rate": 1e-3},
    "full": {"epochs": 15, "learning_rate": 5e-3},
}
WORDS = {"plot": ["plot", "story"], "cast": ["actor", "cast"], "look": ["film", "movie"], "rare": ["was"]}
CHANCES = {"plot": 0.5, "cast": 0.4, "look": 0.3, "rare": 0.04}
WORTH = {"great": 3.0, "good": 1.0, "bad": -3.0, "dull": -2.0, "film": 0.0, "not": -1.0}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("shop")
    store = FileStore(folder / "store")
    backbone = ingest(store, write_tiny_checkpoint(folder / "tiny"), name="tiny", source="file:tiny")
    return Workshop(store, backbone.folder, folder, graphs_root=folder / "graphs")


def labelled(draw: random.Random, number: int) -> dict[str, Any]:
    labels = [name for name, chance in CHANCES.items() if draw.random() < chance]
    words = [draw.choice(WORDS[name]) for name in labels] + draw.sample("it a the not very".split(), 3)
    draw.shuffle(words)
    return {"text": f"{' '.join(words)} row{number}", "label": labels, "site": draw.choice(["web", "mail"])}


def valued(draw: random.Random, number: int) -> dict[str, Any]:
    words = [draw.choice(list(WORTH)) for _ in range(3)]
    value = 1000 + 10 * (sum(WORTH[word] for word in words) + draw.gauss(0, 0.3))
    text = f"{' '.join(words)} {draw.choice('it was a the'.split())} row{number}"
    return {"text": text, "label": value, "site": draw.choice(["web", "mail"])}


MAKERS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "text-multi-label": labelled,
    "text-regression": valued,
}


def dataset(shop: Workshop, task: str, *, rows: int, seed: int) -> tuple[DatasetInput, list[dict[str, Any]]]:
    draw = random.Random(seed)
    made = [MAKERS[task](draw, seed * 100_000 + number) for number in range(rows)]
    folder = shop.folder / f"{task}-{seed}-{rows}"
    folder.mkdir(exist_ok=True)
    (folder / "raw").write_text("\n".join(map(json.dumps, made)))
    assert write_checked(folder / "raw", "jsonl", folder).is_valid
    return DatasetInput(id=folder.name, sha256="0" * 64, rows_file=folder / ROWS_FILE), made


def job(shop: Workshop, task: str, train: DatasetInput, test: DatasetInput, **hyperparameters: Any) -> ChildJob:
    found = shop.job(train, test, **hyperparameters)
    columns = found.spec.columns.model_copy(update={"slices": ("site",)})
    return found.model_copy(update={"spec": found.spec.model_copy(update={"task": task, "columns": columns})})


def served(store: FileStore, manifest: ModelManifest) -> Callable[[list[str]], Any]:
    """Logits as a server computes them, from the artefact alone."""
    parts = read_version(store, manifest)
    if parts.linear is not None:
        return parts.linear.margins
    assert manifest.base is not None and parts.head is not None
    head = parts.head
    backbone = parts.backbone or Backbone.open(store.local_path(f"backbones/{manifest.base.digest}"))
    engine = TorchEngine(backbone)
    if parts.adapter is not None:
        engine.load_adapter("a", parts.adapter)
    tokenizer = TextPreprocessor(backbone.folder, limit=parts.max_length or 64)

    def logits(texts: list[str]) -> Any:
        keys = ["a"] * len(texts) if parts.adapter is not None else None
        return head.logits(engine.run(EngineBatch(single(tokenizer.encode(list(texts))), keys)).pooled)

    return logits


def file(shop: Workshop, manifest: ModelManifest, name: str) -> Any:
    return json.loads(shop.store.get_bytes(f"{manifest.prefix}/{name}", max_bytes=1 << 20))


@pytest.mark.parametrize("method", METHODS)
def test_served_labels_are_those_of_the_report(shop: Workshop, method: str) -> None:
    train, _ = dataset(shop, "text-multi-label", rows=300, seed=1)
    test, rows = dataset(shop, "text-multi-label", rows=80, seed=2)
    record = Record()
    manifest = shop.register(job(shop, "auto", train, test, method=method, **LEARNS.get(method, {})), record)
    assert (manifest.task, manifest.labels) == ("text-multi-label", tuple(sorted(WORDS)))
    parts, logits_of = read_version(shop.store, manifest), served(shop.store, manifest)
    check_golden(parts, lambda texts: logits_of(list(map(str, texts))))
    task = TASKS[manifest.task]
    scores = task.scores(logits_of([row["text"] for row in rows]), parts.calibration)
    said = task.answers(scores, parts.calibration)
    due = np.array([[name in row["label"] for name in manifest.labels] for row in rows])
    report = record.result["evaluation"]["test"]
    assert report["micro_f1"] == manifest.metrics["micro_f1"] == pytest.approx(f1_score(due, said, average="micro"))
    assert report["subset_accuracy"] == pytest.approx(accuracy_score(due, said))
    assert [row["rows"] for row in report["per_class"]] == due.sum(0).tolist()
    assert parts.calibration.thresholds == tuple(row["threshold"] for row in report["per_class"])
    assert parts.calibration.thresholds[manifest.labels.index("rare")] == 0.5
    low, high = report["intervals_95"]["micro_f1"]
    assert low <= report["micro_f1"] <= high and report["slices"][0]["values"]
    if method in {"baseline", "full"}:
        assert report["micro_f1"] > 0.9
    stats = file(shop, manifest, "reference_stats.json")
    assert set(stats["answer_shares"]) == set(WORDS) and 0 < stats["labels_per_row"] < 3
    fingerprint = file(shop, manifest, "data/fingerprint.json")
    assert fingerprint["label_counts"]["test"] == dict(zip(manifest.labels, due.sum(0).tolist(), strict=True))
    card = shop.store.get_bytes(f"{manifest.prefix}/MODEL_CARD.md", max_bytes=1 << 20).decode()
    assert "text-multi-label, 4 labels" in card and "| threshold |" in card
    assert not any(path.path.endswith("confusion_matrix.csv") for path in manifest.files)


@pytest.mark.parametrize("method", METHODS)
def test_served_values_are_those_of_the_report(shop: Workshop, method: str) -> None:
    train, trained = dataset(shop, "text-regression", rows=300, seed=3)
    test, rows = dataset(shop, "text-regression", rows=80, seed=4)
    record = Record()
    manifest = shop.register(job(shop, "text-regression", train, test, method=method, **LEARNS.get(method, {})), record)
    assert (manifest.task, manifest.labels) == ("text-regression", ())
    parts, logits_of = read_version(shop.store, manifest), served(shop.store, manifest)
    check_golden(parts, lambda texts: logits_of(list(map(str, texts))))
    task = TASKS[manifest.task]
    scores = task.scores(logits_of([row["text"] for row in rows]), parts.calibration)
    said, true = task.answers(scores, parts.calibration), np.array([row["label"] for row in rows])
    report = record.result["evaluation"]["test"]
    assert report["rmse"] == manifest.metrics["rmse"] == pytest.approx(root_mean_squared_error(true, said), rel=1e-3)
    assert report["mae"] == pytest.approx(mean_absolute_error(true, said), rel=1e-3)
    assert report["r2"] == pytest.approx(r2_score(true, said), abs=1e-3)
    assert abs(said.mean() - np.mean([row["label"] for row in trained])) < 25, "in the units of the target"
    if method in {"baseline", "full"}:
        assert report["r2"] > 0.6
    assert set(report["residuals"]["quantiles"]) == {"0.05", "0.25", "0.5", "0.75", "0.95"}
    stats = file(shop, manifest, "reference_stats.json")["value_histogram"]
    assert sum(stats["counts"]) == record.result["evaluation"]["validation"]["rows"]
    assert len(stats["edges"]) == len(stats["counts"]) + 1
    assert file(shop, manifest, "data/fingerprint.json")["targets"]["test"]["largest"] == pytest.approx(true.max())
    curves = file(shop, manifest, "eval/curves.json")["test"]["predicted"]
    assert curves["true"] == pytest.approx(sorted(true.tolist()), rel=1e-5)
    card = shop.store.get_bytes(f"{manifest.prefix}/MODEL_CARD.md", max_bytes=1 << 20).decode()
    assert "Residuals (predicted minus true)" in card and "| rmse |" in card


@pytest.mark.parametrize("task", MAKERS)
def test_auto_takes_the_best_by_the_metric_whichever_way_it_points(shop: Workshop, task: str) -> None:
    train, _ = dataset(shop, task, rows=200, seed=5)
    test, _ = dataset(shop, task, rows=60, seed=6)
    record = Record()
    shop.register(job(shop, task, train, test, method="auto", epochs=2), record)
    evaluation = record.result["evaluation"]
    trained = [item["method"] for item in evaluation["methods"]]
    assert trained + [one["method"] for one in evaluation["left_out"]] == METHODS
    assert {one["reason"] for one in evaluation["left_out"]} <= {"cannot_be_told_apart"}
    by_method = {item["method"]: item["validation"][evaluation["metric"]] for item in evaluation["methods"]}
    pick = min if task == "text-regression" else max
    assert by_method[evaluation["chosen"]] == pick(by_method.values())
    for item in evaluation["methods"][2:]:
        entries = item["details"]["history"]
        best = next(entry for entry in entries if entry["step"] == item["details"]["best_step"])
        assert best[evaluation["metric"]] == pick(entry[evaluation["metric"]] for entry in entries)
    json.dumps(evaluation, allow_nan=False)


def test_the_probes_values_start_lora_where_the_probe_ended(shop: Workshop) -> None:
    train, _ = dataset(shop, "text-regression", rows=200, seed=7)
    test, _ = dataset(shop, "text-regression", rows=60, seed=8)
    record = Record()
    shop.register(job(shop, "text-regression", train, test, method="auto", learning_rate=1e-7, epochs=0.5), record)
    probe, lora = (record.result["evaluation"]["methods"][place]["validation"]["rmse"] for place in (1, 2))
    assert lora == pytest.approx(probe, rel=0.02)


def test_a_search_goes_down_for_an_error(shop: Workshop) -> None:
    train, _ = dataset(shop, "text-regression", rows=120, seed=9)
    test, _ = dataset(shop, "text-regression", rows=40, seed=10)
    record, space = Record(), {"learning_rate": [1e-6, 1e-2]}
    wanted = job(shop, "text-regression", train, test, method="lora", trials=3, space=space, epochs=1, pruner="none")
    shop.register(wanted, record)
    (method,) = record.result["evaluation"]["methods"]
    trials = method["details"]["search"]["trials"]
    best = min(trials, key=lambda trial: trial["value"])
    assert trials[method["details"]["search"]["best"]]["value"] == best["value"]
    assert method["validation"]["rmse"] == pytest.approx(best["value"])
    assert len({trial["value"] for trial in trials}) > 1


@pytest.mark.parametrize("task", MAKERS)
def test_a_better_version_takes_the_place_and_an_equal_one_does_not(shop: Workshop, task: str, tmp_path: Path) -> None:
    small, _ = dataset(shop, task, rows=40, seed=11)
    large, _ = dataset(shop, task, rows=400, seed=12)
    test, _ = dataset(shop, task, rows=300, seed=13)
    promoting = {"promote": "if_better", "method": "baseline"}
    weak = shop.register(job(shop, task, small, test, method="baseline"), Record(version=31))
    better = Record(version=32, standing=pointer(weak))
    strong = shop.register(job(shop, task, large, test, **promoting), better)
    promotion = better.result["evaluation"]["promotion"]
    found = {gate["gate"]: gate for gate in promotion["gates"]}
    assert found["paired_bootstrap"]["status"] == "passed" and found["paired_bootstrap"]["figures"]["rows"] > 250
    assert promotion["is_passed"] is True
    equal = Record(version=33, standing=pointer(strong))
    other, _ = dataset(shop, task, rows=400, seed=14)
    shop.register(job(shop, task, other, test, **promoting), equal)
    assert equal.result["evaluation"]["promotion"]["is_passed"] is False


def test_a_champion_of_another_task_is_not_beaten(shop: Workshop) -> None:
    labels, _ = dataset(shop, "text-multi-label", rows=100, seed=15)
    values, _ = dataset(shop, "text-regression", rows=100, seed=16)
    champion = shop.register(job(shop, "text-multi-label", labels, labels, method="baseline"), Record(version=41))
    record = Record(version=42, standing=pointer(champion))
    test, _ = dataset(shop, "text-regression", rows=60, seed=17)
    shop.register(job(shop, "text-regression", values, test, method="baseline", promote="if_better"), record)
    (gate, _) = record.result["evaluation"]["promotion"]["gates"]
    assert gate["status"] == "failed" and "is for text-multi-label" in gate["message"]


def test_a_minimum_error_is_reached_from_above(shop: Workshop) -> None:
    train, _ = dataset(shop, "text-regression", rows=200, seed=18)
    test, _ = dataset(shop, "text-regression", rows=60, seed=19)
    for least, is_passed in ((1000, True), (0.001, False)):
        record = Record(version=51)
        shop.register(job(shop, "text-regression", train, test, gate={"min_metric": least}), record)
        assert record.result["evaluation"]["promotion"]["is_passed"] is is_passed


@pytest.mark.parametrize(
    ("task", "options", "error"),
    [
        ("text-classification", {}, DatasetInvalid),
        ("text-regression", {}, DatasetInvalid),
        ("auto", {"method": "setfit"}, PlanError),
        ("auto", {"metric": "rmse"}, PlanError),
    ],
)
def test_lists_for_another_task_or_with_other_options_end_the_job(
    shop: Workshop, task: str, options: dict[str, Any], error: type[Exception]
) -> None:
    train, _ = dataset(shop, "text-multi-label", rows=60, seed=20)
    with pytest.raises(error):
        shop.register(job(shop, task, train, train, **options), Record())
