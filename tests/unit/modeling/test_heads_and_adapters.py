"""Heads and adapters: files that are refused, and LoRA rows that come out as PEFT itself computes them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling import weights
from modeling.adapters import CONFIG_NAME, WEIGHTS_NAME, Adapter
from modeling.backbone import Backbone
from modeling.encoder import load_encoder
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine, pool
from modeling.errors import AdapterMismatch, WeightsInvalid
from modeling.heads import DenseLayer, LayerNorm, TaskHead, softmax
from tests.support.rows import encoded_texts

TEXTS = ["a good film", "dull plot and a bad actor", "wheat", "the movie was not very good and it was dull"]


def head(sizes: list[int], seed: int = 0) -> TaskHead:
    draw = np.random.default_rng(seed)
    layers = [
        DenseLayer(draw.normal(size=(b, a)).astype(np.float32), draw.normal(size=b).astype(np.float32), "tanh")
        for a, b in itertools.pairwise(sizes)
    ]
    return TaskHead(tuple(layers))


def test_a_head_comes_back_from_its_file_unchanged(tmp_path: Path) -> None:
    original = TaskHead(head([8, 6, 3]).layers, normalize=True)
    (tmp_path / "head.safetensors").write_bytes(original.to_bytes())
    read = TaskHead.read(tmp_path / "head.safetensors", temperature=2.0)
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_array_equal(read.logits(x), original.logits(x))
    assert (read.input_size, read.labels, read.normalize, read.temperature) == (8, 3, True, 2.0)
    np.testing.assert_allclose(read.probabilities(read.logits(x)).sum(1), 1, atol=1e-6)


def test_a_norm_is_torchs_and_comes_back_from_its_file(tmp_path: Path) -> None:
    path, draw = tmp_path / "head.safetensors", np.random.default_rng(2)
    weight, bias = (draw.normal(size=6).astype(np.float32) for _ in range(2))
    first, last = head([8, 6, 3]).layers
    original = TaskHead((replace(first, norm=LayerNorm(weight, bias, 1e-5)), last))
    path.write_bytes(original.to_bytes())
    x = draw.normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_array_equal(TaskHead.read(path).logits(x), original.logits(x))
    plain, normed = torch.from_numpy(first(x)), replace(first, norm=LayerNorm(weight, bias, 1e-5))(x)
    wanted = torch.nn.functional.layer_norm(plain, (6,), torch.from_numpy(weight), torch.from_numpy(bias), 1e-5)
    np.testing.assert_allclose(normed, wanted.numpy(), atol=1e-5)
    for wrong in (LayerNorm(weight[:5], bias, 1e-5), LayerNorm(weight, bias, -1.0)):
        path.write_bytes(TaskHead((replace(first, norm=wrong), last)).to_bytes())
        with pytest.raises(WeightsInvalid, match="norm of layer 0"):
            TaskHead.read(path)


def test_heads_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    good = head([8, 3]).to_bytes()
    matrix, bias = np.ones((3, 8), np.float32), np.ones(3, np.float32)
    spoiled: dict[str, bytes] = {
        "truncated": good[:-3],
        "empty": b"",
        "header too long": b"\xff" * 8 + good[8:],
        "not safetensors": b"PK\x03\x04" + good,
        "nan": weights.to_bytes({"0.weight": matrix * np.nan, "0.bias": bias}, {"activations": "linear"}),
        "missing bias": weights.to_bytes({"0.weight": matrix}, {"activations": "linear"}),
        "unknown activation": weights.to_bytes({"0.weight": matrix, "0.bias": bias}, {"activations": "eval"}),
        "unused tensor": weights.to_bytes({"0.weight": matrix, "0.bias": bias, "x": bias}, {"activations": "linear"}),
        "wrong bias": weights.to_bytes(
            {"0.weight": matrix, "0.bias": np.ones(4, np.float32)}, {"activations": "linear"}
        ),
        "misfit": weights.to_bytes(
            {
                "0.weight": matrix,
                "0.bias": bias,
                "1.weight": np.ones((2, 4), np.float32),
                "1.bias": np.ones(2, np.float32),
            },
            {"activations": "tanh,linear"},
        ),
    }
    for name, content in spoiled.items():
        path.write_bytes(content)
        with pytest.raises(WeightsInvalid):
            TaskHead.read(path)
            raise AssertionError(f"{name} was read")


def test_softmax_is_stable() -> None:
    np.testing.assert_allclose(softmax(np.asarray([[1e4, 0.0], [-1e4, 0.0]], np.float32)), [[1, 0], [0, 1]])


@pytest.fixture(scope="module")
def peft_model(backbone: Backbone) -> Any:
    from peft import LoraConfig, get_peft_model

    encoder = load_encoder(backbone.folder)
    targets = [name for name, module in encoder.named_modules() if isinstance(module, torch.nn.Linear)]
    model = get_peft_model(encoder, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(peft_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp("adapter")
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    return Adapter.read(folder)


def encode(backbone: Backbone) -> Any:
    return encoded_texts(backbone.folder, TEXTS, limit=32)


def test_an_adapter_runs_as_peft_runs_it(backbone: Backbone, peft_model: Any, adapter: Adapter) -> None:
    engine, encoded = TorchEngine(backbone), encode(backbone)
    engine.load_adapter("a", adapter)
    ours = engine.run(EngineBatch(encoded, ["a"] * 4)).pooled
    bare = engine.run(EngineBatch(encoded)).pooled
    assert np.abs(ours - bare).max() > 0.05, "an adapter that changes nothing would prove nothing"
    for row, item in enumerate(encoded):
        ids = torch.from_numpy(item.arrays["input_ids"])[None]
        with torch.inference_mode():
            states = peft_model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state
            expected = pool(states, torch.ones_like(ids), "mean")[0].numpy()
        np.testing.assert_allclose(ours[row], expected, atol=2e-5)


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"modules_to_save": ["x"]}, {"rank_pattern": {"a": 1}}, {"r": None}]
)
def test_adapters_of_other_kinds_are_refused(peft_model: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    peft_model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    config = json.loads((tmp_path / CONFIG_NAME).read_text()) | change
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(AdapterMismatch):
        Adapter.read(tmp_path)


def test_stray_tensors_in_an_adapter_are_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    (tmp_path / WEIGHTS_NAME).write_bytes(weights.to_bytes({"classifier.weight": np.ones((2, 2), np.float32)}))
    with pytest.raises(AdapterMismatch):
        Adapter.read(tmp_path)


def test_the_mean_over_many_tokens_does_not_overflow_in_fp16() -> None:
    states = torch.full((1, 512, 2), 200.0, dtype=torch.float16)
    assert torch.equal(pool(states, torch.ones(1, 512, dtype=torch.int64), "mean"), torch.full((1, 2), 200.0))


def test_a_head_is_written_the_same_to_the_byte_each_time(tmp_path: Path) -> None:
    made = head([5, 4, 3])
    written = {made.to_bytes() for _ in range(40)}
    assert len(written) == 1
    (tmp_path / "head.safetensors").write_bytes(written.pop())
    read = TaskHead.read(tmp_path / "head.safetensors")
    for one, other in zip(read.layers, made.layers, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)
        assert one.activation == other.activation
