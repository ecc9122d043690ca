"""Any number of labels a row: each is given where its probability reaches its threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evaluation import gates
from finetune.evaluation.bootstrap import Values
from finetune.evaluation.calibration import (
    binary_calibration_error,
    binary_row_losses,
    error_by_chance,
    fit_binary_temperature,
    if_it_helps,
    mean_binary_log_loss,
)
from finetune.evaluation.curves import one_against_rest
from finetune.evaluation.gates import Duel, Gate
from finetune.evaluation.intervals import ADDED, wilson
from finetune.evaluation.tasks.class_weights import positive_weights
from finetune.evaluation.tasks.rules import Contest, Side
from finetune.evaluation.tasks.summed import Summed
from finetune.evaluation.tasks.thresholds import fit_thresholds
from model_registry.card import TaskTerms
from modeling.tasks import DEFAULT_THRESHOLD, Calibration
from modeling.tasks.multi_label import MultiLabel
from modeling.weights import FloatArray

_MOST_CURVES = 50
_TASK = MultiLabel("", "")  # how outputs become answers does not depend on what goes in
_NEVER = np.float32(-1e4)  # the logit of a label that the champion does not know


class LabelSetRules(Summed):
    figures = ("micro_f1", "macro_f1", "subset_accuracy", "hamming_loss", "loss", "rows")
    card = TaskTerms(
        {"micro_f1": "micro F1", "macro_f1": "macro F1"}, "Labels with few rows have wide uncertainty.", figures
    )

    def encode(self, labels: Sequence[Sequence[str]], numbers: Sequence[str], names: Sequence[str]) -> FloatArray:
        index = {name: position for position, name in enumerate(names)}
        targets = np.zeros((len(labels), len(names)), np.float32)
        for row, own in enumerate(labels):
            targets[row, [index[name] for name in own]] = 1
        return targets

    def weights(self, wanted: Any, targets: FloatArray, names: Sequence[str]) -> FloatArray | None:
        return positive_weights(wanted, targets, names)

    def misses(self, outputs: FloatArray, targets: FloatArray) -> int:
        return int((self._answers(outputs, Calibration()) != (targets > 0)).any(1).sum())

    def loss(self, outputs: FloatArray, targets: FloatArray) -> float:
        return mean_binary_log_loss(outputs, targets)

    def parts(self, outputs: FloatArray, targets: FloatArray, answering: Calibration) -> Values:
        """Hits, labels given and labels due of each label, then the rows that are right in all and the wrong cells."""
        said, due = self._answers(outputs, answering), targets > 0
        wrong = (said != due).sum(1, keepdims=True)
        ones = np.ones((len(targets), 1))
        return np.concatenate([said & due, said, due, wrong == 0, wrong, ones], axis=1).astype(np.float64)

    def of_sums(self, sums: Values) -> Mapping[str, Values]:
        """F1 = 2 hits / (given + due). Labels without a row due do not count in macro F1, as classes without one."""
        labels = (sums.shape[1] - 3) // 3
        hits, given, due = (sums[:, place * labels : (place + 1) * labels] for place in range(3))
        right, wrong, rows = sums[:, -3], sums[:, -2], np.maximum(sums[:, -1], 1)
        f1 = 2 * hits / np.maximum(given + due, 1)
        present = due > 0
        return {
            "micro_f1": 2 * hits.sum(1) / np.maximum((given + due).sum(1), 1),
            "macro_f1": (f1 * present).sum(1) / np.maximum(present.sum(1), 1),
            "subset_accuracy": right / rows,
            "hamming_loss": wrong / (rows * max(1, labels)),
        }

    def added(self, parts: Values) -> Values:
        """Rows that are right in all, and rows that lack all that is due, each with the labels of a mean row."""
        labels = (parts.shape[1] - 3) // 3
        due, none = parts[:, 2 * labels : 3 * labels].mean(0), np.zeros(labels)
        right = np.concatenate([due, due, due, [1.0, 0.0, 1.0]])
        wrong = np.concatenate([none, none, due, [0.0, max(1.0, due.sum()), 1.0]])
        return np.stack([right] * ADDED + [wrong] * ADDED)

    def shares(self, parts: Values) -> dict[str, list[float]]:
        """And those of F1 where no label is due, so that nothing is known of it."""
        labels = (parts.shape[1] - 3) // 3
        unknown = {} if parts[:, 2 * labels : 3 * labels].any() else {"micro_f1": [0.0, 1.0], "macro_f1": [0.0, 1.0]}
        return {"subset_accuracy": wilson(int(parts[:, -3].sum()), len(parts)), **unknown}

    def _answers(self, outputs: FloatArray, answering: Calibration) -> Any:
        return _TASK.answers(_TASK.scores(outputs, answering), answering)

    def calibrate(self, outputs: FloatArray, targets: FloatArray, *, with_temperature: bool) -> Calibration:
        """The temperature first, then the thresholds of its probabilities."""
        temperature = 1.0
        if with_temperature:
            temperature = if_it_helps(fit_binary_temperature, binary_row_losses, outputs, targets)
        probabilities = _TASK.scores(outputs, Calibration(temperature))
        return Calibration(temperature, fit_thresholds(probabilities, targets))

    def report(self, side: Side) -> dict[str, Any]:
        temperature = side.answering.temperature
        return {
            **self.summed_report(side),
            "per_class": self._per_label(side),
            "ece_before": binary_calibration_error(side.outputs, side.targets),
            "ece_after": binary_calibration_error(side.outputs, side.targets, temperature=temperature),
            "ece_by_chance": error_by_chance(side.outputs, temperature=temperature, is_binary=True),
        }

    def _per_label(self, side: Side) -> list[dict[str, Any]]:
        said, due = self._answers(side.outputs, side.answering), side.targets > 0
        hits, given, rows = (said & due).sum(0), said.sum(0), due.sum(0)
        thresholds = side.answering.thresholds or (DEFAULT_THRESHOLD,) * len(side.names)
        return [
            {
                "label": name,
                "precision": float(hits[i] / max(1, given[i])) if rows[i] else None,
                "recall": float(hits[i] / rows[i]) if rows[i] else None,
                "f1": float(2 * hits[i] / (given[i] + rows[i])) if rows[i] else None,
                "rows": int(rows[i]),
                "threshold": thresholds[i],
            }
            for i, name in enumerate(side.names)
        ]

    def curves(self, side: Side) -> dict[str, Any]:
        """The precision-recall curves of the 50 most frequent labels."""
        probabilities = _TASK.scores(side.outputs, side.answering)
        counts = side.targets.sum(0)
        frequent = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]][:_MOST_CURVES]
        return {
            "precision_recall": [
                {"label": side.names[i], **one_against_rest(probabilities[:, i], side.targets[:, i] > 0)}
                for i in frequent
            ]
        }

    def contest(self, contest: Contest) -> list[Gate]:
        """The champion answers with its own thresholds; a label that it lacks it never gives."""
        known = {name: place for place, name in enumerate(contest.champion_names)}
        outputs = np.full_like(contest.outputs, _NEVER)
        theirs = contest.champion_answering
        given = theirs.thresholds or (DEFAULT_THRESHOLD,) * len(known)
        thresholds = [DEFAULT_THRESHOLD] * len(contest.names)
        for place, name in enumerate(contest.names):
            if name in known:
                outputs[:, place] = contest.champion_outputs[:, known[name]]
                thresholds[place] = given[known[name]]
        answering = Calibration(theirs.temperature, tuple(thresholds))
        duel = Duel(
            labels=contest.targets > 0,
            candidate=self._answers(contest.outputs, contest.answering),
            champion=self._answers(outputs, answering),
            names=contest.names,
            champion_names=contest.champion_names,
        )
        return [
            self.better(contest, outputs, answering),
            gates.label_drop(duel, most=contest.options.max_class_drop),
        ]

    def flips(self, one: FloatArray, other: FloatArray, answering: Calibration) -> int:
        return int((self._answers(one, answering) != self._answers(other, answering)).any(1).sum())

    def reference(self, outputs: FloatArray, names: Sequence[str], answering: Calibration) -> dict[str, Any]:
        """The share of rows that are given each label; the shares need not sum to one."""
        said = self._answers(outputs, answering)
        shares = said.mean(0) if len(said) else np.zeros(len(names))
        return {
            "rows": len(said),
            "answer_shares": dict(zip(names, shares.tolist(), strict=True)),
            "labels_per_row": float(said.sum(1).mean()) if len(said) else 0.0,
        }

    def counts(self, targets: FloatArray, names: Sequence[str]) -> dict[str, Any]:
        return dict(zip(names, targets.sum(0).astype(int).tolist(), strict=True))

    def golden(self, targets: FloatArray) -> list[int]:
        return list(dict.fromkeys(int(np.flatnonzero(column)[0]) for column in targets.T if column.any()))
