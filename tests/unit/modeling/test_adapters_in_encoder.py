"""Encoders with added modules: written and loaded they answer the same on every engine, and the prompt stays inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model_registry.store import FileStore
from modeling.adapters_in_encoder import (
    Bottleneck,
    Composition,
    compose,
    own_weights,
    plain_weights,
)
from modeling.backbone import COMPOSITION_FILE, COMPOSITION_WEIGHTS, Backbone, ingest
from modeling.checkpoints import write_encoder
from modeling.encoder import load_encoder
from modeling.engines.build import EngineOptions, EngineSpec, build_engine
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.errors import BackboneUnavailable
from modeling.export import export_graphs
from modeling.inputs import Features
from modeling.testing import write_tiny_checkpoint
from tests.support.rows import encoded_texts

KINDS = [Composition("bottleneck", 4), Composition("prompt", 3)]
TEXTS = ["good film", "a very dull and bad story of the actor", "it was not great"]


def encoded(backbone: Backbone) -> list[Features]:
    return encoded_texts(backbone.folder, TEXTS, limit=32)


def trained(backbone: Backbone, composition: Composition) -> torch.nn.Module:
    """As if trained: the added weights are moved away from where they start."""
    torch.manual_seed(0)
    encoder = compose(load_encoder(backbone.folder), composition)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in encoder.state_dict().items():
            if name in own_weights(encoder):
                value.add_(torch.randn(value.shape, generator=draw) * 0.3)
    return encoder.eval()


def written(backbone: Backbone, composition: Composition, folder: Path) -> Backbone:
    return write_encoder(
        folder,
        trained(backbone, composition),
        like=backbone.folder,
        name="tiny",
        source="a test",
        pooling=backbone.info.pooling,
        normalize=False,
        max_length=32,
        composition=composition,
    )


@pytest.mark.parametrize("composition", KINDS, ids=lambda kind: kind.kind)
def test_loaded_it_answers_as_it_did_and_not_as_the_plain_one(
    backbone: Backbone, composition: Composition, tmp_path: Path
) -> None:
    own = written(backbone, composition, tmp_path)
    rows = encoded(backbone)
    answers = TorchEngine(own).run(EngineBatch(rows)).pooled
    encoder = trained(backbone, composition)
    for row, item in enumerate(rows):
        ids, types = (
            torch.from_numpy(array)[None] for array in (item.arrays["input_ids"], item.arrays["token_type_ids"])
        )
        with torch.inference_mode():
            states = encoder(ids, torch.ones_like(ids), token_type_ids=types).last_hidden_state
        assert states.shape[1] == item.cost, "virtual tokens must not come out"
        np.testing.assert_allclose(answers[row], states[0].mean(0).numpy(), atol=1e-5)
    assert np.abs(answers - TorchEngine(backbone).run(EngineBatch(rows)).pooled).max() > 0.01
    assert own.info.digest != backbone.info.digest


@pytest.mark.parametrize("composition", KINDS, ids=lambda kind: kind.kind)
def test_the_exported_graph_answers_the_same(backbone: Backbone, composition: Composition, tmp_path: Path) -> None:
    own = written(backbone, composition, tmp_path / "own")
    files = export_graphs(own, tmp_path / "graphs", has_adapters=False)
    rows = encoded(backbone)
    engine = build_engine(EngineSpec("onnx"), own, files, EngineOptions(threads=1))
    np.testing.assert_allclose(
        engine.run(EngineBatch(rows)).pooled, TorchEngine(own).run(EngineBatch(rows)).pooled, atol=1e-4
    )


@pytest.mark.parametrize("composition", KINDS, ids=lambda kind: kind.kind)
def test_padding_changes_nothing(backbone: Backbone, composition: Composition, tmp_path: Path) -> None:
    engine = TorchEngine(written(backbone, composition, tmp_path))
    rows = encoded(backbone)
    alone = np.concatenate([engine.run(EngineBatch([row])).pooled for row in rows])
    np.testing.assert_allclose(engine.run(EngineBatch(rows)).pooled, alone, atol=1e-5)


@pytest.mark.parametrize(
    "model_type", ["albert", "bert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"]
)
def test_bottlenecks_find_their_places_in_every_encoder_and_start_as_nothing(tmp_path: Path, model_type: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / model_type, model_type=model_type)
    plain, ids = load_encoder(folder), torch.tensor([[2, 7, 9, 3]])
    with torch.inference_mode():
        before = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.clone()
        composed = compose(plain, Composition("bottleneck", 4))
        after = composed(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(before, after)
    count = sum(isinstance(module, Bottleneck) for module in composed.modules())
    assert count == (2 if model_type == "albert" else 4), "one behind attention and one behind the feed-forward"
    assert set(plain_weights(composed)) >= set(load_encoder(folder).state_dict())


@pytest.mark.parametrize("model_type", ["albert", "bert", "distilbert", "electra", "mpnet", "roberta"])
def test_prompts_stand_before_the_text_in_every_encoder(tmp_path: Path, model_type: str) -> None:
    encoder = compose(
        load_encoder(write_tiny_checkpoint(tmp_path / model_type, model_type=model_type)), Composition("prompt", 5)
    ).eval()
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.inference_mode():
        first = encoder(ids, torch.ones_like(ids)).last_hidden_state.clone()
        encoder.get_parameter("prompt").mul_(-3)
        second = encoder(ids, torch.ones_like(ids)).last_hidden_state
    assert first.shape == second.shape == (1, 4, first.shape[2])
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / COMPOSITION_WEIGHTS).unlink(),
        lambda folder: (folder / COMPOSITION_WEIGHTS).write_bytes(b"short"),
        lambda folder: (folder / COMPOSITION_FILE).write_text('{"kind": "code", "size": 4}'),
        lambda folder: (folder / COMPOSITION_FILE).write_text('{"kind": "bottleneck", "size": 5}'),
        lambda folder: (folder / COMPOSITION_FILE).write_text('{"kind": "bottleneck", "size": 1e9}'),
        lambda folder: (folder / COMPOSITION_FILE).write_text("[]"),
    ],
)
def test_a_broken_composition_is_refused_and_never_served_without(
    backbone: Backbone, tmp_path: Path, damage: object
) -> None:
    own = written(backbone, KINDS[0], tmp_path)
    assert callable(damage)
    damage(own.folder)
    with pytest.raises(BackboneUnavailable):
        load_encoder(own.folder)


def test_taken_into_a_store_it_keeps_what_was_added(backbone: Backbone, tmp_path: Path) -> None:
    own = written(backbone, KINDS[0], tmp_path / "own")
    stored = ingest(FileStore(tmp_path / "store"), own.folder, name="copy", source="file:own")
    rows = encoded(backbone)
    np.testing.assert_array_equal(
        TorchEngine(stored).run(EngineBatch(rows)).pooled, TorchEngine(own).run(EngineBatch(rows)).pooled
    )
