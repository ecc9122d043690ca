"""What the files of sentence-transformers say beside a checkpoint: pooling, dense layers, lengths and prompts.

Each setting that changes answers is read as sentence-transformers 6 reads it, or refused by name. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from modeling.errors import BackboneUnavailable, UnsupportedArchitecture
from modeling.heads import Activation, DenseLayer
from modeling.ingestion.base import POOLING_MODES, Pooling, read_json

_SETTINGS_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# One letter a module: a Transformer, its Pooling, Dense layers, and Normalize at the end; dropout does nothing here.
_LETTERS: Final = {"Transformer": "T", "Pooling": "P", "Dense": "D", "Dropout": "X", "Normalize": "N"}
_SERVED_ORDER: Final = re.compile(r"T?(P[DX]*)?X*N?X*")
_ORDER_IN_WORDS: Final = "Transformer, Pooling, Dense and Normalize of sentence_transformers, in this order,"
# In the order in which their vectors are joined.
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Settings of a Transformer module that change its answers, with the one value that is served; others must be empty.
_SETTINGS = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
_FREE_SETTINGS = frozenset({"max_seq_length", "do_lower_case", "unpad_inputs"})
_TOKENIZER_SETTINGS = ("processor_kwargs", "tokenizer_args")  # of which the length alone is served
_ACTIVATIONS: dict[str, Activation] = {"Identity": "linear", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}
_DENSE_KEYS = frozenset({"in_features", "out_features", "bias", "activation_function"})
_DENSE_SETTINGS = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
_MODEL_FILE, _OTHER_MODELS = (
    "config_sentence_transformers.json",
    ("CrossEncoder", "SparseEncoder", "MultiVectorEncoder"),
)
_MOST_PROMPTS, _LONGEST_PROMPT = 256, 10_000


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """How a vector is made of an encoder's states. `normalize` comes last."""

    pooling: Pooling = "mean"
    dense: tuple[DenseLayer, ...] = ()
    normalize: bool = False
    includes_prompt: bool = True

    def width(self, hidden_size: int) -> int:
        """Return the vector's width. Raises `BackboneUnavailable` if the layers do not fit the states or each other."""
        width = hidden_size * len(self.pooling.split("+"))
        for number, layer in enumerate(self.dense):
            if layer.weight.shape[1] != width:
                raise BackboneUnavailable(
                    f"Dense layer {number} takes {layer.weight.shape[1]} values and is given {width}; save it again"
                )
            width = layer.weight.shape[0]
        return width


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts by name, and the one that is used if a request names none."""

    by_name: Mapping[str, str] = field(default_factory=dict)
    default: str = ""


def unserved(file: str, found: Any, served: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"{file} asks for {json.dumps(found)[:200]}, which cannot be served; {served} can. Take another checkpoint, or "
        "correct the file if it is wrong"
    )


def transformer_settings(folder: Path) -> dict[str, Any]:
    """The settings of the Transformer module: of the first file that has any. Raises `UnsupportedArchitecture` for one
    that changes answers and is not served."""
    settings = next(filter(None, (read_json(folder / name, {}) for name in _SETTINGS_FILES)), {})
    odd = {key: value for key, value in settings.items() if value and value != _SETTINGS.get(key)}
    for name in _TOKENIZER_SETTINGS:
        given = dict(odd.pop(name, {}))
        if "model_max_length" in given:
            settings = settings | {"max_seq_length": given.pop("model_max_length")}
        odd |= {name: given} if given else {}
    if odd.keys() - _FREE_SETTINGS:
        raise unserved("sentence_bert_config.json", odd, "an encoder without settings of its own")
    return settings


def read_plan(folder: Path) -> VectorPlan:
    """What `modules.json` and the folders that it names make of the states. A plain encoder gets the mean.

    Raises `BackboneUnavailable`, and `UnsupportedArchitecture` for what is computed otherwise here.
    """
    modules = [(str(module.get("type")), str(module.get("path", ""))) for module in _modules(folder)]
    names = [type_.rpartition(".")[2] for type_, _ in modules]
    letters = "".join(_LETTERS.get(name, "?") for name in names)
    if not _SERVED_ORDER.fullmatch(letters) or any(not type_.startswith("sentence_transf") for type_, _ in modules):
        raise unserved("modules.json", [type_ for type_, _ in modules], _ORDER_IN_WORDS)
    plan = VectorPlan()
    for name, (_, path) in zip(names, modules, strict=True):
        plan = _with_module(plan, name, folder, path)
    return plan


def _modules(folder: Path) -> list[dict[str, Any]]:
    return read_json(folder / "modules.json", [])


def _with_module(plan: VectorPlan, name: str, folder: Path, path: str) -> VectorPlan:
    if name == "Transformer" and path not in {"", "."}:
        raise unserved("modules.json", path, "a Transformer whose files are beside modules.json")
    if name == "Pooling":
        config = _config(folder, path)
        return VectorPlan(_pooling(config, path), includes_prompt=config.get("include_prompt", True) is not False)
    if name == "Dense":
        dense = (*plan.dense, _dense(folder, path))
        return VectorPlan(plan.pooling, dense, includes_prompt=plan.includes_prompt)
    if name == "Normalize":
        config = _config(folder, path, may_lack=True)
        _refuse_odd(f"{path}/config.json", config, _DENSE_SETTINGS)
        return VectorPlan(plan.pooling, plan.dense, True, plan.includes_prompt)
    return plan


def _config(folder: Path, path: str, *, may_lack: bool = False) -> dict[str, Any]:
    config = read_json(folder / path / "config.json", {}) if re.fullmatch(r"[\w-]{1,40}", path) else {}
    if not config and not may_lack:
        raise BackboneUnavailable(f"modules.json names {path[:40]!r}, but there is no {path[:40]}/config.json; add it")
    return config


def _refuse_odd(place: str, config: Mapping[str, Any], served: Mapping[str, Any]) -> None:
    odd = {key: value for key, value in config.items() if value and value != served.get(key)}
    if odd:
        raise unserved(place, odd, json.dumps(served))


def _pooling(config: Mapping[str, Any], path: str) -> Pooling:
    given = config.get("pooling_mode") or [mode for key, mode in _LEGACY_MODES.items() if config.get(key)] or "mean"
    modes: Sequence[Any] = [given] if isinstance(given, str) else given
    if any(mode not in POOLING_MODES for mode in modes) or len(modes) > len(POOLING_MODES):
        raise unserved(f"{path}/config.json", {"pooling_mode": given}, f"each of {', '.join(POOLING_MODES)} once")
    return "+".join(modes)


def _dense(folder: Path, path: str) -> DenseLayer:
    config = _config(folder, path)
    others = {key: value for key, value in config.items() if key not in _DENSE_KEYS}
    _refuse_odd(f"{path}/config.json", others, _DENSE_SETTINGS)
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if not name.startswith("torch.nn.") or name.rpartition(".")[2] not in _ACTIVATIONS:
        raise unserved(f"{path}/config.json", {"activation_function": name}, f"one of {', '.join(_ACTIVATIONS)}")
    weight, bias = _dense_tensors(folder / path, has_bias=config.get("bias", True) is not False)
    wanted = (config.get("out_features"), config.get("in_features"))
    if weight.shape != wanted or bias.shape != weight.shape[:1]:
        raise BackboneUnavailable(
            f"{path}: config.json says {wanted}, the tensors have {weight.shape} and {bias.shape}; save it again"
        )
    return DenseLayer(weight, bias, _ACTIVATIONS[name.rpartition(".")[2]])


def _dense_tensors(folder: Path, *, has_bias: bool) -> tuple[Any, Any]:
    """float32 weight and bias. Raises `BackboneUnavailable`."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise BackboneUnavailable(
            f"{folder.name} has no model.safetensors; pickled weights are never loaded, convert them"
        )
    try:
        tensors = {key: np.asarray(value, dtype=np.float32) for key, value in load_file(file).items()}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise BackboneUnavailable(f"{folder.name}/model.safetensors cannot be read; save it again") from error
    wanted = {"linear.weight", "linear.bias"} if has_bias else {"linear.weight"}
    if tensors.keys() != wanted or not all(np.isfinite(value).all() for value in tensors.values()):
        raise BackboneUnavailable(
            f"{folder.name}/model.safetensors must hold {', '.join(sorted(wanted))} alone, all finite; save it again"
        )
    weight = tensors["linear.weight"]
    return weight, tensors.get("linear.bias", np.zeros(weight.shape[:1], np.float32))


def read_prompts(folder: Path, *, includes_prompt: bool) -> Prompts:
    """The folder's prompts. Those whose tokens the pooling leaves out are not served: without a default one they are
    left out, with one the folder is refused. Raises `BackboneUnavailable`, `UnsupportedArchitecture`."""
    document = read_json(folder / _MODEL_FILE, {})
    if document.get("model_type") in _OTHER_MODELS:  # they are not meant for an encoder
        return Prompts()
    by_name = dict(document.get("prompts") or {})
    texts = [text for text in (*by_name, *by_name.values()) if text is not None]
    if len(by_name) > _MOST_PROMPTS or any(not isinstance(t, str) or len(t) > _LONGEST_PROMPT for t in texts):
        raise BackboneUnavailable(
            f"{_MODEL_FILE}: prompts must be at most {_MOST_PROMPTS} texts of at most {_LONGEST_PROMPT} characters"
        )
    by_name = {name: text or "" for name, text in by_name.items()}
    default_name = document.get("default_prompt_name")
    if default_name is not None and default_name not in {"query", "document", *by_name}:
        raise BackboneUnavailable(f"{_MODEL_FILE}: default_prompt_name {default_name!r} is none of its prompts; add it")
    default = "" if default_name is None else by_name.get(default_name, "")
    if not includes_prompt and default:
        raise unserved(_MODEL_FILE, {"default_prompt_name": default_name}, "pooling with include_prompt")
    is_used = includes_prompt and any(by_name.values())
    return Prompts({"query": "", "document": ""} | by_name if is_used else {}, default)
