"""Versions that answer entities behind the whole application: from a head, an adapter, a baseline and an import."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerFast

from model_registry.db import Database
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.backbone import ingest
from modeling.encoder import load_encoder
from modeling.errors import UnsupportedArchitecture
from modeling.heads import softmax
from modeling.inputs.words import find_words
from modeling.linear_tokens import FEATURES, LinearTokens
from modeling.multi_lora import Routing, route
from modeling.networks import NETWORKS
from modeling.tasks.tagging import decode
from modeling.testing import write_tiny_checkpoint
from tests.integration.test_served_tasks import ServedWorld, imported
from tests.support.adapters import random_adapter
from tests.support.world import World

TASK = "token-classification"
TYPES = ("LOC", "PER")
LONG = " ".join(f"a good film number {number}, and a dull plot 😀" for number in range(40))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    database = Database(f"sqlite:///{folder / 'registry.db'}")
    migrate(database)
    store = FileStore(folder / "store")
    backbone = ingest(store, write_tiny_checkpoint(folder / "tiny"), name="tiny", source="file:tiny")
    made = World(Registry(database), store, backbone, folder)
    made.publish("names", TYPES, seed=1, task=TASK)
    made.publish("pooled", ("a", "b"), seed=2)
    layout = route(load_encoder(backbone.folder), Routing(), NETWORKS["text"])
    made.publish("names-lora", TYPES, seed=3, task=TASK, adapter=random_adapter(layout, rank=4, seed=1))
    draw = np.random.default_rng(4)
    weight = draw.normal(size=(5, FEATURES)).astype(np.float32)
    made.publish_linear("names-words", TYPES, LinearTokens.of(weight, np.zeros(5, np.float32)), task=TASK)
    yield made
    database.dispose()


@pytest.fixture(scope="module")
def served(world: World) -> Iterator[ServedWorld]:
    with closing(ServedWorld(world)) as app:
        yield app


def entities(served: ServedWorld, model: str, text: str, **parameters: Any) -> list[dict[str, Any]]:
    (row,) = served.rows(model, [text], **parameters)
    assert set(row) == {"index", "entities"}
    found: list[dict[str, Any]] = row["entities"]
    return found


@pytest.mark.parametrize("name", ["names", "names-lora", "names-words"])
@pytest.mark.parametrize("text", ["a good film", LONG, "  Ada\u0301 went\tto 東京 😀😀 ok", "!"])
def test_an_entity_is_what_the_text_has_between_its_offsets(served: ServedWorld, name: str, text: str) -> None:
    found = entities(served, name, text)
    assert all(one["text"] == text[one["start"] : one["end"]] and one["text"].strip() for one in found)
    assert all(set(one) == {"start", "end", "label", "score", "text"} for one in found)
    assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(found))
    assert {one["label"] for one in found} <= set(TYPES)
    assert all(0 < one["score"] <= 1 for one in found)
    utf16 = entities(served, name, text, offset_unit="utf16")
    units = text.encode("utf-16-le")
    assert [units[2 * one["start"] : 2 * one["end"]].decode("utf-16-le") for one in utf16] == [
        one["text"] for one in found
    ]
    assert len(found) > 0 or len(text) < 12


def test_a_long_text_is_read_in_windows_and_nothing_is_cut(served: ServedWorld) -> None:
    found = entities(served, "names", LONG, truncate=False)
    assert found and found[-1]["end"] > len(LONG) * 0.9
    assert found == entities(served, "names", LONG)


def test_the_baseline_answers_what_its_weights_say(world: World, served: ServedWorld) -> None:
    model = LinearTokens.read(world.store.local_path("models/default/names-words/1"))
    (logits,) = model.margins([LONG])
    words = find_words(LONG)
    wanted = [
        (int(words[run.first, 0]), int(words[run.stop - 1, 1]), TYPES[run.type]) for run in decode(softmax(logits))
    ]
    assert [(one["start"], one["end"], one["label"]) for one in entities(served, "names-words", LONG)] == wanted


def test_every_aggregation_of_hugging_face_is_understood(served: ServedWorld) -> None:
    by_name = {
        name: entities(served, "names", LONG, aggregation_strategy=name)
        for name in ("none", "simple", "first", "average", "max")
    }
    assert by_name["first"] == entities(served, "names", LONG)
    assert {one["label"] for one in by_name["none"]} <= {f"{prefix}-{type_}" for prefix in "BI" for type_ in TYPES}
    for found in by_name.values():
        assert found and all(one["text"] == LONG[one["start"] : one["end"]] for one in found)
    refused = served.predict("names", "a", aggregation_strategy="best")
    assert refused.status == 422 and "aggregation_strategy" in refused.document["detail"]


def test_a_threshold_leaves_out_what_is_less_sure(served: ServedWorld) -> None:
    found = entities(served, "names", LONG)
    middle = sorted(one["score"] for one in found)[len(found) // 2]
    assert entities(served, "names", LONG, threshold=middle) == [one for one in found if one["score"] >= middle]


def test_what_means_nothing_is_refused_by_name(served: ServedWorld) -> None:
    for model, parameter, value in (
        ("names", "top_k", 1),
        ("pooled", "aggregation_strategy", "first"),
        ("pooled", "offset_unit", "utf16"),
    ):
        refused = served.predict(model, "a good film", **{parameter: value})
        assert (refused.status, refused.document["code"]) == (422, "invalid_request")
        assert parameter in refused.document["detail"]
    refused = served.predict("names", [["a text", "and another"]])
    assert (refused.status, refused.document["code"]) == (422, "invalid_request")
    assert "input 0 is a pair" in refused.document["detail"]
    refused = served.predict("names-words", [["a text", "and another"]])
    assert refused.status == 422 and "is a pair" in refused.document["detail"]


def test_rows_of_both_kinds_in_one_request_s_batch_do_not_change_answers(served: ServedWorld) -> None:
    alone = served.rows("pooled", ["a good film"])
    entities(served, "names", LONG)
    assert served.rows("pooled", ["a good film"]) == alone


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def checkpoint(world: World, name: str, tags: list[str], model_type: str = "bert") -> Path:
    folder = write_tiny_checkpoint(world.folder / name, model_type=model_type)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = AutoModelForTokenClassification.from_pretrained(
        str(folder), id2label=dict(enumerate(tags)), label2id={tag: i for i, tag in enumerate(tags)}
    )
    model.save_pretrained(str(folder))
    assert tokenizer is not None
    return folder


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_an_imported_checkpoint_tags_as_transformers_does(world: World, model_type: str) -> None:
    folder = checkpoint(world, f"ner-{model_type}", TAGS, model_type)
    imported(world, f"ner-{model_type}", folder)
    text = "a good film and a dull plot"
    model = AutoModelForTokenClassification.from_pretrained(str(folder)).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    encoded.pop("token_type_ids", None) if model_type != "bert" else None
    with torch.inference_mode():
        logits = model(**encoded).logits[0].numpy()
    best = softmax(logits).argmax(1)
    wanted = [
        (start, end, TAGS[tag])
        for (start, end), tag in zip(offsets, best.tolist(), strict=True)
        if end > start and TAGS[tag] != "O"
    ]
    with closing(ServedWorld(world)) as app:
        assert app.ask("/models", b"", method="GET").status == 200
        found = entities(app, f"ner-{model_type}", text, aggregation_strategy="none")
        listed = {one["id"]: one for one in app.ask("/models", b"", method="GET").document["data"]}
    assert [(one["start"], one["end"], one["label"]) for one in found] == wanted
    assert listed[f"ner-{model_type}"]["task"] == TASK and listed[f"ner-{model_type}"]["labels"] == ["PER", "LOC"]


def test_tags_without_a_beginning_are_read_as_insides(world: World) -> None:
    imported(world, "insides", checkpoint(world, "insides", ["I-PER", "O", "I-LOC"]))
    with closing(ServedWorld(world)) as app:
        found = entities(app, "insides", "a good film and a dull plot")
        pieces = entities(app, "insides", "a good film and a dull plot", aggregation_strategy="simple")
    assert {one["label"] for one in found} <= {"PER", "LOC"} and pieces == found


def test_tags_that_mean_no_entities_are_refused_by_name(world: World) -> None:
    with pytest.raises(UnsupportedArchitecture, match="only a model whose tags are O, B-TYPE and I-TYPE"):
        imported(world, "odd", checkpoint(world, "odd", ["NOUN", "VERB", "O"]))


def test_the_document_has_the_answer(served: ServedWorld) -> None:
    document = served.ask("/openapi.json", b"", method="GET").document
    assert json.dumps(document["components"]["schemas"]["Entities"]).count("entities")
