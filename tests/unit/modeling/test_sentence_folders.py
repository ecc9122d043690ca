"""Folders of sentence-transformers give the vectors that their files ask for, or are refused by name.

The reference is transformers in fp32, one text at a time, without padding, pooled by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, PreTrainedTokenizerFast

from model_registry.store import FileStore
from modeling.backbone import BACKBONE_FILE, Backbone, ingest
from modeling.checkpoints import write_encoder
from modeling.encoder import load_encoder
from modeling.engines.build import EngineOptions, EngineSpec, build_engine
from modeling.engines.protocol import Engine, EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.errors import ModelingError
from modeling.inputs import MODALITIES, open_preprocessor, single
from modeling.testing import write_tiny_checkpoint
from tests.support.exports import Exports

TEXTS = ["a good film", "The Plot was DULL, and the actor very bad", "a", "wheat and oil " * 30]
WIDTH = 32
Vector = np.ndarray[Any, Any]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "torch.nn.modules.activation.Tanh": torch.tanh,
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.ReLU": torch.relu,
    "torch.nn.modules.activation.GELU": torch.nn.functional.gelu,
}
TANH, IDENTITY, RELU, GELU = ACTIVATIONS
BY_HAND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.max(0).values,
    "mean": lambda states: states.mean(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "weightedmean": lambda states: torch.arange(1.0, len(states) + 1) @ states / sum(range(1, len(states) + 1)),
}


def write(folder: Path, name: str, document: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


def write_modules(folder: Path, *names: str) -> None:
    paths = [(name, "" if name == "Transformer" else f"{number}_{name}") for number, name in enumerate(names)]
    kinds = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{name}"} for i, (name, path) in enumerate(paths)
    ]
    write(folder, "modules.json", kinds)


def write_dense(folder: Path, number: int, sizes: tuple[int, int], activation: str, *, has_bias: bool = True) -> None:
    """A Dense module's two files."""
    draw = torch.Generator().manual_seed(number)
    tensors = {"linear.weight": torch.randn(sizes[::-1], generator=draw) / sizes[0] ** 0.5}
    if has_bias:
        tensors["linear.bias"] = torch.randn(sizes[1], generator=draw)
    config = {"in_features": sizes[0], "out_features": sizes[1], "bias": has_bias, "activation_function": activation}
    write(folder, f"{number}_Dense/config.json", config)
    save_file(tensors, folder / f"{number}_Dense" / "model.safetensors")


@torch.inference_mode()
def by_hand(
    folder: Path, modes: Sequence[str], *, prompt: str = "", dense: Sequence[int] = (), normalize: bool = False
) -> Vector:
    from safetensors.torch import load_file

    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    rows = []
    for text in TEXTS:
        encoded = tokenizer(prompt + text, truncation=True, max_length=66, return_tensors="pt")
        states = model(**encoded).last_hidden_state[0]
        vector = torch.cat([BY_HAND[mode](states) for mode in modes])
        for number in dense:
            tensors = load_file(folder / f"{number}_Dense" / "model.safetensors")
            config = json.loads((folder / f"{number}_Dense" / "config.json").read_text())
            vector = tensors["linear.weight"] @ vector + tensors.get("linear.bias", torch.zeros(1))
            vector = ACTIVATIONS[config["activation_function"]](vector)
        rows.append(vector / vector.norm() if normalize else vector)
    return torch.stack(rows).numpy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "plain", seed=5, initializer_range=0.1)


def taken(folder: Path) -> Backbone:
    return ingest(FileStore(folder.parent / "store"), folder, name="x", source="file:x")


def vectors(backbone: Backbone, engine: Engine | None = None, texts: Sequence[Any] = TEXTS) -> Vector:
    """As an embedding route answers, all texts in one batch."""
    rows = single(open_preprocessor(backbone).encode(texts))
    found = (engine or TorchEngine(backbone)).run(EngineBatch(rows)).pooled
    return found / np.linalg.norm(found, axis=1, keepdims=True) if backbone.info.normalize else found


def assert_same(found: Vector, wanted: Vector) -> None:
    cosines = (found * wanted).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1))
    assert cosines.min() >= 0.99999
    np.testing.assert_allclose(found, wanted, atol=1e-4)


LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ALL = list(LEGACY.values())


@pytest.mark.parametrize(
    ("pooling", "modes"),
    [
        *(({"pooling_mode": mode}, [mode]) for mode in ALL),
        *(({key: True}, [mode]) for key, mode in LEGACY.items()),
        ({"pooling_mode": ["max", "cls"]}, ["max", "cls"]),
        ({"pooling_mode": ["mean"]}, ["mean"]),
        (dict.fromkeys(LEGACY, True), ALL),
        (dict.fromkeys(LEGACY, False), ["mean"]),
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, ["max"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_pooling_and_combination(folder: Path, pooling: Any, modes: list[str], normalize: bool) -> None:
    write_modules(folder, "Transformer", "Pooling", *(["Normalize"] if normalize else []))
    write(folder, "1_Pooling/config.json", {"word_embedding_dimension": WIDTH, **pooling})
    backbone = taken(folder)
    assert (backbone.info.pooling, backbone.info.hidden_size) == ("+".join(modes), WIDTH * len(modes))
    assert_same(vectors(backbone), by_hand(folder, modes, normalize=normalize))


DENSE: dict[str, tuple[list[str], list[tuple[tuple[int, int], str, bool]]]] = {
    "tanh": (["mean"], [((WIDTH, 8), TANH, True)]),
    "identity without bias": (["cls"], [((WIDTH, 8), IDENTITY, False)]),
    "wider": (["lasttoken"], [((WIDTH, 100), RELU, True)]),
    "two": (["mean"], [((WIDTH, 16), GELU, True), ((16, 24), IDENTITY, True)]),
    "behind several": (["cls", "max"], [((2 * WIDTH, 8), TANH, True)]),
}


def write_dense_folder(folder: Path, name: str, *, normalize: bool = False) -> Vector:
    modes, layers = DENSE[name]
    write_modules(folder, "Transformer", "Pooling", *["Dense"] * len(layers), *(["Normalize"] if normalize else []))
    write(folder, "1_Pooling/config.json", {"pooling_mode": modes})
    for number, (sizes, activation, has_bias) in enumerate(layers, 2):
        write_dense(folder, number, sizes, activation, has_bias=has_bias)
    return by_hand(folder, modes, dense=range(2, 2 + len(layers)), normalize=normalize)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("normalize", [False, True])
def test_dense_layers_behind_the_pooling(folder: Path, name: str, normalize: bool) -> None:
    wanted = write_dense_folder(folder, name, normalize=normalize)
    backbone = taken(folder)
    assert backbone.info.hidden_size == wanted.shape[1]
    assert_same(vectors(backbone), wanted)
    assert_same(vectors(Backbone.open(backbone.folder)), wanted)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_pooling_and_dense_layers_are_in_the_graph(folder: Path, tmp_path: Path, exports: Exports, engine: str) -> None:
    write_modules(folder, "Transformer", "Pooling", "Dense")
    write(folder, "1_Pooling/config.json", {"pooling_mode": ALL})
    write_dense(folder, 2, (WIDTH * len(ALL), 8), TANH)
    backbone = taken(folder)
    files = exports(backbone, tmp_path / "graphs", has_adapters=False)
    opened = build_engine(EngineSpec(engine), backbone, files, EngineOptions(threads=1))
    assert_same(vectors(backbone, opened), by_hand(folder, ALL, dense=[2]))


def test_a_fine_tune_keeps_layers_and_prompts(folder: Path, tmp_path: Path) -> None:
    write_dense_folder(folder, "behind several")
    write(folder, "config_sentence_transformers.json", {"prompts": {"q": "good: "}, "default_prompt_name": "q"})
    backbone = taken(folder)
    info = backbone.info
    own = write_encoder(
        tmp_path / "full",
        load_encoder(backbone.folder),
        like=backbone.folder,
        name="x",
        source="x",
        pooling=info.pooling,
        normalize=False,
        prompts=backbone.prompts,
    )
    assert (own.info.hidden_size, own.prompts) == (8, {"query": "", "document": "", "q": "good: "})
    np.testing.assert_array_equal(vectors(Backbone.open(own.folder)), vectors(backbone))


# --- prompts -------------------------------------------------------------------------------------------------------


PROMPTS = {"query": "the good plot: ", "document": "", "other": "bad: "}


def test_the_default_prompt_comes_before_every_text(folder: Path) -> None:
    digest = taken(folder).info.digest
    write(folder, "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": "query"})
    backbone = taken(folder)
    assert backbone.info.digest != digest
    assert_same(vectors(backbone), by_hand(folder, ["mean"], prompt=PROMPTS["query"]))
    prompted = MODALITIES["text"].with_prompt
    for name, prompt in PROMPTS.items():
        texts = [prompted(text, backbone.prompts[name]) for text in TEXTS]
        assert_same(vectors(backbone, texts=texts), by_hand(folder, ["mean"], prompt=prompt))


def test_a_prompt_comes_before_the_first_text_of_a_pair(folder: Path) -> None:
    write(folder, "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": "query"})
    rows = open_preprocessor(taken(folder)).encode([("a film", "dull"), (PROMPTS["query"] + "a film", "dull")])
    bare = open_preprocessor(taken(write_tiny_checkpoint(folder.parent / "bare"))).encode(
        [(PROMPTS["query"] + "a film", "dull")]
    )
    np.testing.assert_array_equal(single(rows)[0].arrays["input_ids"], single(bare)[0].arrays["input_ids"])


def test_prompts_that_are_used_only_by_name_change_no_digest(folder: Path) -> None:
    digest = taken(folder).info.digest
    write(folder, "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": None})
    first, again = taken(folder), taken(folder)  # the second time its source is known
    assert first.info.digest == again.info.digest == digest
    assert first.prompts == again.prompts == PROMPTS
    write(folder, "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": "document"})
    assert taken(folder).info.digest == digest


def test_a_plain_backbone_is_stored_as_it_was(folder: Path) -> None:
    """Older releases read its description, and engines know it by its digest."""
    backbone = taken(folder)
    assert sorted(path.name for path in backbone.folder.iterdir()) == [
        BACKBONE_FILE,
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert "prompts" not in (backbone.folder / BACKBONE_FILE).read_text()


def test_prompts_that_the_pooling_leaves_out_are_not_offered(folder: Path) -> None:
    write_modules(folder, "Transformer", "Pooling")
    write(folder, "1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False})
    write(folder, "config_sentence_transformers.json", {"prompts": PROMPTS})
    backbone = taken(folder)
    assert backbone.prompts == {}
    assert_same(vectors(backbone), by_hand(folder, ["mean"]))
    write(folder, "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": "query"})
    with pytest.raises(ModelingError, match="include_prompt"):
        taken(folder)


# --- what is refused -----------------------------------------------------------------------------------------------


def odd_dense(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "2_Dense" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(**values: torch.Tensor) -> Callable[[Path], None]:
    named = {name.replace("__", "."): value for name, value in values.items()}
    return lambda folder: save_file(named, folder / "2_Dense" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (odd_dense(activation_function="torch.nn.modules.activation.Softplus"), "Softplus"),
        (odd_dense(activation_function="os.system"), "os.system"),
        (odd_dense(use_residual=True), "use_residual"),
        (odd_dense(module_input_name="token_embeddings"), "module_input_name"),
        (odd_dense(out_features=9), "2_Dense"),
        (odd_dense(in_features=31), "2_Dense"),
        (tensors(linear__weight=torch.ones(8, WIDTH)), "2_Dense"),
        (tensors(linear__weight=torch.full((8, WIDTH), float("nan")), linear__bias=torch.ones(8)), "finite"),
        (lambda folder: (folder / "2_Dense" / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "2_Dense" / "model.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda folder: write(folder, "1_Pooling/config.json", {"pooling_mode": ["cls", "max"]}), "takes 32 values"),
        (lambda folder: write(folder, "1_Pooling/config.json", {"pooling_mode": "median"}), "median"),
        (lambda folder: write_modules(folder, "Transformer", "Dense"), "modules.json"),
        (lambda folder: write_modules(folder, "Transformer", "Pooling", "Normalize", "Dense"), "modules.json"),
        (lambda folder: write_modules(folder, "Transformer", "Pooling", "CNN"), "CNN"),
    ],
)
def test_layers_that_cannot_be_served_are_refused_by_name(
    folder: Path, change: Callable[[Path], None], says: str
) -> None:
    write_dense_folder(folder, "tanh")
    change(folder)
    with pytest.raises(ModelingError, match=says):
        taken(folder)
