"""Checkpoints with weights of their own: a full fine-tune, or a published sequence classifier.

Both become a backbone folder plus a head, so the server knows one way to run them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modeling.adapters_in_encoder import Composition, plain_weights, write_composition
from modeling.backbone import (
    BACKBONE_FILE,
    Backbone,
    BackboneInfo,
    Pooling,
    content_digest,
    describe,
    info_bytes,
    read_config,
    weight_files,
)
from modeling.encoder import load_pretrained
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.errors import BackboneUnavailable, GoldenRowsDiffer, UnsupportedArchitecture
from modeling.heads import Activation, DenseLayer, TaskHead
from modeling.inputs import open_preprocessor, single
from modeling.tasks import DEFAULT_MODALITY, Task, task_of_kind

# Where a sequence classifier of each model type keeps the layers between token state and logits.
_HEAD_LAYERS: dict[str, tuple[tuple[str, Activation], ...]] = {
    "albert": (("albert.pooler", "tanh"), ("classifier", "linear")),
    "bert": (("bert.pooler.dense", "tanh"), ("classifier", "linear")),
    "camembert": (("classifier.dense", "tanh"), ("classifier.out_proj", "linear")),
    "deberta-v2": (("pooler.dense", "gelu"), ("classifier", "linear")),
    "distilbert": (("pre_classifier", "relu"), ("classifier", "linear")),
    "electra": (("classifier.dense", "gelu"), ("classifier.out_proj", "linear")),
    "mpnet": (("classifier.dense", "tanh"), ("classifier.out_proj", "linear")),
    "roberta": (("classifier.dense", "tanh"), ("classifier.out_proj", "linear")),
    "xlm-roberta": (("classifier.dense", "tanh"), ("classifier.out_proj", "linear")),
}
_PROBES = ("a short text", "Another, rather longer text: it has numbers (42), punctuation; and ends here.")


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
    max_length: int,
    composition: Composition | None = None,
) -> Backbone:
    """Writes `encoder` as a backbone folder, with the tokenizer and configuration of the folder `like`.

    `composition` is what `modeling.adapters_in_encoder.compose` made it with, if it did.
    """
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    plain = encoder.state_dict() if composition is None else plain_weights(encoder)
    state = {key: value.detach().cpu().float().contiguous() for key, value in plain.items()}
    if composition is not None:
        write_composition(target, encoder, composition)
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    shutil.copyfile(like / "tokenizer.json", target / "tokenizer.json")
    config = read_config(like)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    files = {path.name: path for path in [target / "config.json", target / "tokenizer.json", *weight_files(target)]}
    base = describe(target, config, name=name, source=source, digest=content_digest(target, files))
    values = {field: getattr(base, field) for field in BackboneInfo.__dataclass_fields__}
    values |= {"pooling": pooling, "normalize": normalize, "max_length": min(max_length, base.max_length)}
    info = BackboneInfo(**values)
    (target / BACKBONE_FILE).write_bytes(info_bytes(info))
    return Backbone(info, target)


def import_classifier(folder: Path, target: Path, *, name: str, source: str) -> ImportedClassifier:
    """Takes a Hugging Face sequence classifier apart into an encoder (written to `target`) and a head.

    The parts must reproduce the original's logits on probe texts, or nothing is imported. `problem_type` says the task.
    Raises `BackboneUnavailable`, `ConfigRefused`, `UnsupportedArchitecture`, `GoldenRowsDiffer`.
    """
    config = read_config(folder)
    original = _load_classifier(folder)
    task = _task(original.config)
    labels = _labels(original.config, task)
    head = _extract_head(original, config["model_type"])
    info = describe(folder, config, name=name, source=source, digest="0" * 64)
    original.base_model.pooler = None
    backbone = write_encoder(
        target,
        original.base_model,
        like=folder,
        name=name,
        source=source,
        pooling="cls",
        normalize=False,
        max_length=info.max_length,
    )
    _check_reproduces(_load_classifier(folder), backbone, head)
    return ImportedClassifier(backbone, head, task, labels)


def _load_classifier(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    if not (folder / "tokenizer.json").is_file():
        raise BackboneUnavailable(f"{folder.name} has no tokenizer.json; save its tokenizer with the fast class first")
    return load_pretrained(AutoModelForSequenceClassification, folder)


def _task(config: Any) -> Task:
    """What the checkpoint was trained for, as transformers reads it: by `problem_type`, and where there is none, one
    output is a value and several are labels of which one is right."""
    outputs, problem = config.num_labels, config.problem_type
    kind = None
    if problem == "multi_label_classification":
        kind = "multi_label"
    elif outputs == 1 and problem in {None, "regression"}:
        kind = "regression"
    elif outputs > 1 and problem in {None, "single_label_classification"}:
        kind = "single_label"
    if kind is not None:
        return task_of_kind(DEFAULT_MODALITY, kind)
    raise UnsupportedArchitecture(
        f"problem_type {problem} with {outputs} outputs cannot be imported; regression has one output, a classifier "
        "with one label a text at least two"
    )


def _labels(config: Any, task: Task) -> tuple[str, ...]:
    if task.kind == "regression":
        return ()
    return tuple(str(config.id2label[index]) for index in range(config.num_labels))


def _extract_head(model: Any, model_type: str) -> TaskHead:
    layers = []
    for path, activation in _HEAD_LAYERS[model_type]:
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise UnsupportedArchitecture(f"{path} of this {model_type} checkpoint is no linear layer")
        layers.append(DenseLayer(_numpy(linear.weight), _numpy(linear.bias), activation))
    return TaskHead(tuple(layers))


def _numpy(parameter: torch.Tensor) -> Any:
    return np.array(parameter.detach().cpu().numpy(), dtype=np.float32)


@torch.inference_mode()
def _check_reproduces(original: Any, backbone: Backbone, head: TaskHead) -> None:
    preprocessor = open_preprocessor(backbone)
    rows = single(preprocessor.encode(_PROBES))
    pooled = TorchEngine(backbone).run(EngineBatch(rows))
    for place, row in enumerate(rows):
        arrays = preprocessor.collate([row], row.cost)
        wanted = original(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits[0].numpy()
        if np.abs(head.logits(pooled[place : place + 1])[0] - wanted).max() > 1e-3:
            raise GoldenRowsDiffer(
                "taken apart into encoder and head, the checkpoint gives other logits than as a whole"
            )
