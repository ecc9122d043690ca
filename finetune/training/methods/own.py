"""Encoders with weights of their own: how their versions are written, and the engine that answers as they will."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from finetune.training.methods.candidate import Candidate
from finetune.training.methods.tuned import Classifier, Serving, set_dropout, start_head, train_tuned
from finetune.training.run_context import Run
from modeling.adapters_in_encoder import Composition, compose
from modeling.backbone import Backbone
from modeling.checkpoints import write_encoder
from modeling.encoder import load_encoder
from modeling.engines.torch import TorchEngine


def new_classifier(run: Run, encoder: nn.Module) -> Classifier:
    set_dropout(encoder, run.plan.dropout)
    info = run.backbone.info
    return Classifier(
        encoder, pooling=info.pooling, hidden_size=info.hidden_size, labels=run.outputs, dropout=run.plan.dropout
    )


def serve_own(run: Run, encoder: nn.Module, *, method: str, composition: Composition | None = None) -> Serving:
    """`encoder` as a server will load it, and what writes it into a version's folder."""

    def write(folder: Path) -> Backbone:
        info = run.backbone.info
        taken = composition.size if composition is not None and composition.kind == "prompt" else 0
        return write_encoder(
            folder,
            encoder,
            like=run.backbone.folder,
            name=info.name,
            source=f"{method} fine-tune of {info.digest}",
            pooling=info.pooling,
            normalize=False,
            max_length=min(run.plan.max_length, info.max_length - taken),
            composition=composition,
        )

    def write_extra(folder: Path) -> None:
        write(folder / "full")

    with tempfile.TemporaryDirectory(prefix=f"polyhead-{method}-") as temporary:
        engine = TorchEngine(write(Path(temporary)), device=run.plan.device)
    return engine, None, write_extra


def train_composed(run: Run, method: str, composition: Composition) -> Candidate:
    """Only the modules that `composition` adds are trained, and the head, which starts from the probe's."""

    def build() -> Classifier:
        torch.manual_seed(run.plan.seed)
        encoder = load_encoder(run.backbone.folder).requires_grad_(False)
        model = new_classifier(run, compose(encoder, composition))
        start_head(model, run.probe_head, run.scale)
        return model

    def serve(run: Run, model: Classifier) -> Serving:
        return serve_own(run, model.encoder, method=method, composition=composition)

    return train_tuned(run, method, "full", build, serve)
