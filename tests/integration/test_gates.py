"""A candidate against a champion, both really trained: on words, so that who knows which word decides who is right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.training import parity
from finetune.training.promotion import read_champion
from finetune.training.run_context import Rows, Run
from model_registry.manifest import ModelManifest
from model_registry.store import FileStore
from modeling.assemble import read_version
from modeling.backbone import Backbone, ingest
from modeling.engines.graphs import graphs_key
from modeling.engines.onnx import onnx_engine
from modeling.engines.protocol import EngineOutputs
from modeling.testing import write_tiny_checkpoint
from tests.support.exports import Exports
from tests.support.registering import Record, Workshop, pointer

BOTH = {"up": ["great", "superb"], "down": ["bad", "awful"], "flat": ["dull", "grey"]}
FIRST = {label: words[:1] for label, words in BOTH.items()}
ROWS = {"up": 120, "down": 120, "flat": 120}
TEST = {"up": 60, "down": 60, "flat": 60}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("shop")
    store = FileStore(folder / "store")
    backbone = ingest(store, write_tiny_checkpoint(folder / "tiny"), name="tiny", source="file:tiny")
    return Workshop(store, backbone.folder, folder, graphs_root=folder / "graphs")


def champion_of(shop: Workshop, words: dict[str, list[str]], *, seed: int, version: int, **more: Any) -> ModelManifest:
    train, test = shop.dataset(words, ROWS, seed=seed), shop.dataset(BOTH, TEST, seed=seed + 1)
    return shop.register(shop.job(train, test, **more), Record(version=version))


@pytest.fixture(scope="module")
def weak(shop: Workshop) -> ModelManifest:
    """It has seen one of each label's two words."""
    return champion_of(shop, FIRST, seed=10, version=1)


def judged(
    shop: Workshop, champion: ModelManifest, train: Any, test: Any, **more: Any
) -> tuple[dict[str, Any], Record]:
    record = Record(version=champion.version + 1, standing=pointer(champion))
    shop.register(shop.job(train, test, promote="if_better", **more), record)
    promotion = record.result["evaluation"]["promotion"]
    return {gate["gate"]: gate for gate in promotion["gates"]} | {"is_passed": promotion["is_passed"]}, record


def test_a_better_candidate_passes_and_every_gate_is_told(shop: Workshop, weak: ModelManifest) -> None:
    train, test = shop.dataset(BOTH, ROWS, seed=20), shop.dataset(BOTH, TEST, seed=21)
    found, record = judged(shop, weak, train, test, gate={"min_metric": 0.8})
    assert found["is_passed"] is True
    figures = found["mcnemar"]["figures"]
    assert figures["rows"] == 180 and figures["only_candidate_right"] > 20 > figures["only_champion_right"]
    assert found["min_metric"]["status"] == found["class_drop"]["status"] == "passed"
    assert found["engine_parity"]["status"] == "skipped"
    assert [event["data"]["gate"] for event in record.of("gate_passed")] == [
        "min_metric",
        "mcnemar",
        "class_drop",
        "engine_parity",
    ]
    card = shop.store.get_bytes("models/default/m/2/MODEL_CARD.md", max_bytes=1 << 20).decode()
    assert "Gates, against version 1: all passed" in card and found["mcnemar"]["message"] in card


def test_an_equal_candidate_does_not(shop: Workshop, weak: ModelManifest) -> None:
    train, test = shop.dataset(FIRST, ROWS, seed=10), shop.dataset(BOTH, TEST, seed=31)
    found, record = judged(shop, weak, train, test)
    assert found["is_passed"] is False
    assert found["mcnemar"]["status"] == "failed"
    assert record.of("gate_failed")[0]["level"] == "warn"


def test_a_class_that_gets_worse_blocks_a_candidate_that_is_better_on_the_whole(shop: Workshop) -> None:
    knows_flat = {"up": FIRST["up"], "down": FIRST["down"], "flat": BOTH["flat"]}
    champion = champion_of(shop, knows_flat, seed=40, version=3)
    forgets_flat = {"up": BOTH["up"], "down": BOTH["down"], "flat": FIRST["flat"]}
    train, test = (
        shop.dataset(forgets_flat, ROWS, seed=42),
        shop.dataset(BOTH, TEST | {"up": 160, "down": 160}, seed=43),
    )
    found, _ = judged(shop, champion, train, test)
    assert found["mcnemar"]["status"] == "passed"
    assert found["class_drop"]["status"] == "failed" and found["class_drop"]["message"].startswith("flat loses")
    assert found["is_passed"] is False
    lenient, _ = judged(shop, champion, train, test, gate={"max_class_drop": 0.9})
    assert lenient["is_passed"] is True


def test_too_few_rows_fail_and_say_so(shop: Workshop, weak: ModelManifest) -> None:
    train, test = shop.dataset(BOTH, ROWS, seed=50), shop.dataset(BOTH, {"up": 3, "down": 3, "flat": 3}, seed=51)
    found, _ = judged(shop, weak, train, test)
    assert found["is_passed"] is False
    assert found["mcnemar"]["status"] == "failed" and "too few rows" in found["mcnemar"]["message"]
    assert "with fewer than 20 rows" in json.dumps(found["class_drop"]["figures"])


def test_rows_that_the_champion_was_trained_on_prove_nothing(shop: Workshop, weak: ModelManifest) -> None:
    train, seen = shop.dataset(BOTH, ROWS, seed=60), shop.dataset(FIRST, ROWS, seed=10)
    found, _ = judged(shop, weak, train, seen)
    assert found["mcnemar"]["status"] == "failed" and "no test row is new to both" in found["mcnemar"]["message"]
    assert found["mcnemar"]["figures"]["left_out"]["seen_by_champion"] == 360


def test_a_champion_that_hides_its_rows_or_is_damaged_is_not_beaten(shop: Workshop, weak: ModelManifest) -> None:
    train, test = shop.dataset(BOTH, ROWS, seed=70), shop.dataset(BOTH, TEST, seed=71)
    secretive = weak.model_copy(
        update={"files": tuple(file for file in weak.files if file.path != "data/fingerprint.json"), "version": 9}
    )
    source = shop.store.local_path(weak.prefix)
    for file in secretive.files:
        shop.store.put_file(f"{secretive.prefix}/{file.path}", source / file.path)
    shop.store.put_bytes(f"{secretive.prefix}/manifest.json", secretive.to_bytes())
    found, _ = judged(shop, secretive, train, test)
    assert "does not tell which rows" in found["mcnemar"]["message"] and found["is_passed"] is False

    shop.store.put_bytes(f"{secretive.prefix}/labels.json", b"[]")
    found, _ = judged(shop, secretive, train, test)
    assert "cannot be compared with" in found["mcnemar"]["message"] and found["is_passed"] is False


@pytest.mark.parametrize("promote", ["manual", "if_better"])
@pytest.mark.parametrize(("words", "is_reached"), [(FIRST, False), (BOTH, True)])
def test_the_first_version_only_has_the_minimum_to_reach(
    shop: Workshop, promote: str, words: dict[str, list[str]], is_reached: bool
) -> None:
    train, test = shop.dataset(words, ROWS, seed=80 + is_reached), shop.dataset(BOTH, TEST, seed=82)
    record = Record(version=11)
    shop.register(shop.job(train, test, promote=promote, gate={"min_metric": 0.95}), record)
    promotion = record.result["evaluation"]["promotion"]
    assert [gate["gate"] for gate in promotion["gates"]] == ["min_metric"]
    assert (promotion["champion"], promotion["is_passed"]) == (None, is_reached)


def test_nothing_is_judged_where_nothing_was_asked_for(shop: Workshop) -> None:
    train, test = shop.dataset(BOTH, ROWS, seed=85), shop.dataset(BOTH, TEST, seed=86)
    plain = Record(version=12)
    shop.register(shop.job(train, test), plain)
    assert plain.result["evaluation"]["promotion"] is None


# The champion as a server would run it


@pytest.mark.parametrize("method", ["linear_probe", "lora", "full"])
def test_a_champion_answers_as_its_golden_rows_say(shop: Workshop, method: str) -> None:
    manifest = champion_of(
        shop, BOTH, seed=90, version=20, method=method, **({} if method == "linear_probe" else {"epochs": 1})
    )
    parts = read_version(shop.store, manifest)
    found = read_champion(shop.store, bare_run(shop), pointer(manifest), tenant="default", name="m")
    logits = found.logits([row.example for row in parts.golden])
    np.testing.assert_allclose(logits, [row.logits for row in parts.golden], atol=1e-4)
    hashes = json.loads((shop.store.local_path(manifest.prefix) / "data" / "fingerprint.json").read_text())[
        "row_hashes"
    ]
    assert found.seen == frozenset({*hashes["train"], *hashes["validation"]}) and not found.seen & {*hashes["test"]}


def bare_run(shop: Workshop) -> Run:
    from finetune.jobs.hyperparameters import parse_hyperparameters
    from finetune.jobs.plan import DatasetProfile, WorkerProfile, resolve

    data = DatasetProfile(train_rows=1, validation_rows=1, test_rows=1, labels=3, max_length_p99=16)
    plan = resolve(
        parse_hyperparameters({}), data=data, worker=WorkerProfile(cpu_threads=1), parameters=1000, model_max_length=64
    )
    nothing = Rows([], np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Run(
        train=nothing,
        validation=nothing,
        test=nothing,
        labels=("down", "flat", "up"),
        plan=plan,
        backbone=Backbone.open(shop.backbone_folder),
        link=Record(),
        work_dir=shop.folder,
    )


# Engine parity


def parity_of(shop: Workshop, weak: ModelManifest, method: str) -> dict[str, Any]:
    train, test = shop.dataset(BOTH, ROWS, seed=100), shop.dataset(BOTH, TEST, seed=101)
    more = {} if method == "linear_probe" else {"epochs": 1}
    found, _ = judged(shop, weak, train, test, method=method, **more)
    gate: dict[str, Any] = found["engine_parity"]
    return gate


@pytest.fixture
def exported(shop: Workshop, exports: Exports) -> Path:
    assert shop.graphs_root is not None
    backbone = Backbone.open(shop.backbone_folder)
    return exports(backbone, shop.graphs_root / graphs_key(backbone.info.digest)).folder


def test_without_a_graph_parity_is_skipped_with_the_reason(shop: Workshop, weak: ModelManifest) -> None:
    gate = parity_of(replace(shop, graphs_root=shop.folder / "no-graphs"), weak, "linear_probe")
    assert gate["status"] == "skipped" and "no server has exported" in gate["message"]


@pytest.mark.parametrize("method", ["linear_probe", "lora", "full"])
def test_the_written_weights_answer_alike_on_the_graph(
    shop: Workshop, weak: ModelManifest, exported: Path, method: str
) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    gate = parity_of(shop, weak, method)
    assert gate["status"] == "passed", gate
    assert gate["figures"]["rows"] == 180 and gate["figures"]["least_cosine"] > 0.9999


def test_an_engine_that_answers_otherwise_fails(
    shop: Workshop, weak: ModelManifest, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")

    def broken(*args: Any, **options: Any) -> Any:
        engine = onnx_engine(*args, **options)
        run = engine.run
        monkeypatch.setattr(engine, "run", lambda batch: EngineOutputs(run(batch).pooled[:, ::-1].copy()))
        return engine

    monkeypatch.setattr(parity, "onnx_engine", broken)
    gate = parity_of(shop, weak, "linear_probe")
    assert gate["status"] == "failed" and gate["figures"]["least_cosine"] < 0.999
