"""LoRA on all linear layers (or attention only), with PEFT; the head starts from the probe."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.methods.candidate import Candidate
from finetune.methods.tuned import Classifier, set_dropout, start_head, train_tuned
from finetune.run import Run
from modeling.adapters import CONFIG_NAME, WEIGHTS_NAME, Adapter
from modeling.backbone import load_encoder
from modeling.engines.torch import TorchEngine

_ATTENTION = ("query", "key", "value", "q_lin", "k_lin", "v_lin", "q", "k", "v", "query_proj", "key_proj", "value_proj")
_SERVING_KEY = "candidate"


def train(run: Run) -> Candidate:
    torch.manual_seed(run.plan.seed)
    encoder = _with_lora(load_encoder(run.backbone.folder), run)
    info = run.backbone.info
    model = Classifier(
        encoder, pooling=info.pooling, hidden_size=info.hidden_size, labels=len(run.labels), dropout=run.plan.dropout
    )
    start_head(model, run.probe_head)
    return train_tuned(run, "lora", "lora", model, _serve)


def _with_lora(encoder: torch.nn.Module, run: Run) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    options = run.plan.lora
    set_dropout(encoder, run.plan.dropout)
    targets = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (options.targets == "all-linear" or name.rpartition(".")[2] in _ATTENTION)
    ]
    config = LoraConfig(
        r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout, use_rslora=options.rslora,
        target_modules=targets, bias="none",
    )  # fmt: skip
    model: torch.nn.Module = get_peft_model(encoder, config)
    return model


def _serve(run: Run, model: Classifier) -> tuple[TorchEngine, str | None, Callable[[Path], None]]:
    encoder: Any = model.encoder

    def write(folder: Path) -> None:
        _save_adapter(encoder, folder / "adapter", run)

    with tempfile.TemporaryDirectory(prefix="polyhead-adapter-") as temporary:
        _save_adapter(encoder, Path(temporary), run)
        run.engine.load_adapter(_SERVING_KEY, Adapter.read(Path(temporary)))
    return run.engine, _SERVING_KEY, write


def _save_adapter(encoder: Any, folder: Path, run: Run) -> None:
    """PEFT's own two files; the base is named by its digest, not by a path of this host."""
    encoder.peft_config["default"].base_model_name_or_path = run.backbone.info.name
    encoder.peft_config["default"].revision = run.backbone.info.digest
    # Otherwise PEFT asks the hub for the base by the name above, to see whether its vocabulary was changed.
    encoder.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    for path in folder.iterdir():
        if path.name not in {CONFIG_NAME, WEIGHTS_NAME}:
            path.unlink()
