"""What every task must say of itself, and the small values that pass between it and a run.

Outputs are float32[rows, outputs] as a version's head gives them: logits, or values in the units of the target.
Targets are int64[rows] for one label, float32[rows, labels] of zeros and ones for several, float32[rows] for numbers.
For entities both are objects, one for each text (`evaluation.tagged`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from finetune.data.targets import Metric
from finetune.evaluation.gates import Gate
from finetune.jobs.hyperparameters import GateOptions
from model_registry.card import TaskTerms
from modeling.heads import DenseLayer, TaskHead
from modeling.tasks import Calibration
from modeling.weights import FloatArray, IntArray

Targets = Any  # an array, see above
Extras = Mapping[str, Sequence[str | None]]


@dataclass(frozen=True, slots=True)
class Scale:
    """Targets are trained on as (target - mean) / deviation, and heads give them back in their own units."""

    mean: float = 0.0
    deviation: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self.mean == 0.0 and self.deviation == 1.0

    def standard(self, targets: Targets) -> Targets:
        standard = (targets - np.float32(self.mean)) / np.float32(self.deviation)
        return targets if self.is_identity else standard.astype(np.float32)

    def raw(self, outputs: FloatArray) -> FloatArray:
        return outputs if self.is_identity else outputs * np.float32(self.deviation) + np.float32(self.mean)

    def folded(self, head: TaskHead) -> TaskHead:
        """The head of standardised targets with the scale in its last layer."""
        return head if self.is_identity else self._rescaled(head, self.deviation, self.mean)

    def unfolded(self, head: TaskHead) -> TaskHead:
        return head if self.is_identity else self._rescaled(head, 1 / self.deviation, -self.mean / self.deviation)

    @staticmethod
    def _rescaled(head: TaskHead, factor: float, shift: float) -> TaskHead:
        *below, last = head.layers
        weight, bias = last.weight.astype(np.float64) * factor, last.bias.astype(np.float64) * factor + shift
        scaled = DenseLayer(weight.astype(np.float32), bias.astype(np.float32), last.activation)
        return TaskHead((*below, scaled), normalize=head.normalize)


@dataclass(frozen=True, slots=True)
class Side:
    """The rows of a side that are evaluated, with what belongs to them; `numbers` are theirs in their file."""

    outputs: FloatArray
    targets: Targets
    names: Sequence[str]
    extras: Extras
    answering: Calibration
    metric: Metric
    seed: int
    numbers: IntArray | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """Candidate and champion on rows that neither was trained or chosen on; `names` are the candidate's labels."""

    targets: Targets
    names: Sequence[str]
    outputs: FloatArray
    answering: Calibration
    champion_outputs: FloatArray
    champion_names: Sequence[str]
    champion_answering: Calibration
    metric: Metric
    options: GateOptions
    seed: int


class TaskRules(Protocol):
    """`figures` are the metrics of a manifest; `contest_gate` names the gate that compares with the champion.

    `fit_metric` is what tells a poor fit from a good one, and `least_fit` what it should reach on the training rows;
    None is the job's metric. `grows`: whether the worth of more rows is measured. `has_labels`: whether targets name
    any, `by_position`: whether outputs are of words and not of rows. `card` is what a model card says by the kind of
    task.
    """

    has_labels: bool = True
    by_position: bool = False
    card: TaskTerms
    figures: tuple[str, ...]
    contest_gate: str
    fit_metric: str | None = None
    least_fit: float = 0.8
    grows: bool = False

    def encode(self, labels: Sequence[Sequence[str]], numbers: Sequence[str], names: Sequence[str]) -> Targets:
        """`labels` are the names that each row's label gives, `numbers` the labels as they are."""

    def scale(self, targets: Targets) -> Scale:
        return Scale()

    def weights(self, wanted: Any, targets: Targets, names: Sequence[str]) -> FloatArray | None:
        """What `class_weights` comes to in the loss: a weight for each class, or for the positives of each label."""
        return None

    def score(self, metric: str, outputs: FloatArray, targets: Targets) -> float: ...
    def misses(self, outputs: FloatArray, targets: Targets) -> int:
        """On how many rows a perfect model would answer differently."""

    def loss(self, outputs: FloatArray, targets: Targets) -> float: ...

    def summary(self, outputs: FloatArray, targets: Targets) -> dict[str, float]:
        """The figures of outputs that no answering has been fitted for yet."""

    def calibrate(self, outputs: FloatArray, targets: Targets, *, with_temperature: bool) -> Calibration:
        return Calibration()

    def report(self, side: Side) -> dict[str, Any]: ...
    def curves(self, side: Side) -> dict[str, Any]: ...
    def tables(self, document: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[list[Any]]]:
        """Tables of a side's report that a version holds as csv, by name."""
        return {}

    def compare(self, side: Side, other: FloatArray) -> dict[str, Any]:
        """`difference` of the side's outputs to others, `gain` (above 0: better), `interval_95` and `p_value`."""

    def contest(self, contest: Contest) -> list[Gate]: ...
    def flips(self, one: FloatArray, other: FloatArray, answering: Calibration) -> int:
        """How many rows two engines' outputs answer differently."""

    def reference(self, outputs: FloatArray, names: Sequence[str], answering: Calibration) -> dict[str, Any]:
        """The answers on validation that later ones are compared with."""

    def counts(self, targets: Targets, names: Sequence[str]) -> dict[str, Any]:
        """What a fingerprint tells of a side's targets."""

    def golden(self, targets: Targets) -> list[int]:
        """Rows of every kind, by position."""
