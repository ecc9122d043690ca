"""Checkpoints with weights of their own: a full fine-tune, or a published classifier of sequences or of tokens.

Both become a backbone folder plus a head, so the server knows one way to run them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from model_registry.manifest import too_many_labels
from modeling.adapters_in_encoder import Composition, plain_weights, write_composition
from modeling.backbone import BACKBONE_FILE, Backbone, describe, info_bytes
from modeling.encoder import load_pretrained
from modeling.errors import CheckpointRefused, UnsupportedArchitecture
from modeling.heads import Activation, DenseLayer, LayerNorm, TaskHead
from modeling.ingestion import READERS, Pooling, modality_of, read_config
from modeling.ingestion.base import PROMPTS_FILE
from modeling.ingestion.text import prompts_document
from modeling.ingestion.text_audit import PROBES
from modeling.inputs.text import default_prompt
from modeling.proof import check_logits
from modeling.tasks import DEFAULT_MODALITY, Task, task_of_kind

# Where a sequence classifier of each model type keeps the layers between token state and logits.
_HEAD_LAYERS: dict[str, tuple[tuple[str, Activation], ...]] = {
    "albert": (("albert.pooler", "tanh"), ("classifier", "linear")),
    "bert": (("bert.pooler.dense", "tanh"), ("classifier", "linear")),
    "camembert": (("classifier.dense", "tanh"), ("classifier.out_proj", "linear")),
    "deberta-v2": (("pooler.dense", "gelu"), ("classifier", "linear")),
    "distilbert": (("pre_classifier", "relu"), ("classifier", "linear")),
    "electra": (("classifier.dense", "gelu"), ("classifier.out_proj", "linear")),
    "modernbert": (("head.dense", "gelu"), ("classifier", "linear")),
    "mpnet": (("classifier.dense", "tanh"), ("classifier.out_proj", "linear")),
    "nomic_bert": (("nomic_bert.pooler.dense", "tanh"), ("classifier", "linear")),
    "qwen3": (("score", "linear"),),
    "roberta": (("classifier.dense", "tanh"), ("classifier.out_proj", "linear")),
    "xlm-roberta": (("classifier.dense", "tanh"), ("classifier.out_proj", "linear")),
}
# The same of classifiers of tokens; of other model types `classifier` alone.
_TOKEN_HEAD_LAYERS: dict[str, tuple[tuple[str, Activation], ...]] = {
    "modernbert": (("head.dense", "gelu"), ("classifier", "linear")),
    "qwen3": (("score", "linear"),),
}
_OTHER_HEAD: Final = re.compile("For(?!(Text|Sequence|Token)Classification)[A-Z]")
_TOKEN_HEAD: Final = "ForTokenClassification"
_NEVER: Final = np.float32(-30.0)  # the logit of a tag that the checkpoint does not know
_NORMS = {"head.dense": "head.norm"}  # behind the activation


@dataclass(frozen=True, slots=True)
class ImportedClassifier:
    backbone: Backbone
    head: TaskHead
    task: Task
    labels: tuple[str, ...]


def write_encoder(
    target: Path,
    encoder: nn.Module,
    *,
    like: Path,
    name: str,
    source: str,
    pooling: Pooling,
    normalize: bool,
    max_length: int | None = None,
    composition: Composition | None = None,
    prompts: Mapping[str, str] | None = None,
) -> Backbone:
    """Writes `encoder` as a backbone folder, with the configuration, the other files and the limit of the folder
    `like`; `max_length` lowers the limit. `prompts` can be asked for by name.

    `composition` is what `modeling.adapters_in_encoder.compose` made it with, if it did.
    """
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    plain = encoder.state_dict() if composition is None else plain_weights(encoder)
    state = {key: value.detach().cpu().float().contiguous() for key, value in _untied(plain).items()}
    if composition is not None:
        write_composition(target, encoder, composition)
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    config = read_config(like)
    reader = READERS[modality_of(config)]
    original = reader.read(like, config, has_head=True)
    base, _ = describe(original, target, target, name=name, source=source)
    limit = min(max_length or original.max_length, base.max_length)
    info = replace(base, pooling=pooling, normalize=normalize, max_length=limit)
    (target / BACKBONE_FILE).write_bytes(info_bytes(info))
    if prompts:
        (target / PROMPTS_FILE).write_bytes(prompts_document(prompts, default_prompt(like)))
    return Backbone(info, target, prompts or {})


def _untied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor under the first of its names: transformers ties the others again."""
    firsts: dict[int, str] = {}
    return {name: tensor for name, tensor in state.items() if firsts.setdefault(tensor.data_ptr(), name) == name}


def import_classifier(folder: Path, target: Path, *, name: str, source: str) -> ImportedClassifier:
    """Takes a Hugging Face classifier of sequences or tokens apart into an encoder (written to `target`) and a head.

    The parts must reproduce the original's logits on probe rows, or nothing is imported. `problem_type` says the task.
    Raises `BackboneUnavailable`, `CheckpointRefused`, `ConfigRefused`, `UnsupportedArchitecture`, `GoldenRowsDiffer`.
    """
    original = _load_classifier(folder)
    of_tokens = _is_of_tokens(read_config(folder))
    outputs: list[int] | None = None
    if of_tokens:
        task = task_of_kind(DEFAULT_MODALITY, "token_labels")
        labels, outputs = tag_types(_names(original.config))
        head = _with_outputs(_extract_head(original, _token_layers(original.config.model_type)), outputs)
    else:
        task = _task(original.config)
        labels = _labels(original.config, task)
        head = _extract_head(original, _HEAD_LAYERS[original.config.model_type])
    original.base_model.pooler = None
    backbone = write_encoder(
        target,
        original.base_model,
        like=folder,
        name=name,
        source=source,
        pooling="mean" if of_tokens else _pooling(original.config),
        normalize=False,
    )
    del original
    READERS[backbone.info.modality].check(folder, backbone)
    check_logits(_load_classifier(folder), backbone, head, PROBES, outputs=outputs)
    return ImportedClassifier(backbone, head, task, labels)


def _load_classifier(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = read_config(folder)
    modality_of(config)
    _check_head(config.get("architectures") or [])
    if _is_of_tokens(config):
        return load_pretrained(AutoModelForTokenClassification, folder, is_whole=True)
    if config["model_type"] not in _HEAD_LAYERS:
        raise UnsupportedArchitecture(
            f"a classifier of model_type {config['model_type']!r} cannot be imported: transformers runs its decoder "
            "too; use its encoder as a backbone and train a head"
        )
    return load_pretrained(AutoModelForSequenceClassification, folder, is_whole=True)


def _check_head(architectures: Any) -> None:
    """Raise for heads of another kind: those that label tokens have tensors of the same names and shapes."""
    others = [str(name) for name in architectures if _OTHER_HEAD.search(str(name))]
    if others:
        raise UnsupportedArchitecture(
            f"config.json: architectures names {others[0][:60]}, which classifies neither texts nor tokens; only a "
            "model for sequence or token classification can be imported"
        )


def _is_of_tokens(config: Mapping[str, Any]) -> bool:
    return any(str(name).endswith(_TOKEN_HEAD) for name in config.get("architectures") or [])


def _token_layers(model_type: str) -> tuple[tuple[str, Activation], ...]:
    return _TOKEN_HEAD_LAYERS.get(model_type, (("classifier", "linear"),))


def tag_types(names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Return the types of entities that a checkpoint's tags name, and where each of our outputs is among its own: O,
    then the beginning and the inside of each type. -1: it has no such tag.

    Raises `UnsupportedArchitecture` for other tags than O, B- and I-.
    """
    names = [
        name[:2] + name[2:].strip() if name[:2] in {"B-", "I-"} else name.strip() for name in map(str.strip, names)
    ]
    place = {name: index for index, name in enumerate(names)}
    others = [name for name in names if name != "O" and not (name[:2] in {"B-", "I-"} and name[2:].strip())]
    if "O" not in place or others or len(place) < max(2, len(names)):
        raise UnsupportedArchitecture(
            "config.json: only a model whose tags are O, B-TYPE and I-TYPE can be imported; id2label has "
            f"{', '.join(others[:5])[:200] or ', '.join(names[:5])[:200]}"
        )
    types = tuple(dict.fromkeys(name[2:] for name in names if name != "O"))
    return types, [place["O"], *(place.get(f"{prefix}-{type_}", -1) for type_ in types for prefix in "BI")]


def _with_outputs(head: TaskHead, outputs: Sequence[int]) -> TaskHead:
    """The head with its last layer's outputs in this order; those that it lacks are never the answer."""
    *below, last = head.layers
    rows = np.asarray(outputs)
    weight, bias = last.weight[np.maximum(rows, 0)], last.bias[np.maximum(rows, 0)]
    weight[rows < 0], bias[rows < 0] = 0.0, _NEVER
    return TaskHead((*below, DenseLayer(weight, bias, last.activation)), normalize=head.normalize)


def _task(config: Any) -> Task:
    """What the checkpoint was trained for, as transformers reads it: by `problem_type`, and where there is none, one
    output is a value and several are labels of which one is right."""
    outputs, problem = config.num_labels, config.problem_type
    kind = None
    if problem == "multi_label_classification":
        kind = "multi_label"
    elif outputs == 1 and problem in (None, "regression"):
        kind = "regression"
    elif outputs > 1 and problem in (None, "single_label_classification"):
        kind = "single_label"
    if kind is not None:
        return task_of_kind(DEFAULT_MODALITY, kind)
    raise UnsupportedArchitecture(
        f"problem_type {problem} with {outputs} outputs cannot be imported; regression has one output, a classifier "
        "with one label a text at least two"
    )


def _labels(config: Any, task: Task) -> tuple[str, ...]:
    return () if task.kind == "regression" else _names(config)


def _names(config: Any) -> tuple[str, ...]:
    """The name of each output."""
    if (excess := too_many_labels(str(name) for name in config.id2label.values())) is not None:
        raise CheckpointRefused(f"config.json: {excess}; a model may have no more")
    names = [config.id2label.get(index) for index in range(config.num_labels)]
    labels = tuple(str(name) for name in names if isinstance(name, str | int | float))
    if len(labels) < len(names) or len(set(labels)) < len(labels) or not all(map(_is_name, labels)):
        raise CheckpointRefused(
            f"config.json: id2label must give each output, 0 to {len(names) - 1}, a name of its own; it gives "
            f"{str(config.id2label)[:200]}"
        )
    return labels


def _is_name(label: str) -> bool:
    """Something to see, and text that JSON, SQL and a page can hold."""
    return bool(label.strip()) and "\0" not in label and not any("\ud800" <= letter <= "\udfff" for letter in label)


def _pooling(config: Any) -> Pooling:
    """Which state a sequence classifier of transformers takes."""
    if config.model_type == "qwen3":
        return "lasttoken"
    return str(config.classifier_pooling) if config.model_type == "modernbert" else "cls"


def _extract_head(model: Any, paths: Sequence[tuple[str, Activation]]) -> TaskHead:
    layers = []
    for path, activation in paths:
        linear = model.get_submodule(path) if hasattr(model, path.partition(".")[0]) else None
        if not isinstance(linear, nn.Linear):
            raise UnsupportedArchitecture(f"{path} of this {model.config.model_type} checkpoint is no linear layer")
        norm = _extract_norm(model.get_submodule(_NORMS[path])) if path in _NORMS else None
        layers.append(DenseLayer(_numpy(linear.weight), _bias(linear), activation, norm))
    return TaskHead(tuple(layers))


def _extract_norm(module: Any) -> LayerNorm:
    return LayerNorm(_numpy(module.weight), _bias(module), float(module.eps))


def _bias(module: Any) -> Any:
    return np.zeros(len(module.weight), np.float32) if module.bias is None else _numpy(module.bias)


def _numpy(parameter: torch.Tensor) -> Any:
    return np.array(parameter.detach().cpu().numpy(), dtype=np.float32)
