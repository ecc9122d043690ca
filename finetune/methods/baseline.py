"""Tf-idf and a linear classifier: trained first, so that nobody deploys a deep net that it beats."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from finetune.class_weights import class_weights
from finetune.evaluation import score
from finetune.methods.candidate import Candidate, Servable
from finetune.run import Run
from modeling.linear_text import LinearText, new_vectorizer
from modeling.weights import FloatArray, IntArray

_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # inverse regularisation C, tried from strong to weak


def train(run: Run) -> Candidate:
    started = time.monotonic()
    fitted = {}
    for strength in _STRENGTHS:
        run.link.check_cancelled()
        model = _fit(run, run.train.texts, run.train.labels, strength)
        logits = model.margins(run.validation.texts)
        fitted[strength] = (score(run.plan.metric, logits, run.validation.labels), logits)
    best = max(_STRENGTHS, key=lambda strength: fitted[strength][0])

    def finish() -> Servable:
        texts = [*run.train.texts, *run.validation.texts]
        model = _fit(run, texts, np.concatenate([run.train.labels, run.validation.labels]), best)
        return Servable(logits=model.margins, linear=model)

    return Candidate(
        method="baseline", kind="baseline", validation_logits=fitted[best][1], finish=finish,
        seconds=time.monotonic() - started, details={"c": best},
    )  # fmt: skip


def _fit(run: Run, texts: Sequence[str], labels: IntArray, strength: float) -> LinearText:
    vectorizer = new_vectorizer()
    features = vectorizer.fit_transform(texts)
    by_class = class_weights(run.plan.class_weights, labels, run.labels)
    by_index = None if by_class is None else dict(enumerate(by_class.tolist()))
    classifier = LinearSVC(C=strength, class_weight=by_index, random_state=run.plan.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterate is good enough to compare
        classifier.fit(features, labels)
    weight, bias = both_sides(classifier.coef_, classifier.intercept_)
    terms = tuple(vectorizer.get_feature_names_out().tolist())
    return LinearText(terms, vectorizer.idf_.astype(np.float32), weight, bias)


def both_sides(coefficients: Any, intercepts: Any) -> tuple[FloatArray, FloatArray]:
    """scikit-learn gives two classes one row of weights; here each class has its own, half on either side."""
    weight, bias = np.asarray(coefficients, np.float32), np.asarray(intercepts, np.float32)
    if len(weight) == 1:
        half = np.float32(0.5)
        return np.concatenate([-weight, weight]) * half, np.concatenate([-bias, bias]) * half
    return weight, bias
