"""Logistic regression on the frozen backbone's vectors, computed once."""

from __future__ import annotations

import time
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from finetune.evaluation import score
from finetune.jobs.records import JobPhase
from finetune.losses import class_weights
from finetune.methods.baseline import both_sides
from finetune.methods.candidate import Candidate, Servable
from finetune.run import Run
from modeling.heads import DenseLayer, TaskHead
from modeling.weights import FloatArray, IntArray

# Inverse regularisation on standardised vectors, from strong to weak; each fit starts from the one before.
_STRENGTHS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
# Some dimensions of a backbone are dead (3 of MiniLM's 384 hardly vary): scaled up, they would be noise.
_LEAST_SPREAD = 0.01


def train(run: Run) -> Candidate:
    started = time.monotonic()
    train_features, validation_features = run.features("train"), run.features("validation")
    run.link.phase(JobPhase.TRAINING)
    best: tuple[float, float, TaskHead] | None = None
    warm: LogisticRegression | None = None
    for strength in _STRENGTHS:
        run.link.check_cancelled()
        head, warm = _fit(run, train_features, run.train.labels, strength, warm)
        value = score(run.plan.metric, head.logits(validation_features), run.validation.labels)
        if best is None or value > best[0]:
            best = (value, strength, head)
    assert best is not None
    _, strength, chosen = best
    run.probe_head = chosen

    def finish() -> Servable:
        features = np.concatenate([train_features, validation_features])
        labels = np.concatenate([run.train.labels, run.validation.labels])
        head, _ = _fit(run, features, labels, strength, None)
        return Servable(logits=lambda texts: head.logits(run.embed(texts)), head=head)

    return Candidate(
        method="linear_probe", kind="head", validation_logits=chosen.logits(validation_features), finish=finish,
        seconds=time.monotonic() - started, details={"c": strength}, head=chosen,
    )  # fmt: skip


def _fit(
    run: Run, features: FloatArray, labels: IntArray, strength: float, warm: LogisticRegression | None
) -> tuple[TaskHead, LogisticRegression]:
    """A head on raw vectors: the standardisation that helps the solver is folded into its weights."""
    mean, spread = features.mean(0), features.std(0)
    scale = np.maximum(spread, np.float32(max(_LEAST_SPREAD * float(np.median(spread)), 1e-6)))
    weights = class_weights(run.plan.class_weights, labels, run.labels)
    by_index = None if weights is None else dict(enumerate(weights.tolist()))
    model = warm or LogisticRegression(max_iter=500, warm_start=True)
    model.set_params(C=strength, class_weight=by_index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterate is good enough to compare
        model.fit((features - mean) / scale, labels)
    weight, bias = both_sides(model.coef_, model.intercept_)
    folded = (weight / scale).astype(np.float32)
    return TaskHead((DenseLayer(folded, (bias - folded @ mean).astype(np.float32)),)), model
