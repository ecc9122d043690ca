"""One number a row: the head's output is the value, in the units of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evaluation.bootstrap import Values
from finetune.evaluation.curves import thinned
from finetune.evaluation.gates import Gate
from finetune.evaluation.tasks.rules import Contest, Scale, Side
from finetune.evaluation.tasks.summed import Summed
from model_registry.card import TaskTerms
from modeling.tasks import Calibration
from modeling.weights import FloatArray

_MOST_POINTS = 1000
_BINS = 20
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_FLIP = 0.01  # of the standard deviation of the values


class NumberRules(Summed):
    has_labels = False
    figures = ("rmse", "mae", "r2", "loss", "rows")
    card = TaskTerms(
        {"rmse": "RMSE", "mae": "MAE", "r2": "R²"},
        "Values beyond those of the training rows are extrapolated.",
        figures,
    )
    fit_metric = "r2"
    least_fit = 0.5

    def encode(self, labels: Sequence[Sequence[str]], numbers: Sequence[str], names: Sequence[str]) -> FloatArray:
        return np.asarray([float(number) for number in numbers], dtype=np.float32)

    def scale(self, targets: FloatArray) -> Scale:
        deviation = float(targets.std(dtype=np.float64))
        return Scale(float(targets.mean(dtype=np.float64)), deviation if deviation > 0 else 1.0)

    def misses(self, outputs: FloatArray, targets: FloatArray) -> int:
        """No number is hit exactly."""
        return len(targets)

    def loss(self, outputs: FloatArray, targets: FloatArray) -> float:
        """Mean squared error over the variance of these rows: as large as a loss of standardised targets."""
        residuals = outputs[:, 0].astype(np.float64) - targets
        return float((residuals**2).mean() / max(float(targets.var(dtype=np.float64)), 1e-30))

    def parts(self, outputs: FloatArray, targets: FloatArray, answering: Calibration) -> Values:
        """Squared and absolute error, and the target around its mean to the powers 0, 1 and 2."""
        true = targets.astype(np.float64)
        residuals = outputs[:, 0] - true
        centred = true - true.mean() if len(true) else true
        return np.stack([residuals**2, np.abs(residuals), np.ones_like(true), centred, centred**2], axis=1)

    def of_sums(self, sums: Values) -> Mapping[str, Values]:
        squared, absolute, rows, first, second = sums.T
        rows = np.maximum(rows, 1)
        spread = second - first**2 / rows
        has_spread = spread > 1e-12 * second  # r2 of equal targets means nothing, and is given as 0
        r2 = np.where(has_spread, 1 - squared / np.where(has_spread, spread, 1), 0.0)
        return {"rmse": np.sqrt(squared / rows), "mae": absolute / rows, "r2": r2}

    def report(self, side: Side) -> dict[str, Any]:
        residuals = side.outputs[:, 0].astype(np.float64) - side.targets
        quantiles = np.quantile(residuals, _QUANTILES) if len(residuals) else np.zeros(len(_QUANTILES))
        return {
            **self.summed_report(side),
            "residuals": {
                "mean": float(residuals.mean()) if len(residuals) else 0.0,
                "quantiles": {f"{share:g}": float(value) for share, value in zip(_QUANTILES, quantiles, strict=True)},
            },
        }

    def curves(self, side: Side) -> dict[str, Any]:
        """True and predicted values of up to 1000 rows, evenly over the order of the true ones."""
        order = np.argsort(side.targets, kind="stable")
        kept = order[thinned(len(order), _MOST_POINTS)]
        return {
            "predicted": {
                "true": side.targets[kept].astype(float).tolist(),
                "predicted": side.outputs[kept, 0].astype(float).tolist(),
            }
        }

    def contest(self, contest: Contest) -> list[Gate]:
        skipped = Gate("class_drop", "skipped", "skipped: numbers have no classes")
        return [self.better(contest, contest.champion_outputs, contest.champion_answering), skipped]

    def flips(self, one: FloatArray, other: FloatArray, answering: Calibration) -> int:
        return int((np.abs(one - other) > _FLIP * float(one.std())).any(1).sum())

    def reference(self, outputs: FloatArray, names: Sequence[str], answering: Calibration) -> dict[str, Any]:
        """Mean, deviation and histogram of the values."""
        values = outputs[:, 0].astype(np.float64)
        counts, edges = np.histogram(values, bins=_BINS)
        return {
            "rows": len(values),
            "value_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "mean": float(values.mean()),
            "deviation": float(values.std()),
        }

    def counts(self, targets: FloatArray, names: Sequence[str]) -> dict[str, Any]:
        if not len(targets):
            return {}
        true = targets.astype(np.float64)
        return {"mean": true.mean(), "deviation": true.std(), "least": true.min(), "largest": true.max()}

    def golden(self, targets: FloatArray) -> list[int]:
        """The least, the largest and the middle value."""
        order = np.argsort(targets, kind="stable").tolist()
        return list(dict.fromkeys(order[place] for place in (0, len(order) // 2, -1))) if order else []
