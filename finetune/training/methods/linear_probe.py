"""A linear model on the frozen backbone's vectors, computed once: logistic regression, or ridge for numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from finetune.jobs.records import JobPhase
from finetune.training.methods.candidate import Candidate, Servable
from finetune.training.methods.linear import (
    LOGISTIC_STRENGTHS,
    PATH_TOLERANCE,
    RIDGE_STRENGTHS,
    Fit,
    Judged,
    best_of,
    fit_logistic,
    fit_one_vs_rest,
    fit_ridge,
    path,
)
from finetune.training.run_context import Run

# How a head is fitted, how the fits that are compared are, and the strengths that are tried, by the kind of task.
_MODELS: dict[str, tuple[Callable[..., Fit], Callable[..., Fit], Sequence[float]]] = {
    "single_label": (fit_logistic, partial(fit_logistic, tolerance=PATH_TOLERANCE), LOGISTIC_STRENGTHS),
    "multi_label": (fit_one_vs_rest, fit_one_vs_rest, LOGISTIC_STRENGTHS),
    "regression": (fit_ridge, fit_ridge, RIDGE_STRENGTHS),
}


def train(run: Run) -> Candidate:
    if run.rules.by_position:
        from finetune.training.methods import position_probe

        return position_probe.train(run)
    started = time.monotonic()
    train_features, validation_features = run.features("train"), run.features("validation")
    run.link.phase(JobPhase.TRAINING)

    def judge(fitted: Fit) -> Judged:
        run.link.check_cancelled()
        logits = fitted.head.logits(validation_features)
        loss = run.rules.loss(logits, run.validation.labels)
        return Judged(fitted, run.plan.deciding.gain(run.score(logits)), loss)

    fit, compared, strengths = _MODELS[run.kind]
    fits = path(partial(compared, run, train_features, run.train.labels), strengths)
    rows = len(run.validation.labels) if run.plan.deciding.is_share else None
    chosen = best_of(fits, judge, rows=rows)
    run.probe_head = chosen.head

    def finish() -> Servable:
        features = np.concatenate([train_features, validation_features])
        labels = np.concatenate([run.train.labels, run.validation.labels])
        head = fit(run, features, labels, strength=chosen.strength, start=chosen).head

        return Servable(
            logits=lambda examples: head.logits(run.embed(examples)),
            head=head,
            reference_logits=lambda examples: head.logits(run.reference.of(examples, max_length=run.plan.max_length)),
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
