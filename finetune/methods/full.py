"""Full fine-tuning: every weight of the backbone moves, so the version carries a backbone of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from finetune.methods.candidate import Candidate
from finetune.methods.tuned import Classifier, set_dropout, start_head, train_tuned
from finetune.run import Run
from modeling.backbone import Backbone, load_encoder
from modeling.checkpoints import write_encoder
from modeling.engines.torch import TorchEngine


def train(run: Run) -> Candidate:
    torch.manual_seed(run.plan.seed)
    encoder = load_encoder(run.backbone.folder)
    set_dropout(encoder, run.plan.dropout)
    info = run.backbone.info
    model = Classifier(
        encoder, pooling=info.pooling, hidden_size=info.hidden_size, labels=len(run.labels), dropout=run.plan.dropout
    )
    # A fresh head, not the probe's: on R8 the probe's head, fitted to the frozen features, cost a point (docs/log.md).
    start_head(model, None)
    return train_tuned(run, "full", "full", model, _serve)


def _serve(run: Run, model: Classifier) -> tuple[TorchEngine, str | None, Callable[[Path], None]]:
    with tempfile.TemporaryDirectory(prefix="polyhead-full-") as temporary:
        engine = TorchEngine(_write(run, model, Path(temporary)), device=run.plan.device)

    def write(folder: Path) -> None:
        _write(run, model, folder / "full")

    return engine, None, write


def _write(run: Run, model: Classifier, folder: Path) -> Backbone:
    info = run.backbone.info
    return write_encoder(
        folder, model.encoder, like=run.backbone.folder, name=info.name, source=f"full fine-tune of {info.digest}",
        pooling=info.pooling, normalize=False, max_length=run.plan.max_length,
    )  # fmt: skip
