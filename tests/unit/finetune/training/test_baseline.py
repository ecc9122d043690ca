"""The baseline's features: words, runs of characters or both, stored and served as they were trained."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from finetune.evaluation.tasks import rules_of
from finetune.jobs.hyperparameters import Hyperparameters
from finetune.jobs.link import SilentLink
from finetune.jobs.plan import DatasetProfile, WorkerProfile, resolve
from finetune.training.methods import baseline
from finetune.training.run_context import Rows, Run
from modeling.errors import WeightsInvalid
from modeling.inputs.text import TextInput
from modeling.linear_text import VOCABULARY_NAME, LinearText

CHINESE = ("服务很好令人满意", "水壶坏了不能用")


def run_of(texts: Sequence[str], labels: Sequence[int], held_out: int, work: Path) -> Run:
    plan = resolve(
        Hyperparameters(method="baseline"),
        data=DatasetProfile(train_rows=9, validation_rows=9, test_rows=9, labels=2, max_length_p99=9),
        worker=WorkerProfile(),
        parameters=1,
        model_max_length=128,
    )
    numbers = np.arange(len(texts))
    targets = rules_of(plan.task).encode([(str(label),) for label in labels], [], ("0", "1"))
    sides = [
        Rows(list(texts[part]), targets[part], numbers[part])
        for part in (slice(held_out, None), slice(0, held_out), slice(0, 0))
    ]
    train, validation, test = sides
    return Run(
        train,
        validation,
        test,
        labels=("0", "1"),
        plan=plan,
        backbone=cast(Any, None),
        link=SilentLink(),
        work_dir=work,
    )


def unspaced(count: int) -> tuple[list[str], list[int]]:
    draw = random.Random(0)
    labels = [number % 2 for number in range(count)]
    return [f"{CHINESE[label]}{chr(draw.randint(0x4E00, 0x4FFF))}" for label in labels], labels


def spaced(count: int) -> tuple[list[str], list[int]]:
    draw = random.Random(0)
    labels = [number % 2 for number in range(count)]
    words = ("lovely fine great good".split(), "dull poor bad awful".split())
    return [" ".join([*draw.choices(words[label], k=3), f"film{draw.random()}"]) for label in labels], labels


@pytest.mark.parametrize(
    ("rows", "features"), [(unspaced(80), {"characters", "words and characters"}), (spaced(80), {"words"})]
)
def test_characters_are_taken_where_words_do_not_suffice(
    tmp_path: Path, rows: tuple[list[str], list[int]], features: set[str]
) -> None:
    run = run_of(*rows, held_out=20, work=tmp_path)
    candidate = baseline.train(run)
    assert candidate.details["features"] in features
    assert run.score(candidate.validation_logits) > 0.9


@pytest.mark.parametrize("texts", [["😀 🎉", "💔"], ["1 2", "3"], ["a b", "c"], ["。。", "！？"]])
def test_texts_without_a_word_have_characters_alone(tmp_path: Path, texts: list[str]) -> None:
    candidate = baseline.train(run_of(texts * 20, [0, 1] * 20, held_out=8, work=tmp_path))
    assert candidate.details["features"] == "characters"


@pytest.mark.parametrize("kind", ["words", "characters", "words and characters"])
def test_what_is_stored_answers_as_what_was_trained(tmp_path: Path, kind: str) -> None:
    texts, labels = spaced(60)
    run = run_of(texts, labels, held_out=20, work=tmp_path)
    space = baseline._Space.of(texts, ("words", "characters"))
    model = space.model(kind, *baseline._solved(run, space.of_kind(kind), np.array(labels), 1.0))
    for name, content in model.files().items():
        (tmp_path / name).write_bytes(content)
    others: list[TextInput] = [*texts, "", "unknown 😀 lovelyness", "Ünïcode " * 3000, ("a lovely", "pair")]
    again = LinearText.read(tmp_path)
    np.testing.assert_array_equal(again.margins(others), model.margins(others))
    parts = [space.transformed(part, others) for part in baseline._KINDS[kind]]
    expected: Any = baseline._stacked(parts) @ model.weight.T + model.bias
    np.testing.assert_allclose(model.margins(others), expected, atol=1e-5)
    schema = json.loads((tmp_path / VOCABULARY_NAME).read_bytes())["schema"]
    assert schema == (1 if kind == "words" else 2), "words alone are read by earlier releases too"


@pytest.mark.parametrize("damage", [{"characters": []}, {"characters": {"terms": ["ab"]}}, {"terms": 3}])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    model = LinearText(
        ("a",), np.ones(3, np.float32), np.ones((2, 3), np.float32), np.zeros(2, np.float32), ("ab", "bc")
    )
    for name, content in model.files().items():
        (tmp_path / name).write_bytes(content)
    vocabulary = json.loads((tmp_path / VOCABULARY_NAME).read_bytes())
    (tmp_path / VOCABULARY_NAME).write_text(json.dumps({**vocabulary, **damage}))
    with pytest.raises(WeightsInvalid):
        LinearText.read(tmp_path)


def test_of_a_long_text_runs_are_made_of_its_beginning(tmp_path: Path) -> None:
    texts, labels = spaced(60)
    run = run_of(texts, labels, held_out=20, work=tmp_path)
    space = baseline._Space.of(texts, ("words", "characters"))
    model = space.model("characters", *baseline._solved(run, space.of_kind("characters"), np.array(labels), 1.0))
    start = "x" * model.characters_read
    one, other = model.margins([start, start + " lovely" * 1000])
    np.testing.assert_array_equal(one, other)
