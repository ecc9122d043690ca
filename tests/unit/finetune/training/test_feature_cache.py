"""Vectors on disk: what was kept comes back exactly, what is damaged counts as absent, and the budget holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.training.embedding import FrozenVectors, choose_engine, length_batches
from finetune.training.feature_cache import FeatureCache, content_key, space_name
from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest
from modeling.engines.device import DeviceFingerprint
from modeling.engines.protocol import EngineBatch, EngineOutputs
from modeling.engines.torch import TorchEngine
from modeling.inputs import Features
from modeling.inputs.text import Text, TextInput, TextPreprocessor
from modeling.testing import write_tiny_checkpoint
from modeling.weights import FloatArray
from tests.support.rows import encoded_texts, row_of

HIDDEN = 6
DEVICE = DeviceFingerprint("cpu", "EPYC", 2, ("avx2",), 0, "", "", {"torch": "2"})


def keys(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "little") for number in numbers]


def vectors(*numbers: int) -> FloatArray:
    return np.array([[number + at / 8 for at in range(HIDDEN)] for number in numbers], dtype=np.float32)


def known(cache: FeatureCache, *numbers: int, space: str = "s") -> tuple[list[bool], FloatArray]:
    found = np.zeros((len(numbers), HIDDEN), dtype=np.float32)
    return cache.fill(space, keys(*numbers), found).tolist(), found


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    return ingest(FileStore(tmp_path_factory.mktemp("store")), checkpoint, name="tiny", source="file:tiny")


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path, budget_bytes=1 << 20)


def test_what_was_kept_comes_back_for_the_rows_that_ask(cache: FeatureCache) -> None:
    cache.add("s", keys(1, 2, 3), vectors(1, 2, 3))
    cache.add("s", keys(7), vectors(7))
    is_known, found = known(cache, 3, 9, 7, 3)
    assert is_known == [True, False, True, True]
    np.testing.assert_array_equal(found[[0, 2, 3]], vectors(3, 7, 3))
    assert not found[1].any()


def test_another_space_knows_nothing(cache: FeatureCache) -> None:
    cache.add("s", keys(1), vectors(1))
    assert known(cache, 1, space="t")[0] == [False]
    assert (
        len({space_name(*given, ()) for given in (("d", "torch/fp32"), ("d", "torch/bf16"), ("e", "torch/fp32"))}) == 3
    )


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other"])
def test_a_damaged_file_counts_as_absent_and_goes(cache: FeatureCache, tmp_path: Path, damage: str) -> None:
    cache.add("s", keys(1, 2), vectors(1, 2))
    (path,) = tmp_path.glob("s/*")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    written = {"cut": data[:-5], "empty": b"", "flipped": data, "other": b"not safetensors at all"}[damage]
    path.write_bytes(bytes(written))
    is_known, found = known(cache, 1, 2)
    assert is_known == [False, False]
    assert not found.any()
    assert not path.exists()
    cache.add("s", keys(1, 2), vectors(1, 2))
    assert known(cache, 1, 2)[0] == [True, True]


def test_vectors_of_another_width_are_not_taken(cache: FeatureCache) -> None:
    cache.add("s", keys(1), np.ones((1, HIDDEN + 1), dtype=np.float32))
    assert known(cache, 1)[0] == [False]


def test_over_the_budget_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, budget_bytes=1500)
    for number in range(3):
        cache.add("s", keys(number), vectors(number))
        (newest,) = (path for path in tmp_path.glob("s/*") if path.stat().st_mtime > 1000)
        os.utime(newest, (number, number))
    size = newest.stat().st_size
    assert known(cache, 0)[0] == [True]  # used now, so no longer the oldest
    small = FeatureCache(tmp_path, budget_bytes=3 * size)
    small.add("s", keys(3), vectors(3))
    assert known(small, 0, 1, 2, 3)[0] == [True, False, True, True]


def test_a_disk_that_cannot_be_written_costs_nothing_but_the_cache(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a file where the folder should be")
    cache = FeatureCache(tmp_path, budget_bytes=1 << 20)
    cache.add("s", keys(1), vectors(1))
    assert known(cache, 1)[0] == [False]


def test_a_budget_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    FeatureCache(tmp_path / "none", budget_bytes=0).add("s", keys(1), vectors(1))
    assert not (tmp_path / "none").exists()


@given(st.text(max_size=40), st.text(max_size=40), st.sampled_from([None, 8, 80]), st.sampled_from([None, 8, 80]))
def test_a_key_stands_for_a_text_and_where_it_is_cut(one: str, other: str, cut: int | None, again: int | None) -> None:
    keys = [content_key(Text().content(text), cut_at=at) for text, at in ((one, cut), (other, again))]
    assert (keys[0] == keys[1]) == ((one, cut) == (other, again))


class CountingEngine(TorchEngine):
    rows = 0

    def run(self, batch: EngineBatch) -> EngineOutputs:
        self.rows += len(batch.inputs)
        return super().run(batch)


class CountingTokenizer(TextPreprocessor):
    texts = 0

    def encode(self, examples: Sequence[TextInput], **options: Any) -> list[list[Features]]:
        self.texts += len(examples)
        return super().encode(examples, **options)


Counted = tuple[FrozenVectors, CountingEngine, CountingTokenizer]


@pytest.fixture
def frozen(backbone: Backbone, tmp_path: Path) -> Callable[[], Counted]:
    """Vectors of a further job: what an earlier one has kept is there."""

    def build() -> Counted:
        made = FrozenVectors(backbone, cache=FeatureCache(tmp_path, budget_bytes=1 << 20))
        tokenizer = CountingTokenizer(backbone.folder, limit=backbone.info.max_length)
        made.__dict__ |= {"engine": (engine := CountingEngine(backbone)), "preprocessor": tokenizer}
        return made, engine, tokenizer

    return build


TEXTS = [f"good film {'very ' * (number % 7)}{chr(97 + number)}" for number in range(20)]


def computed(backbone: Backbone, texts: Sequence[str], *, max_length: int) -> FloatArray:
    return TorchEngine(backbone).run(EngineBatch(encoded_texts(backbone.folder, texts, limit=max_length))).pooled


def test_only_unknown_rows_are_computed_and_the_vectors_stay_the_same(
    backbone: Backbone, frozen: Callable[[], Counted]
) -> None:
    expected = computed(backbone, TEXTS, max_length=32)
    first, engine, _ = frozen()
    np.testing.assert_allclose(first.of(TEXTS[:15], max_length=32), expected[:15], atol=1e-6)
    assert engine.rows == 15
    second, engine, _ = frozen()
    np.testing.assert_allclose(second.of(TEXTS, max_length=32), expected, atol=1e-6)
    assert engine.rows == 5
    np.testing.assert_array_equal(second.of(TEXTS, max_length=32), first.of(TEXTS, max_length=32))


def test_known_texts_are_not_even_tokenised(frozen: Callable[[], Counted]) -> None:
    first, _, tokenizer = frozen()
    lengths = first.lengths(TEXTS)
    first.of(TEXTS, max_length=32)
    assert tokenizer.texts == 2 * len(TEXTS), "once to know the lengths, once to compute"
    again, engine, tokenizer = frozen()
    np.testing.assert_array_equal(again.lengths(TEXTS), lengths)
    again.of(TEXTS, max_length=32)
    assert (tokenizer.texts, engine.rows) == (0, 0)


def test_another_length_computes_what_it_cuts_and_nothing_else(
    backbone: Backbone, frozen: Callable[[], Counted]
) -> None:
    first, _, _ = frozen()
    first.of(TEXTS, max_length=32)
    for limit in (8, 7):
        cut = int((first.lengths(TEXTS) > limit).sum())
        assert 0 < cut < len(TEXTS)
        again, engine, _ = frozen()
        expected = computed(backbone, TEXTS, max_length=limit)
        np.testing.assert_allclose(again.of(TEXTS, max_length=limit), expected, atol=1e-6)
        assert engine.rows == cut


def test_a_text_cut_by_its_characters_counts_as_cut(backbone: Backbone, frozen: Callable[[], Counted]) -> None:
    spaced = ["good" + " " * 1000 + "film"]
    for limit in (8, 32):
        vectors, _, _ = frozen()
        expected = computed(backbone, spaced, max_length=limit)
        np.testing.assert_allclose(vectors.of(spaced, max_length=limit), expected, atol=1e-6)


def test_an_engine_that_does_not_open_gives_way_to_the_reference(backbone: Backbone, tmp_path: Path) -> None:
    opened: list[bool] = []
    vectors = FrozenVectors(backbone, "openvino/bf16", graphs=tmp_path / "gone", on_open=lambda: opened.append(True))
    texts = ["good film", "bad"]
    expected = computed(backbone, texts, max_length=32)
    for _ in range(2):
        np.testing.assert_allclose(vectors.of(texts, max_length=32), expected, atol=1e-6)
    assert vectors.engine_name == "torch/fp32" and opened == [True]


def row(chosen: str, name: str = "EPYC") -> dict[str, object]:
    device = {"kind": "cpu", "name": name, "cores": 2, "flags": ["avx2"], "memory_bytes": 0}
    device |= {"compute_capability": "", "driver": "", "libraries": {"torch": "2"}}
    return {"device": device, "chosen": chosen}


@pytest.mark.parametrize(
    ("measured", "has_graphs", "has_bf16", "engine"),
    [
        ([row("openvino/bf16")], True, True, "openvino/bf16"),
        ([row("openvino/bf16")], False, True, "torch/bf16"),
        ([row("torch/fp32")], True, True, "torch/fp32"),
        ([row("openvino/bf16", name="another")], True, False, "torch/fp32"),
        ([row("onnx/fp32"), row("openvino/bf16")], True, True, "onnx/fp32"),
        ([row("tensorrt/fp16")], True, True, "torch/bf16"),
        ([], True, False, "torch/fp32"),
    ],
)
def test_vectors_come_from_the_engine_that_serves_here(
    measured: list[dict[str, object]], has_graphs: bool, has_bf16: bool, engine: str
) -> None:
    assert choose_engine(measured, DEVICE, has_graphs=has_graphs, has_bf16=has_bf16) == engine


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(8, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], tokens: int) -> None:
    rows = [row_of(np.ones(n)) for n in lengths]
    batches = length_batches(rows, tokens=tokens)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens
