"""Learnt vectors before each text (Lester et al., EMNLP 2021); the backbone's weights stay as they are."""

from __future__ import annotations

from finetune.training.methods.candidate import Candidate
from finetune.training.methods.own import train_composed
from finetune.training.run_context import Run
from modeling.adapters_in_encoder import Composition


def train(run: Run) -> Candidate:
    return train_composed(run, "prompt_tuning", Composition("prompt", run.plan.prompt.tokens))
