"""LoRA on all linear layers (or attention only), with PEFT; the head starts from the probe.

DoRA also learns each column's length, which no low-rank product can carry: it is merged into the weights, and
its version has weights of its own. QLoRA trains the same adapter on a backbone in 4 bits.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.training.methods.candidate import Candidate
from finetune.training.methods.tuned import (
    Classifier,
    Serving,
    load_network,
    new_classifier,
    serve_own,
    start_head,
    train_tuned,
)
from finetune.training.run_context import Run
from modeling.adapters import CONFIG_NAME, WEIGHTS_NAME, Adapter

_ATTENTION = (
    *("query", "key", "value", "q_lin", "k_lin", "v_lin", "q", "k", "v", "query_proj", "key_proj", "value_proj"),
    *("q_proj", "k_proj", "v_proj", "Wqkv"),
)
_SERVING_KEY = "candidate"


def train(run: Run, method: str = "lora") -> Candidate:
    build = partial(_build, run, method)
    if run.plan.lora.dora:
        return train_tuned(run, method, "full", build, _serve_merged)
    return train_tuned(run, method, "lora", build, _serve)


def _build(run: Run, method: str) -> Classifier:
    torch.manual_seed(run.plan.seed)
    encoder = load_network(run)
    targets = _targets(encoder, run)
    if method == "qlora":
        in_four_bits(encoder)
    model = new_classifier(run, _with_lora(encoder, targets, run))
    start_head(model, run.probe_head, run.scale)
    return model


def train_qlora(run: Run) -> Candidate:
    return train(run, "qlora")


def _targets(encoder: nn.Module, run: Run) -> list[str]:
    return [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
        and (run.plan.lora.targets == "all-linear" or name.rpartition(".")[2] in _ATTENTION)
    ]


def _with_lora(encoder: nn.Module, targets: list[str], run: Run) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    options = run.plan.lora
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        target_modules=targets,
        bias="none",
    )
    model: nn.Module = get_peft_model(encoder, config)
    return model


def in_four_bits(encoder: nn.Module) -> None:
    """Every linear layer in NF4 with double quantisation (Dettmers et al., NeurIPS 2023); packed when it is moved to
    the GPU. PEFT then trains its adapters beside them."""
    import bitsandbytes  # type: ignore[import-not-found]

    for name, module in list(encoder.named_modules()):
        if isinstance(module, nn.Linear):
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            packed.load_state_dict(module.state_dict())
            packed.requires_grad_(False)
            encoder.set_submodule(name, packed)
    encoder.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT looks here


def _serve(run: Run, model: Classifier) -> Serving:
    encoder: Any = model.encoder
    with tempfile.TemporaryDirectory(prefix="polyhead-adapter-") as temporary:
        _save_adapter(encoder, Path(temporary), run)
        run.reference.engine.load_adapter(_SERVING_KEY, Adapter.read(Path(temporary)))
    return run.reference.engine, _SERVING_KEY, lambda folder: _save_adapter(encoder, folder / "adapter", run)


def _serve_merged(run: Run, model: Classifier) -> Serving:
    encoder: Any = model.encoder
    model.encoder = encoder.merge_and_unload()
    return serve_own(run, model.encoder, method="lora")


def _save_adapter(encoder: Any, folder: Path, run: Run) -> None:
    """PEFT's own two files; the base is named by its digest, not by a path of this host."""
    encoder.peft_config["default"].base_model_name_or_path = run.backbone.info.name
    encoder.peft_config["default"].revision = run.backbone.info.digest
    # Otherwise PEFT asks the hub for the base by the name above, to see whether its vocabulary was changed.
    encoder.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    for path in folder.iterdir():
        if path.name not in {CONFIG_NAME, WEIGHTS_NAME}:
            path.unlink()
    # PEFT writes the layers in the order of a set, which is another one in each process.
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["target_modules"] = sorted(config["target_modules"])
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True))
