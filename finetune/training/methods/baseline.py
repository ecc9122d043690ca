"""Tf-idf and a linear model: trained first, so that no deep net that it beats is deployed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC

from finetune.evaluation.tasks.class_weights import class_weights, positive_weights
from finetune.evaluation.tasks.rules import Targets
from finetune.training.methods.candidate import Candidate, Servable
from finetune.training.run_context import Run
from modeling.inputs.text import TextInput, as_one
from modeling.linear_text import LinearText, new_vectorizer
from modeling.weights import FloatArray, IntArray

_HALF_A_ROW = 0.5
_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # inverse regularisation C, tried from strong to weak


def train(run: Run) -> Candidate:
    started = time.monotonic()
    words = _Words.of(run.train.examples)
    fitted = []
    for strength in _STRENGTHS:
        run.link.check_cancelled()
        logits = words.fit(run, run.train.labels, strength).margins(run.validation.examples)
        fitted.append((run.score(logits), logits))
    best = run.plan.deciding.best([value for value, _ in fitted])

    def finish() -> Servable:
        labels = np.concatenate([run.train.labels, run.validation.labels])
        model = _Words.of([*run.train.examples, *run.validation.examples]).fit(run, labels, _STRENGTHS[best])
        return Servable(logits=model.margins, linear=model)

    return Candidate(
        method="baseline",
        kind="baseline",
        validation_logits=fitted[best][1],
        finish=finish,
        seconds=time.monotonic() - started,
        details={"c": _STRENGTHS[best]},
    )


@dataclass(frozen=True, slots=True)
class _Words:
    """The words of some texts, weighted: sparse `features` [texts, terms]."""

    vectorizer: Any
    features: Any

    @classmethod
    def of(cls, texts: Sequence[TextInput]) -> _Words:
        vectorizer = new_vectorizer()
        return cls(vectorizer, vectorizer.fit_transform(map(as_one, texts)))

    def fit(self, run: Run, targets: Targets, strength: float) -> LinearText:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterate is good enough to compare
            weight, bias = _MODELS[run.kind](run, self.features, targets, strength)
        terms = tuple(self.vectorizer.get_feature_names_out().tolist())
        return LinearText(terms, self.vectorizer.idf_.astype(np.float32), weight, bias)


def _of_classes(run: Run, features: Any, labels: IntArray, strength: float) -> tuple[FloatArray, FloatArray]:
    classifier = LinearSVC(C=strength, class_weight=by_index(run, labels), random_state=run.plan.seed)
    classifier.fit(features, labels)
    return both_sides(classifier.coef_, classifier.intercept_)


def _of_labels(run: Run, features: Any, targets: FloatArray, strength: float) -> tuple[FloatArray, FloatArray]:
    """One against its absence for each label; one that no row or every row has gets its frequency alone."""
    positive = positive_weights(run.plan.class_weights, targets, run.labels)
    weight = np.zeros((targets.shape[1], features.shape[1]), np.float32)
    bias = constant_bias(targets)
    for label, due in enumerate(targets.T > 0):
        if due.all() or not due.any():
            continue
        run.link.check_cancelled()
        own = None if positive is None else {0: 1.0, 1: float(positive[label])}
        classifier = LinearSVC(C=strength, class_weight=own, random_state=run.plan.seed)
        classifier.fit(features, due.astype(np.int64))
        weight[label], bias[label] = classifier.coef_[0], classifier.intercept_[0]
    return weight, bias


def _of_numbers(run: Run, features: Any, targets: FloatArray, strength: float) -> tuple[FloatArray, FloatArray]:
    """Ridge regression of standardised targets, given back in their own units."""
    scale = run.scale
    model = Ridge(alpha=1 / strength, solver="sparse_cg", random_state=run.plan.seed)
    model.fit(features.astype(np.float64), scale.standard(targets).astype(np.float64))
    weight, bias = np.atleast_2d(model.coef_) * scale.deviation, np.atleast_1d(model.intercept_) * scale.deviation
    return weight.astype(np.float32), (bias + scale.mean).astype(np.float32)


_MODELS: dict[str, Callable[[Run, Any, Targets, float], tuple[FloatArray, FloatArray]]] = {
    "single_label": _of_classes,
    "multi_label": _of_labels,
    "regression": _of_numbers,
}


def by_index(run: Run, labels: IntArray) -> dict[int, float] | None:
    """Weights of classes as scikit-learn takes them."""
    # A method that is solved has no epochs, so weights take the place of repeated rows.
    weights = class_weights("balanced" if run.plan.oversample else run.plan.class_weights, labels, run.labels)
    return None if weights is None else dict(enumerate(weights.tolist()))


def both_sides(coefficients: Any, intercepts: Any) -> tuple[FloatArray, FloatArray]:
    """scikit-learn gives two classes one row of weights; here each class has its own, half on either side."""
    weight, bias = np.asarray(coefficients, np.float32), np.asarray(intercepts, np.float32)
    if len(weight) == 1:
        half = np.float32(0.5)
        return np.concatenate([-weight, weight]) * half, np.concatenate([-bias, bias]) * half
    return weight, bias


def constant_bias(targets: FloatArray) -> FloatArray:
    """Log odds float32[labels] of each label's frequency, as if half a row more had it and half a row lacked it."""
    due = targets.sum(0, dtype=np.float64)
    return np.asarray(np.log((due + _HALF_A_ROW) / (len(targets) - due + _HALF_A_ROW)), np.float32)
