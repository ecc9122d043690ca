"""Logistic regression on the frozen backbone's vectors, computed once."""

from __future__ import annotations

import time

import numpy as np

from finetune.calibration import negative_log_likelihood
from finetune.evaluation import score
from finetune.jobs.records import JobPhase
from finetune.methods import logistic
from finetune.methods.candidate import Candidate, Servable
from finetune.methods.logistic import Fit, Judged
from finetune.run import Run


def train(run: Run) -> Candidate:
    started = time.monotonic()
    train_features, validation_features = run.features("train"), run.features("validation")
    run.link.phase(JobPhase.TRAINING)

    def judge(fit: Fit) -> Judged:
        run.link.check_cancelled()
        logits = fit.head.logits(validation_features)
        loss = negative_log_likelihood(logits, run.validation.labels)
        return Judged(fit, score(run.plan.metric, logits, run.validation.labels), loss)

    fits = logistic.path(run, train_features, run.train.labels)
    chosen = logistic.best_of(fits, judge, rows=len(run.validation.labels))
    run.probe_head = chosen.head

    def finish() -> Servable:
        features = np.concatenate([train_features, validation_features])
        labels = np.concatenate([run.train.labels, run.validation.labels])
        head = logistic.fit(run, features, labels, strength=chosen.strength, start=chosen).head

        return Servable(
            logits=lambda texts: head.logits(run.embed(texts)), head=head,
            reference_logits=lambda texts: head.logits(run.embed_by_reference(texts)),
        )  # fmt: skip

    return Candidate(
        method="linear_probe", kind="head", validation_logits=chosen.head.logits(validation_features), finish=finish,
        seconds=time.monotonic() - started, details={"c": chosen.strength}, head=chosen.head,
    )  # fmt: skip
