"""A linear model on the frozen backbone's vectors, computed once: logistic regression, or ridge for numbers."""

from __future__ import annotations

import time
from types import ModuleType

import numpy as np

from finetune.jobs.records import JobPhase
from finetune.training.methods import logistic, one_vs_rest, ridge
from finetune.training.methods.candidate import Candidate, Servable
from finetune.training.methods.logistic import Fit, Judged
from finetune.training.run_context import Run
from modeling.heads import TaskHead

_MODELS: dict[str, ModuleType] = {
    "single_label": logistic,
    "multi_label": one_vs_rest,
    "regression": ridge,
}


def train(run: Run) -> Candidate:
    started = time.monotonic()
    train_features, validation_features = run.features("train"), run.features("validation")
    run.link.phase(JobPhase.TRAINING)

    def judge(fit: Fit) -> Judged:
        run.link.check_cancelled()
        logits = fit.head.logits(validation_features)
        loss = run.rules.loss(logits, run.validation.labels)
        return Judged(fit, run.plan.deciding.gain(run.score(logits)), loss)

    model = _MODELS[run.kind]
    fits = model.path(run, train_features, run.train.labels)
    rows = len(run.validation.labels) if run.plan.deciding.is_share else None
    chosen = logistic.best_of(fits, judge, rows=rows)
    run.probe_head = chosen.head

    def finish() -> Servable:
        features = np.concatenate([train_features, validation_features])
        labels = np.concatenate([run.train.labels, run.validation.labels])
        head: TaskHead = model.fit(run, features, labels, strength=chosen.strength, start=chosen).head

        return Servable(
            logits=lambda examples: head.logits(run.embed(examples)),
            head=head,
            reference_logits=lambda examples: head.logits(run.embed_by_reference(examples)),
        )

    return Candidate(
        method="linear_probe",
        kind="head",
        validation_logits=chosen.head.logits(validation_features),
        finish=finish,
        seconds=time.monotonic() - started,
        details={"c": chosen.strength},
        head=chosen.head,
    )
