"""Ridge regression on pooled vectors: the probe of a number a row."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits

from finetune.training.methods.logistic import Fit, folded_head, standardisation
from finetune.training.run_context import Run
from modeling.weights import FloatArray

# One over the penalty, on standardised vectors, from strong to weak.
STRENGTHS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)


def fit(run: Run, features: FloatArray, targets: FloatArray, *, strength: float, start: Fit | None = None) -> Fit:
    """In closed form, so `start` changes nothing; the head gives values in the units of the target."""
    mean, scale = standardisation(features)
    model = Ridge(alpha=1 / strength)
    with threadpool_limits(1):
        model.fit(((features - mean) / scale).astype(np.float64), targets.astype(np.float64))
    weight, bias = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
    return Fit(folded_head(weight, bias, mean, scale), strength, weight, bias)
