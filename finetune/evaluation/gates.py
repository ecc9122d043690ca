"""May a version take the champion's place? Each gate is a pure function from figures to passed, failed or skipped.

A gate that cannot be judged for want of rows fails and says so: nothing is promoted on a guess. A skipped
gate does not apply here, and is not in the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from finetune.data.targets import metric_of
from finetune.evaluation.intervals import least_discordant, mcnemar
from modeling.weights import IntArray

LEAST_CLASS_ROWS = 20
LEAST_COSINE = 0.999
MOST_FLIPS = 0.001
# An answer that the champion has no label for: it can only be wrong.
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Gate:
    name: str
    status: Literal["passed", "failed", "skipped"]
    message: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"gate": self.name, "status": self.status, "message": self.message, "figures": dict(self.figures)}


@dataclass(frozen=True, slots=True)
class Duel:
    """Both versions' answers on rows that neither was trained or chosen on, in the candidate's labels: int64[rows], or
    bool[rows, labels] where a row has several."""

    labels: npt.NDArray[Any]
    candidate: npt.NDArray[Any]
    champion: npt.NDArray[Any]
    names: Sequence[str]
    champion_names: Sequence[str]


def minimum(name: str, value: float, *, least: float, side: str) -> Gate:
    """The job's metric reaches the bar."""
    metric = metric_of(name)
    figures = {"metric": metric.name, "value": value, "min_metric": least, "side": side}
    is_reached = metric.reaches(value, least)
    short = "is above" if metric.is_error else "is below"
    message = f"{metric.name} {value:.4f} on {side} {'reaches' if is_reached else short} min_metric {least:g}"
    return Gate("min_metric", "passed" if is_reached else "failed", message, figures)


def better(duel: Duel, *, significance: float) -> Gate:
    """The candidate is right on more rows than the champion, and chance does not explain it (exact McNemar test)."""
    figures = mcnemar(duel.candidate == duel.labels, duel.champion == duel.labels)
    only_candidate, only_champion = figures.pop("only_first_right"), figures.pop("only_second_right")
    figures |= {"only_candidate_right": only_candidate, "only_champion_right": only_champion, "limit": significance}
    discordant, least = only_candidate + only_champion, least_discordant(significance)
    tally = f"on {figures['rows']} shared rows {only_candidate} only by the candidate and {only_champion} only by the "
    tally += f"champion answered right, p {figures['p_value']:.4g}"
    if only_candidate > only_champion and figures["p_value"] <= significance:
        return Gate("mcnemar", "passed", f"better than the champion: {tally}", figures)
    if discordant < least:
        message = f"too few rows tell the two apart: {tally}; at least {least} must differ for p {significance:g}"
        return Gate("mcnemar", "failed", message, figures | {"least_discordant": least})
    return Gate("mcnemar", "failed", f"not shown to be better than the champion: {tally}", figures)


def class_drop(duel: Duel, *, most: float) -> Gate:
    """No class with enough rows loses more than `most` of recall or of F1 against the champion."""
    classes = np.arange(len(duel.names))
    labels, candidate, champion = (
        answers[:, None] == classes for answers in (duel.labels, duel.candidate, duel.champion)
    )
    return label_drop(replace(duel, labels=labels, candidate=candidate, champion=champion), most=most)


def label_drop(duel: Duel, *, most: float) -> Gate:
    """The same of several labels a row: no label that enough rows are due."""
    known = set(duel.champion_names)
    rows = {index: int(duel.labels[:, index].sum()) for index, name in enumerate(duel.names) if name in known}
    judged = [index for index in rows if rows[index] >= LEAST_CLASS_ROWS]
    unjudged = {duel.names[index]: rows[index] for index in rows if index not in judged}
    figures: dict[str, Any] = {"max_class_drop": most, "least_rows": LEAST_CLASS_ROWS, "not_judged": unjudged}
    if not judged:
        message = f"no class has {LEAST_CLASS_ROWS} rows that neither version was trained on"
        return Gate("class_drop", "failed", message, figures)
    drops = _drops(duel, judged)
    worst = max(drops, key=lambda drop: max(drop["recall_drop"], drop["f1_drop"]))
    figures["classes"] = drops
    by = max(worst["recall_drop"], worst["f1_drop"])
    of = "recall" if worst["recall_drop"] >= worst["f1_drop"] else "F1"
    told = f"{worst['label']} loses {by:.4f} of {of} on {worst['rows']} rows"
    # A difference of two ratios may pass the limit by its last bit alone.
    if by > most + 1e-9:
        return Gate("class_drop", "failed", f"{told}, more than max_class_drop {most:g}", figures)
    verb = f"at worst {told}" if by > 0 else "no class loses anything"
    return Gate("class_drop", "passed", f"{verb}; {len(judged)} classes judged, limit {most:g}", figures)


def _drops(duel: Duel, judged: Sequence[int]) -> list[dict[str, Any]]:
    due = duel.labels.sum(0)
    recall, f1 = [], []
    for said in (duel.candidate, duel.champion):
        hits = (said & duel.labels).sum(0)
        recall.append(hits / np.maximum(due, 1))
        f1.append(2 * hits / np.maximum(said.sum(0) + due, 1))
    return [
        {
            "label": duel.names[index],
            "rows": int(due[index]),
            "recall_drop": float(recall[1][index] - recall[0][index]),
            "f1_drop": float(f1[1][index] - f1[0][index]),
        }
        for index in judged
    ]


def parity(engine: str, *, rows: int, flips: int, least_cosine: float) -> Gate:
    """A serving engine answers as the reference does: at most 0.1 % of the labels differ, no vector turns away."""
    allowed = int(MOST_FLIPS * rows)
    figures = {"engine": engine, "rows": rows, "flips": flips, "allowed_flips": allowed, "least_cosine": least_cosine}
    told = f"{flips} of {rows} answers of {engine} differ from torch's, least cosine {least_cosine:.6f}"
    is_same = flips <= allowed and least_cosine >= LEAST_COSINE
    return Gate("engine_parity", "passed" if is_same else "failed", told, figures)


def is_passed(gates: Sequence[Gate]) -> bool:
    return not any(gate.status == "failed" for gate in gates)


def shared_rows(
    hashes: Sequence[str], *, seen: frozenset[str], champion_seen: frozenset[str] | None
) -> tuple[IntArray, dict[str, int]]:
    """Positions of the rows that neither version has seen, equal inputs once, and how many of each kind went.

    `champion_seen` None: it is unknown what the champion was trained on, so no row qualifies.
    """
    kept: dict[str, int] = {}
    dropped = {"equal": 0, "seen_by_candidate": 0, "seen_by_champion": 0}
    for position, hash_ in enumerate(hashes):
        if hash_ in seen:
            dropped["seen_by_candidate"] += 1
        elif champion_seen is None or hash_ in champion_seen:
            dropped["seen_by_champion"] += 1
        elif hash_ in kept:
            dropped["equal"] += 1
        else:
            kept[hash_] = position
    return np.asarray(list(kept.values()), dtype=np.int64), dropped


def translated(answers: IntArray, names: Sequence[str], into: Sequence[str]) -> IntArray:
    """Class indices among `names` as indices among `into`; -1 for a class that `into` lacks."""
    places = {name: place for place, name in enumerate(into)}
    table = np.asarray([places.get(name, UNKNOWN) for name in names], dtype=np.int64)
    return np.asarray(table[answers], dtype=np.int64)
