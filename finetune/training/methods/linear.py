"""Linear models on pooled vectors, along a path of strengths: what the probe and `setfit` put on top.

A class a row: multinomial logistic regression. Several labels a row: logistic regression of each label against its
absence. The losses of the labels add up, so one L-BFGS over all weights solves them together, a matrix product for all
labels where a solver for each would take a pass over the rows for each. A number a row: ridge regression.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from finetune.evaluation.tasks.class_weights import positive_weights
from finetune.training.methods.baseline import by_index, constant_bias, of_all_classes, quiet_solvers
from finetune.training.run_context import Run
from modeling.heads import DenseLayer, TaskHead, sigmoid
from modeling.weights import FloatArray, IntArray

# Inverse regularisation on standardised vectors, from strong to weak; each fit starts from the one before.
LOGISTIC_STRENGTHS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
# One over the penalty, on standardised vectors.
RIDGE_STRENGTHS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)
# Some dimensions of a backbone are dead (3 of MiniLM's 384 hardly vary): scaled up, they would be noise.
_LEAST_SPREAD = 0.01
_ITERATIONS = 500
_GRADIENT_TOLERANCE = 1e-4  # of the labels solved together
PATH_TOLERANCE = 1e-3  # of the fits that are compared: a third of the iterations of 1e-4, and the same choice on R8
_PATIENCE = 3  # strengths without a gain until weaker ones are not tried any more


@dataclass(frozen=True, slots=True)
class Fit:
    """A head on raw vectors, the strength it was fitted with, where the solver ended, and for which classes."""

    head: TaskHead
    strength: float
    coefficients: Any
    intercepts: Any
    classes: Any = None


def fit_logistic(
    run: Run,
    features: FloatArray,
    labels: IntArray,
    *,
    strength: float,
    start: Fit | None = None,
    tolerance: float = 1e-4,
) -> Fit:
    """Multinomial logistic regression on standardised vectors; the standardisation is folded into the head."""
    mean, scale = standardisation(features)
    if start is not None and not np.array_equal(start.classes, np.unique(labels)):
        start = None  # validation rows may add a class, for which there are no coefficients to start from
    model = LogisticRegression(
        C=strength,
        class_weight=by_index(run, labels),
        max_iter=_ITERATIONS,
        tol=tolerance,
        warm_start=start is not None,
    )
    standard = (features - mean) / scale
    if start is not None:
        model.coef_, model.intercept_ = start.coefficients, start.intercepts
    # Products this small gain nothing from a second thread, and lose a lot where another process wants the core.
    with warnings.catch_warnings(), threadpool_limits(1):
        quiet_solvers()
        model.fit(standard, labels)
    weight, bias = of_all_classes(model, standard, len(run.labels))
    head = folded_head(weight, bias, mean, scale)
    return Fit(head, strength, model.coef_.copy(), model.intercept_.copy(), model.classes_.copy())


def fit_one_vs_rest(
    run: Run, features: FloatArray, targets: FloatArray, *, strength: float, start: Fit | None = None
) -> Fit:
    """On standardised vectors, targets float32[rows, labels]; `strength` is scikit-learn's C, of each label.

    A label that no row or every row has gets its frequency and no weights.
    """
    mean, scale = standardisation(features)
    standard = np.ascontiguousarray((features - mean) / scale, dtype=np.float32)
    positive = positive_weights(run.plan.class_weights, targets, run.labels)
    varies = (targets.min(0) < targets.max(0)) if len(targets) else np.zeros(targets.shape[1], bool)
    weight = np.zeros((targets.shape[1], features.shape[1]), np.float32)
    bias = constant_bias(targets)
    if varies.any():
        first = None if start is None else (start.coefficients[varies], start.intercepts[varies])
        own = None if positive is None else positive[varies]
        with threadpool_limits(1):
            weight[varies], bias[varies] = _solve_labels(standard, targets[:, varies], strength, own, first)
    return Fit(folded_head(weight, bias, mean, scale), strength, weight, bias)


def _solve_labels(
    features: FloatArray,
    targets: FloatArray,
    strength: float,
    positive: FloatArray | None,
    start: tuple[FloatArray, FloatArray] | None,
) -> tuple[FloatArray, FloatArray]:
    """Weights [labels, hidden] and biases [labels] with the least penalised loss, divided by the rows."""
    rows, hidden = features.shape
    labels = targets.shape[1]
    weights = np.where(targets > 0, 1.0 if positive is None else positive, 1.0).astype(np.float32)
    first = np.zeros((labels, hidden + 1)) if start is None else np.column_stack(start).astype(np.float64)

    def loss(flat: FloatArray) -> tuple[float, FloatArray]:
        own = flat.reshape(labels, hidden + 1)
        logits = features @ own[:, :hidden].T.astype(np.float32) + own[:, hidden].astype(np.float32)
        losses = weights * (np.logaddexp(np.float32(0), logits) - logits * targets)
        slopes = weights * (sigmoid(logits) - targets)
        penalty = own[:, :hidden] / (strength * rows)
        gradient = np.column_stack([slopes.T @ features / rows + penalty, slopes.sum(0, dtype=np.float64) / rows])
        value = float(losses.sum(dtype=np.float64)) / rows + 0.5 * float((own[:, :hidden] * penalty).sum())
        return value, gradient.ravel()

    options = {"maxiter": _ITERATIONS, "gtol": _GRADIENT_TOLERANCE}
    found = minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(labels, hidden + 1)
    return found[:, :hidden].astype(np.float32), found[:, hidden].astype(np.float32)


def fit_ridge(run: Run, features: FloatArray, targets: FloatArray, *, strength: float, start: Fit | None = None) -> Fit:
    """In closed form, so `start` changes nothing; the head gives values in the units of the target."""
    mean, scale = standardisation(features)
    model = Ridge(alpha=1 / strength)
    with threadpool_limits(1):
        model.fit(((features - mean) / scale).astype(np.float64), targets.astype(np.float64))
    weight, bias = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
    return Fit(folded_head(weight, bias, mean, scale), strength, weight, bias)


def standardisation(features: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and deviation float32[hidden], the deviation of dimensions that hardly vary raised."""
    mean, spread = features.mean(0), features.std(0)
    return mean, np.maximum(spread, np.float32(max(_LEAST_SPREAD * float(np.median(spread)), 1e-6)))


def folded_head(weight: FloatArray, bias: FloatArray, mean: FloatArray, scale: FloatArray) -> TaskHead:
    """A head on raw vectors from weights [outputs, hidden] on standardised ones."""
    folded = (weight / scale).astype(np.float32)
    return TaskHead((DenseLayer(folded, (bias - folded @ mean).astype(np.float32)),))


def path(fitted: Callable[..., Fit], strengths: Sequence[float]) -> Iterator[Fit]:
    """Fits from strong to weak regularisation, each started from the last."""
    last: Fit | None = None
    for strength in strengths:
        last = fitted(strength=strength, start=last)
        yield last


@dataclass(frozen=True, slots=True)
class Judged:
    """A fit by rows held out: the job's metric (larger is better), and the mean loss."""

    fit: Fit
    score: float
    loss: float


def best_of(fits: Iterator[Fit], judge: Callable[[Fit], Judged], *, rows: int | None) -> Fit:
    """Of the fits whose score on `rows` rows is within one standard error of the highest, the one with the least loss.

    On some hundred rows the highest score is a matter of chance, the log loss much less. Without `rows` (the score is
    no share of them) the highest score counts alone. The path ends where several in a row gained in neither.
    """
    judged: list[Judged] = []
    behind = 0
    for fitted in fits:
        last = judge(fitted)
        is_gain = all(last.score > other.score for other in judged) or all(last.loss < other.loss for other in judged)
        judged.append(last)
        behind = 0 if is_gain else behind + 1
        if behind >= _PATIENCE:
            break
    highest = max(one.score for one in judged)
    error = 0.0 if rows is None else math.sqrt(max(0.0, highest * (1 - highest)) / max(1, rows))
    return min((one for one in judged if one.score >= highest - error), key=lambda one: one.loss).fit
