"""Small modules trained inside a frozen encoder: bottleneck adapters behind every sublayer (Houlsby et al., ICML 2019)
and learnt vectors before each text (Lester et al., EMNLP 2021)."""

from __future__ import annotations

import torch

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
from modeling.adapters_in_encoder import Composition, compose


def train_bottleneck(run: Run) -> Candidate:
    return _train(run, "bottleneck", Composition("bottleneck", run.plan.bottleneck.size))


def train_prompt(run: Run) -> Candidate:
    return _train(run, "prompt_tuning", Composition("prompt", run.plan.prompt.tokens))


def _train(run: Run, method: str, composition: Composition) -> Candidate:
    """Train the modules that `composition` adds, and the head, which starts from the probe's."""

    def build() -> Classifier:
        torch.manual_seed(run.plan.seed)
        encoder = load_network(run).requires_grad_(False)
        model = new_classifier(run, compose(encoder, composition))
        start_head(model, run.probe_head, run.scale)
        return model

    def serve(run: Run, model: Classifier) -> Serving:
        return serve_own(run, model.encoder, method=method, composition=composition)

    return train_tuned(run, method, "full", build, serve)
