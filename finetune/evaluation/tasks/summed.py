"""What tasks share whose metrics are functions of sums over rows: figures, intervals, slices, comparisons, the gate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from finetune.evaluation import bootstrap, gates
from finetune.evaluation.bootstrap import Values
from finetune.evaluation.gates import Gate
from finetune.evaluation.intervals import SAMPLES
from finetune.evaluation.slices import slices_by
from finetune.evaluation.tasks.rules import Contest, Side, Targets, TaskRules
from modeling.tasks import Calibration
from modeling.weights import FloatArray

LEAST_ROWS = 20  # below, a bootstrap's interval is a guess
LEAST_INTERVAL_ROWS = 10  # of figures that are not shares: below, none is given


class Summed(TaskRules):
    contest_gate = "paired_bootstrap"

    @abstractmethod
    def parts(self, outputs: FloatArray, targets: Targets, answering: Calibration) -> Values:
        """What each row adds to the sums: float64[rows, sums]."""

    @abstractmethod
    def of_sums(self, sums: Values) -> Mapping[str, Values]:
        """Each metric float64[samples] of sums float64[samples, sums]."""

    def added(self, parts: Values) -> Values | None:
        """Rows to draw beside those that were seen, without which a model that is never wrong always would be right;
        None if figures are not shares."""
        return None

    def shares(self, parts: Values) -> dict[str, list[float]]:
        """Intervals of the figures that are shares of the rows."""
        return {}

    def intervals(self, parts: Values, *, seed: int, samples: int = SAMPLES) -> dict[str, list[float]]:
        """95 % intervals [low, high] of the figures that the rows suffice for."""
        added = self.added(parts) if len(parts) else None
        if added is None and len(parts) < LEAST_INTERVAL_ROWS:
            return {}
        found = bootstrap.intervals(parts, self.of_sums, seed=seed, samples=samples, added=added)
        return found | self.shares(parts) if found else found

    def score(self, metric: str, outputs: FloatArray, targets: Targets) -> float:
        return self.summary(outputs, targets)[metric]

    def summary(
        self, outputs: FloatArray, targets: Targets, answering: Calibration = Calibration()
    ) -> dict[str, float]:
        found = bootstrap.measured(self.parts(outputs, targets, answering), self.of_sums)
        return {**found, "loss": self.loss(outputs, targets), "rows": float(len(outputs))}

    def summed_report(self, side: Side) -> dict[str, Any]:
        """Figures, their intervals, and the slices."""
        parts = self.parts(side.outputs, side.targets, side.answering)
        return {
            **self.summary(side.outputs, side.targets, side.answering),
            "intervals_95": self.intervals(parts, seed=side.seed),
            "slices": self._slices(side, parts),
        }

    def _slices(self, side: Side, parts: Values) -> list[dict[str, Any]]:
        name = side.metric.name

        def figure(inside: npt.NDArray[np.bool_]) -> tuple[float, list[float]]:
            own = parts[inside]
            value = bootstrap.measured(own, self.of_sums)[name]
            return value, self.intervals(own, seed=side.seed, samples=200)[name]

        return slices_by(side.extras, len(parts), figure, metric=side.metric)

    def compare(self, side: Side, other: FloatArray) -> dict[str, Any]:
        """Of outputs that no answering was fitted for, on either side."""
        own, others = (self.parts(outputs, side.targets, Calibration()) for outputs in (side.outputs, other))
        found = bootstrap.paired(own, others, self.of_sums, metric=side.metric, seed=side.seed)
        return {**found, "test": "paired bootstrap"}

    def better(self, contest: Contest, champion_outputs: FloatArray, champion_answering: Calibration) -> Gate:
        """The candidate's metric is better on the shared rows, and chance does not explain it (paired bootstrap)."""
        rows, limit = len(contest.targets), contest.options.p_value
        if rows < LEAST_ROWS:
            message = (
                f"{rows} shared rows are too few to compare on; {LEAST_ROWS} are needed: bring a test_dataset with "
            )
            message += f"{LEAST_ROWS - rows} more rows that neither version has seen"
            return Gate(self.contest_gate, "failed", message, {"rows": rows, "least_rows": LEAST_ROWS})
        own = self.parts(contest.outputs, contest.targets, contest.answering)
        others = self.parts(champion_outputs, contest.targets, champion_answering)
        figures = bootstrap.paired(own, others, self.of_sums, metric=contest.metric, seed=contest.seed)
        figures["limit"] = limit
        low, high = figures["interval_95"]
        told = (
            f"{contest.metric.name} differs by {figures['difference']:+.4f} (95 % interval {low:+.4f} to {high:+.4f}, "
            f"p {figures['p_value']:.4g}) on {rows} shared rows"
        )
        if figures["gain"] > 0 and figures["p_value"] <= limit:
            return Gate(self.contest_gate, "passed", f"better than the champion: {told}", figures)
        z = float(norm.isf(figures["p_value"] / 2)) if figures["gain"] > 0 else 0.0
        return gates.not_shown(self.contest_gate, told, figures, rows=rows, z=z, significance=limit)
