"""Full fine-tuning: the backbone's weights move, all or those of its topmost layers, so the version carries its own."""

from __future__ import annotations

from functools import partial

import torch

from finetune.training.layers import freeze_below, set_trunk, unset_trunk
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


def train(run: Run) -> Candidate:
    return train_tuned(run, "full", "full", partial(_build, run), _serve)


def _build(run: Run) -> Classifier:
    torch.manual_seed(run.plan.seed)
    model = new_classifier(run, load_network(run))
    if run.plan.unfreeze_layers != "all":
        freeze_below(model.encoder, run.plan.unfreeze_layers)
        # With dropout the frozen layers give another answer each time.
        model.keep_in(set_trunk(model.encoder) if run.plan.dropout == 0 else None)
    # A fresh head, not the probe's: on R8 the probe's head, fitted to the frozen features, cost a point (docs/log.md).
    start_head(model, None)
    return model


def _serve(run: Run, model: Classifier) -> Serving:
    unset_trunk(model.encoder)
    return serve_own(run, model.encoder, method="full")
