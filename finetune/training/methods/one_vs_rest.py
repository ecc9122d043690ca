"""Logistic regression of each label against its absence, all labels at once: the probe of several labels a row.

The losses of the labels add up, so one L-BFGS over all weights solves them together, a matrix product for all labels
where a solver for each would take a pass over the rows for each.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from finetune.evaluation.tasks.class_weights import positive_weights
from finetune.training.methods.baseline import constant_bias
from finetune.training.methods.logistic import Fit, folded_head, standardisation
from finetune.training.run_context import Run
from modeling.heads import sigmoid
from modeling.weights import FloatArray

_ITERATIONS = 500
_TOLERANCE = 1e-4


def fit(run: Run, features: FloatArray, targets: FloatArray, *, strength: float, start: Fit | None = None) -> Fit:
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
            weight[varies], bias[varies] = _solved(standard, targets[:, varies], strength, own, first)
    return Fit(folded_head(weight, bias, mean, scale), strength, weight, bias)


def _solved(
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

    options = {"maxiter": _ITERATIONS, "gtol": _TOLERANCE}
    found = minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(labels, hidden + 1)
    return found[:, :hidden].astype(np.float32), found[:, hidden].astype(np.float32)
