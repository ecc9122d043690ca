"""Entities: strict F1 over spans, an entity counts if its start, its end and its type are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evaluation import gates
from finetune.evaluation.bootstrap import Values
from finetune.evaluation.calibration import (
    error_by_chance,
    expected_calibration_error,
    fit_temperature,
    if_it_helps,
    row_losses,
)
from finetune.evaluation.gates import Duel, Gate
from finetune.evaluation.intervals import ADDED, wilson
from finetune.evaluation.tagged import Ragged, Spans, encode_spans, gold_tags, renamed
from finetune.evaluation.tasks.rules import Contest, Side
from finetune.evaluation.tasks.summed import Summed
from model_registry.card import TaskTerms
from modeling.tasks import Calibration
from modeling.weights import FloatArray, IntArray

_NEVER = -30.0  # the logit of a type that the champion does not know
_MOST_WORDS = 50_000  # that a temperature is fitted on
_WORST = 20
_NO_TYPE = "(none)"


class EntityRules(Summed):
    by_position = True
    figures = ("entity_f1", "macro_f1", "precision", "recall", "loss", "rows")
    card = TaskTerms(
        {"entity_f1": "entity F1", "macro_f1": "macro F1"},
        "An entity counts if its start, its end and its type are right. Types with few entities have wide uncertainty.",
        figures,
    )

    def encode(self, labels: Sequence[Sequence[str]], numbers: Sequence[str], names: Sequence[str]) -> Ragged:
        return encode_spans(numbers, names)

    def misses(self, outputs: Ragged, targets: Ragged) -> int:
        return sum(not np.array_equal(one.spans, due) for one, due in zip(outputs, targets, strict=True))

    def loss(self, outputs: Ragged, targets: Ragged) -> float:
        """The mean over texts of the mean negative log-likelihood of their words' tags."""
        losses = [
            float(row_losses(one.logits, gold_tags(one.words, due)).mean())
            for one, due in zip(outputs, targets, strict=True)
            if len(one.words)
        ]
        return float(np.mean(losses)) if losses else 0.0

    def parts(self, outputs: Ragged, targets: Ragged, answering: Calibration) -> Values:
        """Hits, entities given and entities due of each type, then texts that are right in all."""
        types = _types(outputs)
        found = np.zeros((len(targets), 3 * types + 2))
        for row, (one, due) in enumerate(zip(outputs, targets, strict=True)):
            said = one.spans
            hits = _hits(said, due)
            for place, spans in enumerate((hits, said, due)):
                found[row, place * types : (place + 1) * types] = np.bincount(spans[:, 2], minlength=types)[:types]
            found[row, -2:] = float(len(hits) == len(said) == len(due)), 1.0
        return found

    def of_sums(self, sums: Values) -> Mapping[str, Values]:
        """F1 = 2 hits / (given + due). Types without an entity due do not count in macro F1."""
        types = (sums.shape[1] - 2) // 3
        hits, given, due = (sums[:, place * types : (place + 1) * types] for place in range(3))
        f1 = 2 * hits / np.maximum(given + due, 1)
        present = due > 0
        return {
            "entity_f1": 2 * hits.sum(1) / np.maximum((given + due).sum(1), 1),
            "macro_f1": (f1 * present).sum(1) / np.maximum(present.sum(1), 1),
            "precision": hits.sum(1) / np.maximum(given.sum(1), 1),
            "recall": hits.sum(1) / np.maximum(due.sum(1), 1),
            "right_texts": sums[:, -2] / np.maximum(sums[:, -1], 1),
        }

    def added(self, parts: Values) -> Values:
        """Texts that are right in all, and texts that lack all that is due, each with the entities of a mean text."""
        types = (parts.shape[1] - 2) // 3
        due, none = parts[:, 2 * types : 3 * types].mean(0), np.zeros(types)
        right, wrong = np.concatenate([due, due, due, [1.0, 1.0]]), np.concatenate([none, none, due, [0.0, 1.0]])
        return np.stack([right] * ADDED + [wrong] * ADDED)

    def shares(self, parts: Values) -> dict[str, list[float]]:
        """And those of the figures of which nothing is known, as no entity is due."""
        types = (parts.shape[1] - 2) // 3
        unknown = {} if parts[:, 2 * types : 3 * types].any() else {key: [0.0, 1.0] for key in self.figures[:4]}
        return {"right_texts": wilson(int(parts[:, -2].sum()), len(parts)), **unknown}

    def calibrate(self, outputs: Ragged, targets: Ragged, *, with_temperature: bool) -> Calibration:
        if not with_temperature:
            return Calibration()
        logits, tags = _words(outputs, targets)
        return Calibration(if_it_helps(fit_temperature, row_losses, logits, tags))

    def report(self, side: Side) -> dict[str, Any]:
        temperature = side.answering.temperature
        logits, tags = _words(side.outputs, side.targets)
        said = [one.spans for one in side.outputs]
        return {
            **self.summed_report(side),
            "per_class": self._per_type(side),
            "confusion": _confusion(said, side.targets, side.names),
            "worst": _worst(said, side),
            "ece_before": expected_calibration_error(logits, tags) if len(tags) else 0.0,
            "ece_after": expected_calibration_error(logits, tags, temperature=temperature) if len(tags) else 0.0,
            "ece_by_chance": error_by_chance(logits, temperature=temperature),
        }

    def _per_type(self, side: Side) -> list[dict[str, Any]]:
        types = len(side.names)
        sums = self.parts(side.outputs, side.targets, side.answering).sum(0)
        hits, given, due = (sums[place * types : (place + 1) * types] for place in range(3))
        return [
            {
                "label": name,
                "precision": float(hits[i] / max(1.0, given[i])) if due[i] else None,
                "recall": float(hits[i] / due[i]) if due[i] else None,
                "f1": float(2 * hits[i] / (given[i] + due[i])) if due[i] else None,
                "rows": int(due[i]),
            }
            for i, name in enumerate(side.names)
        ]

    def curves(self, side: Side) -> dict[str, Any]:
        return {}

    def tables(self, document: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[list[Any]]]:
        titles = [*names, _NO_TYPE]
        rows = [[name, *row] for name, row in zip(titles, document["confusion"], strict=True)]
        return {"confusion": [["", *titles], *rows]}

    def contest(self, contest: Contest) -> list[Gate]:
        outputs = renamed(contest.champion_outputs, contest.champion_names, contest.names, never=_NEVER)
        said, theirs = ([one.spans for one in of_one] for of_one in (contest.outputs, outputs))
        duel = _duel(contest, said, theirs)
        return [
            self.better(contest, outputs, contest.champion_answering),
            gates.label_drop(duel, most=contest.options.max_class_drop),
        ]

    def flips(self, one: Ragged, other: Ragged, answering: Calibration) -> int:
        return sum(not np.array_equal(a.spans, b.spans) for a, b in zip(one, other, strict=True))

    def reference(self, outputs: Ragged, names: Sequence[str], answering: Calibration) -> dict[str, Any]:
        """How the entities given share out among the types, and how many a text is given."""
        given = np.zeros(len(names))
        for one in outputs:
            given += np.bincount(one.spans[:, 2], minlength=len(names))
        shares = given / max(1.0, given.sum())
        return {
            "rows": len(outputs),
            "answer_shares": dict(zip(names, shares.tolist(), strict=True)),
            "labels_per_row": float(given.sum() / max(1, len(outputs))),
        }

    def counts(self, targets: Ragged, names: Sequence[str]) -> dict[str, Any]:
        due = np.zeros(len(names), np.int64)
        for spans in targets:
            due += np.bincount(spans[:, 2], minlength=len(names))
        return dict(zip(names, due.tolist(), strict=True))

    def golden(self, targets: Ragged) -> list[int]:
        firsts: dict[int, int] = {}
        for row, spans in enumerate(targets):
            for type_ in spans[:, 2].tolist():
                firsts.setdefault(type_, row)
        return list(dict.fromkeys(firsts.values()))


def _types(outputs: Ragged) -> int:
    """How many types the outputs are of."""
    return (outputs[0].logits.shape[1] - 1) // 2 if len(outputs) else 0


def _hits(said: Spans, due: Spans) -> Spans:
    """The entities that are right."""
    wanted = set(map(tuple, due.tolist()))
    return np.asarray([span for span in said.tolist() if tuple(span) in wanted], np.int32).reshape(-1, 3)


def _words(outputs: Ragged, targets: Ragged) -> tuple[FloatArray, IntArray]:
    """The logits and the tags of words of all texts, evenly chosen if they are many."""
    if not len(outputs):
        return np.zeros((0, 1), np.float32), np.zeros(0, np.int64)
    logits = np.concatenate([one.logits for one in outputs])
    tags = np.concatenate([gold_tags(one.words, due) for one, due in zip(outputs, targets, strict=True)])
    if len(tags) > _MOST_WORDS:
        chosen = np.unique(np.linspace(0, len(tags) - 1, _MOST_WORDS).astype(np.int64))
        logits, tags = logits[chosen], tags[chosen]
    return logits, tags


def _confusion(said: Sequence[Spans], targets: Ragged, names: Sequence[str]) -> list[list[int]]:
    """Entities due, by row, against those given at the same place, by column; the last of either is none."""
    counts = np.zeros((len(names) + 1, len(names) + 1), np.int64)
    for given, due in zip(said, targets, strict=True):
        answers = {(start, end): type_ for start, end, type_ in given.tolist()}
        wanted = {(start, end): type_ for start, end, type_ in due.tolist()}
        for place in {*answers, *wanted}:
            counts[wanted.get(place, len(names)), answers.get(place, len(names))] += 1
    found: list[list[int]] = counts.tolist()
    return found


def _worst(said: Sequence[Spans], side: Side) -> list[dict[str, Any]]:
    """The texts with the most mistakes: what was missed and what was given in vain."""
    mistakes: Counter[int] = Counter()
    for row, (given, due) in enumerate(zip(said, side.targets, strict=True)):
        right = len(_hits(given, due))
        if wrong := len(given) + len(due) - 2 * right:
            mistakes[row] = wrong
    ranked = sorted(mistakes, key=lambda row: (-mistakes[row], row))[:_WORST]
    numbers = range(len(said)) if side.numbers is None else side.numbers.tolist()
    return [
        {
            "row": int(numbers[row]),
            "mistakes": mistakes[row],
            "missed": _without(side.targets[row], said[row], side.names),
            "in_vain": _without(said[row], side.targets[row], side.names),
        }
        for row in ranked
    ]


def _without(spans: Spans, others: Spans, names: Sequence[str]) -> list[dict[str, Any]]:
    known = set(map(tuple, others.tolist()))
    return [
        {"start": start, "end": end, "label": names[type_]}
        for start, end, type_ in spans.tolist()
        if (start, end, type_) not in known
    ]


def _duel(contest: Contest, said: Sequence[Spans], theirs: Sequence[Spans]) -> Duel:
    """Each place where an entity is due or was given is a row, and what is there its labels."""
    places: dict[tuple[int, int, int], int] = {}
    for row, several in enumerate(zip(contest.targets, said, theirs, strict=True)):
        for spans in several:
            for start, end, _ in spans.tolist():
                places.setdefault((row, start, end), len(places))

    def labels(of_rows: Sequence[Spans]) -> Any:
        found = np.zeros((len(places), len(contest.names)), bool)
        for row, spans in enumerate(of_rows):
            for start, end, type_ in spans.tolist():
                found[places[row, start, end], type_] = True
        return found

    return Duel(
        labels=labels(list(contest.targets)),
        candidate=labels(said),
        champion=labels(theirs),
        names=contest.names,
        champion_names=contest.champion_names,
    )
