"""Learnt vectors before each text (Lester et al., EMNLP 2021); the backbone's weights stay as they are."""

from __future__ import annotations

from finetune.methods.candidate import Candidate
from finetune.methods.own import train_composed
from finetune.run import Run
from modeling.composed import Composition


def train(run: Run) -> Candidate:
    return train_composed(run, "prompt_tuning", Composition("prompt", run.plan.prompt.tokens))
