"""Versions of every task behind the whole application: answered alike by the short way and by the framework, alone and
in one batch, from a head on the backbone and from a baseline."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from model_registry.db import Database
from model_registry.errors import InvalidReference
from model_registry.migrations import migrate
from model_registry.refs import ModelRef
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.assemble import REFERENCE_STATS
from modeling.backbone import ingest
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.heads import TaskHead
from modeling.intake import IntakeLimits
from modeling.linear_text import LinearText
from modeling.tasks import Options
from modeling.testing import write_tiny_checkpoint
from modeling.weights import FloatArray
from service.api.deps import Services
from service.inference.capacity import AdmissionController
from service.inference.predictor import Predictor
from service.model_import import ModelImports
from tests.support.asgi import STEADY_FOLDER, Answered, AppUnderTest
from tests.support.rows import encoded_texts
from tests.support.world import World

PROMPT = "the good plot: "
LONG_WAY = {"content-type": "application/json; way=long"}
TEXTS = ["a good film", "dull plot and a very bad actor", "wheat and oil", "the"]
LABELS = ("sport", "money", "art")
THRESHOLDS = (0.4, 0.6, 0.5)
HISTOGRAM = {"edges": [-10.0, -1.0, 0.0, 1.0, 10.0], "counts": [1, 3, 4, 2]}


class ServedWorld(AppUnderTest):
    """The application over a pool that holds what the world published."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.services: Services
        super().__init__()

    @asynccontextmanager
    async def _build(self) -> AsyncIterator[Services]:
        unused: Any = SimpleNamespace()
        admission = AdmissionController(max_inputs=100, max_queue_delay_s=60)
        async with self.world.pool(metrics=self.metrics) as pool:
            await pool.apply(self.world.registry.snapshot())
            predictor = Predictor(admission, self.metrics, max_inputs=50, preprocessor_threads=1)
            try:
                self.services = Services(
                    settings=self.settings,
                    pool=pool,
                    predictor=predictor,
                    watcher=unused,
                    registry=self.world.registry,
                    removal=unused,
                    jobs=unused,
                    datasets=unused,
                    intake=unused,
                    imports=unused,
                    store=self.world.store,
                    metrics=self.metrics,
                    drain=self.drain,
                    events=unused,
                    backbones={"tiny": self.world.backbone},
                    folder=STEADY_FOLDER,
                )
                yield self.services
            finally:
                predictor.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """On the application's own event loop."""
        return self._runner.run(work)

    def predict(self, model: str, inputs: Any, **parameters: Any) -> Answered:
        """By both ways, which must not differ."""
        body = json.dumps({"model": model, "inputs": inputs, "parameters": parameters}).encode()
        short, long = self.ask("/predict", body), self.ask("/predict", body, headers=LONG_WAY)
        assert short.status == long.status
        if short.status == 200:
            assert short.document["predictions"] == long.document["predictions"]
        else:
            fresh = {"request_id": ""}
            assert short.document | fresh == long.document | fresh
        return short

    def rows(self, model: str, inputs: Any = TEXTS, **parameters: Any) -> list[dict[str, Any]]:
        answered = self.predict(model, inputs, **parameters)
        assert answered.status == 200, answered.body
        found: list[dict[str, Any]] = answered.document["predictions"]
        return found


def _with_reference(folder: Path) -> None:
    (folder / REFERENCE_STATS).write_text(json.dumps({"rows": 9, "value_histogram": HISTOGRAM}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    database = Database(f"sqlite:///{folder / 'registry.db'}")
    migrate(database)
    store = FileStore(folder / "store")
    checkpoint = write_tiny_checkpoint(folder / "tiny")
    (checkpoint / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": PROMPT}}))
    backbone = ingest(store, checkpoint, name="tiny", source="file:tiny")
    made = World(Registry(database), store, backbone, folder)
    made.publish("one", LABELS, seed=1)
    made.publish("many", LABELS, seed=2, task="text-multi-label", thresholds=THRESHOLDS)
    made.publish("value", seed=3, task="text-regression", spoil=_with_reference)
    made.publish_baseline("many-words", LABELS, seed=4, task="text-multi-label", thresholds=THRESHOLDS)
    made.publish_baseline("value-words", seed=5, task="text-regression")
    yield made
    database.dispose()


@pytest.fixture(scope="module")
def served(world: World) -> Iterator[ServedWorld]:
    with closing(ServedWorld(world)) as app:
        yield app


def logits(world: World, name: str) -> FloatArray:
    """As the version's files give them, without the server."""
    folder = world.store.local_path(f"models/default/{name}/1")
    if name.endswith("-words"):
        return LinearText.read(folder).margins(TEXTS)
    encoded = encoded_texts(world.backbone.folder, TEXTS, limit=32)
    return TaskHead.read(folder / "head.safetensors").logits(
        TorchEngine(world.backbone).run(EngineBatch(encoded)).pooled
    )


def sigmoid(x: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-x)), dtype=np.float32)


@pytest.mark.parametrize("name", ["many", "many-words"])
def test_several_labels(world: World, served: ServedWorld, name: str) -> None:
    expected = sigmoid(logits(world, name))
    rows = served.rows(name)
    for row, wanted in zip(rows, expected, strict=True):
        assert set(row) == {"index", "labels", "scores"}
        scores = {item["label"]: item["score"] for item in row["scores"]}
        assert [scores[label] for label in LABELS] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert row["labels"] == [label for label in scores if scores[label] >= THRESHOLDS[LABELS.index(label)]]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert 0 < sum(len(row["labels"]) for row in rows) < len(rows) * len(LABELS)  # or thresholds would show nothing


def test_a_threshold_and_top_k_of_the_request(served: ServedWorld) -> None:
    assert all(row["labels"] == [] for row in served.rows("many", threshold=1.0))
    for full, cut in zip(served.rows("many", threshold=0.0), served.rows("many", top_k=1, threshold=0.0), strict=True):
        assert full["labels"] == cut["labels"] == [item["label"] for item in full["scores"]]
        assert cut["scores"] == full["scores"][:1]


@pytest.mark.parametrize("name", ["value", "value-words"])
def test_values(world: World, served: ServedWorld, name: str) -> None:
    rows = served.rows(name)
    assert [set(row) for row in rows] == [{"index", "value"}] * 4
    assert [row["value"] for row in rows] == pytest.approx(logits(world, name)[:, 0].tolist(), rel=1e-4, abs=1e-5)
    assert len({row["value"] for row in rows}) > 1


@pytest.mark.parametrize("parameter", ["top_k", "threshold"])
def test_what_means_nothing_for_a_value_is_refused_by_name(served: ServedWorld, parameter: str) -> None:
    refused = served.predict("value", "a good film", **{parameter: 1})
    assert (refused.status, refused.document["code"]) == (422, "invalid_request")
    assert parameter in refused.document["detail"]
    assert refused.document["errors"][0]["loc"] == ["body", "parameters", parameter]


@pytest.mark.parametrize("name", ["one", "many", "value"])
def test_vectors_are_those_of_the_embeddings_route(served: ServedWorld, name: str) -> None:
    row = served.rows(name, TEXTS[:1], return_embedding=True)[0]
    answered = served.ask("/v1/embeddings", json.dumps({"model": name, "input": TEXTS[:1]}).encode())
    assert answered.status == 200
    np.testing.assert_allclose(answered.document["data"][0]["embedding"], row["embedding"], rtol=1e-5, atol=1e-6)
    assert len(row["embedding"]) == 32


@pytest.mark.parametrize("name", ["many-words", "value-words"])
def test_a_baseline_has_no_vectors_to_give(served: ServedWorld, name: str) -> None:
    embedding = json.dumps({"model": name, "input": TEXTS}).encode()
    for refused in (
        served.predict(name, TEXTS, return_embedding=True),
        served.ask("/v1/embeddings", embedding),
    ):
        assert refused.status == 422, refused.body
        assert f"{name} is a baseline over words and has no embeddings" in refused.body.decode()
    assert served.predict(name, TEXTS).status == 200


def test_models_tell_what_may_be_asked_of_them(served: ServedWorld) -> None:
    listed = {model["id"]: model["capabilities"] for model in served.ask("/models", b"", method="GET").document["data"]}
    can = {name: (found["labels"], found["embedding"]) for name, found in listed.items()}
    assert can == {
        "tiny": (False, True),
        "one": (True, True),
        "many": (True, True),
        "value": (False, True),
        "many-words": (True, False),
        "value-words": (False, False),
    }
    assert {found["input"] for found in listed.values()} == {"text"}
    for name, capabilities in listed.items():
        one = served.ask(f"/models/{name}", b"", method="GET").document
        assert one["capabilities"] == capabilities
        assert one["task"] == capabilities["task"]
        asked = json.dumps({"model": name, "input": "a"}).encode()
        assert served.ask("/v1/embeddings", asked).status == (200 if capabilities["embedding"] else 422)


def test_many_texts_are_embedded_in_parts_by_one_version(served: ServedWorld) -> None:
    """The predictor takes 50 inputs at once and admits 100."""
    texts = [f"{TEXTS[number % 4]} {number}" for number in range(230)]
    body = {"model": "one", "input": texts, "encoding_format": None, "dimensions": None, "user": None}
    answered = served.ask("/v1/embeddings", json.dumps(body).encode())
    assert answered.status == 200, answered.body[:300]
    data = answered.document["data"]
    assert [row["index"] for row in data] == list(range(230))
    for number in (0, 49, 50, 229):
        alone = served.ask("/v1/embeddings", json.dumps({"model": "one", "input": texts[number]}).encode())
        np.testing.assert_allclose(data[number]["embedding"], alone.document["data"][0]["embedding"], atol=1e-5)
    assert answered.document["usage"]["prompt_tokens"] > 230
    texts[123] = " "
    refused = served.ask("/v1/embeddings", json.dumps({"model": "one", "input": texts}).encode())
    assert (refused.status, "input 123 is empty" in refused.body.decode()) == (400, True)
    assert served.ask("/v1/embeddings", json.dumps({"model": "one", "input": ["a"] * 2049}).encode()).status == 413
    assert served.predict("one", ["a"] * 51).status == 413


def test_tasks_in_one_batch_answer_as_alone(served: ServedWorld) -> None:
    names = ["one", "many", "value", "many", "one", "value"]
    alone = [served.rows(name) for name in names]

    async def together() -> list[tuple[Any, int]]:
        services = served.services
        work = [
            services.predictor.predict(
                await services.pool.find("default", ModelRef.parse(name)),
                TEXTS,
                Options(),
                deadline=time.monotonic() + 30,
            )
            for name in names
        ]
        return [(result.answers, result.batch_rows) for result in await asyncio.gather(*work)]

    mixed = served.run(together())
    assert max(rows for _, rows in mixed) > len(TEXTS)  # or nothing was mixed
    for one, (other, _) in zip(alone, mixed, strict=True):
        for a, b in zip(one, other, strict=True):
            if "value" in a:
                assert b.value == pytest.approx(a["value"], rel=1e-4, abs=1e-5)
                continue
            assert (a.get("labels") or a.get("label")) == (getattr(b, "labels", None) or getattr(b, "label", None))
            scores = {score.label: score.score for score in b.scores}
            assert {item["label"]: item["score"] for item in a["scores"]} == pytest.approx(scores, abs=1e-5)


def test_models_tell_their_task(served: ServedWorld) -> None:
    listed = served.ask("/models", b"", method="GET").document["data"]
    found = {model["id"]: (model["task"], model["labels"]) for model in listed}
    assert found["many"] == ("text-multi-label", list(LABELS))
    assert found["value"] == ("text-regression", [])
    assert found["one"] == ("text-classification", list(LABELS))
    version = served.ask("/models/value/versions/1", b"", method="GET").document
    assert version["task"] == "text-regression"


def test_answers_are_counted_under_their_task(served: ServedWorld) -> None:
    before = served.metrics.registry.get_sample_value
    labels = {"model": "value", "version": "1", "task": "text-regression", "tenant": "default"}
    count = before("polyhead_prediction_quantile_count", labels) or 0
    served.rows("value")
    assert before("polyhead_prediction_quantile_count", labels) == count + 2 * len(TEXTS)
    assert before("polyhead_requests_total", labels | {"code": "200"})
    words = {"model": "value-words", "version": "1", "task": "text-regression", "tenant": "default"}
    served.rows("value-words")
    assert before("polyhead_prediction_quantile_count", words) == 0  # it brought no reference


def test_a_name_stands_for_one_task(world: World) -> None:
    with pytest.raises(InvalidReference, match="text-regression"):
        world.publish("value", LABELS, task="text-multi-label")
    world.registry.check_task(tenant="default", name="value", task="text-regression")
    world.registry.check_task(tenant="default", name="new", task="text-regression")


# Import


def imported(world: World, name: str, checkpoint: Path) -> None:
    limits = IntakeLimits(memory_bytes=4 << 30, timeout_s=120)
    imports = ModelImports(
        world.registry,
        world.store,
        import_root=checkpoint.parent,
        is_offline=True,
        limits=limits,
        stop=threading.Event(),
    )
    asyncio.run(imports.run(name, checkpoint.name, tenant="default", actor="test"))


@pytest.mark.parametrize(
    ("labels", "problem", "task"),
    [
        (["x", "y", "z"], "multi_label_classification", "text-multi-label"),
        (["only"], "regression", "text-regression"),
        (["only"], None, "text-regression"),
        (["only"], "multi_label_classification", "text-multi-label"),
        (["x", "y"], None, "text-classification"),
    ],
)
def test_a_published_checkpoint_answers_as_transformers_does(
    world: World, labels: list[str], problem: str | None, task: str
) -> None:
    name = f"imported-{len(labels)}-{problem or 'none'}".replace("_", "-")
    checkpoint = write_tiny_checkpoint(world.folder / name, labels=labels, seed=7, problem_type=problem)
    imported(world, name, checkpoint)
    with closing(ServedWorld(world)) as app:
        rows = app.rows(name)
        assert app.run(app.services.pool.find("default", ModelRef(name))).metric_labels[2] == task
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"), pad_token="[PAD]")
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    function = "none" if task == "text-regression" else None
    classify: Any = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu")
    with torch.inference_mode():
        expected = classify(TEXTS, function_to_apply=function)
    for row, wanted in zip(rows, expected, strict=True):
        theirs = {item["label"]: item["score"] for item in wanted}
        if task == "text-regression":
            assert row["value"] == pytest.approx(theirs["only"], abs=1e-4)
            continue
        assert {item["label"]: item["score"] for item in row["scores"]} == pytest.approx(theirs, abs=1e-4)
        if task == "text-multi-label":
            assert set(row["labels"]) == {label for label, score in theirs.items() if score >= 0.5}


@pytest.mark.slow
def test_an_import_of_another_task_under_a_name_is_refused(world: World) -> None:
    checkpoint = write_tiny_checkpoint(world.folder / "one-output", labels=["only"])
    with pytest.raises(InvalidReference, match="another name"):
        imported(world, "many", checkpoint)


# Prompts of the backbone


@pytest.mark.parametrize("model", ["one", "many", "value", "tiny"])
def test_a_prompt_that_is_named_comes_before_each_input(served: ServedWorld, model: str) -> None:
    parameters = {"return_embedding": True}
    named = served.rows(model, TEXTS, prompt_name="query", **parameters)
    written = served.rows(model, [PROMPT + text for text in TEXTS], **parameters)
    assert named == written
    assert named != served.rows(model, TEXTS, **parameters)
    assert served.rows(model, TEXTS, prompt_name="document", **parameters) == served.rows(model, TEXTS, **parameters)


def test_a_prompt_can_be_named_where_openais_clients_ask(served: ServedWorld) -> None:
    def vectors(**fields: Any) -> list[Any]:
        answered = served.ask("/v1/embeddings", json.dumps({"model": "tiny", **fields}).encode())
        assert answered.status == 200, answered.body
        return [row["embedding"] for row in answered.document["data"]]

    assert vectors(input=TEXTS, prompt_name="query") == vectors(input=[PROMPT + text for text in TEXTS])
    assert vectors(input=TEXTS, prompt_name=None) == vectors(input=TEXTS)


@pytest.mark.parametrize(
    ("model", "says"), [("tiny", "its prompts are document, query"), ("value-words", "no prompts")]
)
def test_a_prompt_that_there_is_not_is_refused_by_name(served: ServedWorld, model: str, says: str) -> None:
    answered = served.predict(model, TEXTS, prompt_name="passage", return_embedding=model == "tiny")
    assert answered.status == 422
    assert "'passage'" in answered.document["detail"] and says in answered.document["detail"]
    assert served.ask("/models/tiny", b"", method="GET").document["prompts"] == ["document", "query"]
