"""One class a row: the answer is the largest logit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evaluation import classification, curves, gates
from finetune.evaluation.calibration import fit_temperature, if_it_helps, negative_log_likelihood, row_losses
from finetune.evaluation.gates import Duel, Gate
from finetune.evaluation.intervals import mcnemar, paired_difference
from finetune.evaluation.slices import slices
from finetune.evaluation.tasks.class_weights import class_weights
from finetune.evaluation.tasks.rules import Contest, Side, TaskRules
from model_registry.card import TaskTerms
from modeling.heads import softmax
from modeling.tasks import Calibration
from modeling.weights import FloatArray, IntArray

_MOST_CURVES = 50


class ClassRules(TaskRules):
    figures = ("accuracy", "macro_f1", "weighted_f1", "loss", "rows")
    card = TaskTerms({"accuracy": "accuracy", "macro_f1": "macro F1"}, "Labels with few rows have wide uncertainty.")
    contest_gate = "mcnemar"
    grows = True

    def encode(self, labels: Sequence[Sequence[str]], numbers: Sequence[str], names: Sequence[str]) -> IntArray:
        index = {name: position for position, name in enumerate(names)}
        return np.asarray([index[name] for (name,) in labels], dtype=np.int64)

    def weights(self, wanted: Any, targets: IntArray, names: Sequence[str]) -> FloatArray | None:
        return class_weights(wanted, targets, names)

    def score(self, metric: str, outputs: FloatArray, targets: IntArray) -> float:
        return classification.score(metric, outputs, targets)

    def misses(self, outputs: FloatArray, targets: IntArray) -> int:
        return int((outputs.argmax(1) != targets).sum())

    def loss(self, outputs: FloatArray, targets: IntArray) -> float:
        return negative_log_likelihood(outputs, targets)

    def summary(self, outputs: FloatArray, targets: IntArray) -> dict[str, float]:
        return classification.summary(outputs, targets)

    def calibrate(self, outputs: FloatArray, targets: IntArray, *, with_temperature: bool) -> Calibration:
        return Calibration(if_it_helps(fit_temperature, row_losses, outputs, targets) if with_temperature else 1.0)

    def report(self, side: Side) -> dict[str, Any]:
        temperature = side.answering.temperature
        document = classification.report(
            side.outputs, side.targets, side.names, temperature=temperature, seed=side.seed
        )
        answers = side.outputs.argmax(1)
        document["slices"] = slices(side.extras, side.targets, answers, metric=side.metric.name, seed=side.seed)
        return document

    def curves(self, side: Side) -> dict[str, Any]:
        """Points of one side; the precision-recall curves of the 50 most frequent classes."""
        outputs, targets, temperature = side.outputs, side.targets, side.answering.temperature
        drawn = curves.precision_recall(outputs, targets, side.names)
        frequent = sorted(drawn, key=lambda one: -int((targets == side.names.index(one["label"])).sum()))
        return {
            "precision_recall": frequent[:_MOST_CURVES],
            "reliability": {
                "before": curves.reliability(outputs, targets, temperature=1.0),
                "after": curves.reliability(outputs, targets, temperature=temperature),
            },
            "risk_coverage": curves.risk_coverage(outputs, targets, temperature=temperature),
        }

    def tables(self, document: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[list[Any]]]:
        if "confusion_matrix" not in document:
            return {}
        rows = [[name, *row] for name, row in zip(names, document["confusion_matrix"], strict=True)]
        return {"confusion_matrix": [["", *names], *rows]}

    def compare(self, side: Side, other: FloatArray) -> dict[str, Any]:
        own, others = (outputs.argmax(1) == side.targets for outputs in (side.outputs, other))
        difference, interval = paired_difference(own, others, seed=side.seed)
        figures = {"metric": "accuracy", "test": "McNemar", "gain": difference}
        return {"difference": difference, "interval_95": interval, **mcnemar(own, others), **figures}

    def contest(self, contest: Contest) -> list[Gate]:
        duel = Duel(
            labels=contest.targets,
            candidate=contest.outputs.argmax(1),
            champion=gates.translated(contest.champion_outputs.argmax(1), contest.champion_names, contest.names),
            names=contest.names,
            champion_names=contest.champion_names,
        )
        options = contest.options
        return [
            gates.better(duel, significance=options.p_value),
            gates.class_drop(duel, most=options.max_class_drop),
        ]

    def flips(self, one: FloatArray, other: FloatArray, answering: Calibration) -> int:
        return int((one.argmax(1) != other.argmax(1)).sum())

    def reference(self, outputs: FloatArray, names: Sequence[str], answering: Calibration) -> dict[str, Any]:
        """Shares of answers and of confidence."""
        probabilities = softmax(outputs / np.float32(answering.temperature))
        answers = np.bincount(probabilities.argmax(1), minlength=len(names)) / max(1, len(probabilities))
        confidence, edges = np.histogram(probabilities.max(1), bins=10, range=(0.0, 1.0))
        return {
            "rows": len(probabilities),
            "answer_shares": dict(zip(names, answers.tolist(), strict=True)),
            "confidence_histogram": {"edges": edges.tolist(), "counts": confidence.tolist()},
            "mean_confidence": float(probabilities.max(1).mean()),
        }

    def counts(self, targets: IntArray, names: Sequence[str]) -> dict[str, Any]:
        return dict(zip(names, np.bincount(targets, minlength=len(names)).tolist(), strict=True))

    def golden(self, targets: IntArray) -> list[int]:
        return [int(np.flatnonzero(targets == label)[0]) for label in np.unique(targets)]
