"""May a version take the champion's place? Each gate is a pure function from figures to passed, failed or skipped.

A gate that lacks rows fails and says how many would do: nothing is promoted on a guess. A skipped gate does not apply
here, and is not in the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from finetune.data.targets import metric_of
from finetune.evaluation.intervals import least_discordant, mcnemar, rows_that_would_show
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
        message = f"too few rows tell the two apart: {tally}; at least {least} must differ for p {significance:g}, so "
        message += "bring a test_dataset with more rows that neither version has seen"
        return Gate("mcnemar", "failed", message, figures | {"least_discordant": least})
    z = (only_candidate - only_champion) / math.sqrt(discordant)
    return not_shown("mcnemar", tally, figures, rows=figures["rows"], z=z, significance=significance)


def not_shown(name: str, told: str, figures: dict[str, Any], *, rows: int, z: float, significance: float) -> Gate:
    """The candidate is not better beyond chance; if it is ahead (by `z` standard errors), with what would show it."""
    needed = rows_that_would_show(rows, z, significance=significance)
    if needed is None:
        advice = "it is not ahead on these rows"
    else:
        advice = f"if it stays as far ahead, some {max(needed, rows + 1)} shared rows would show it"
    message = f"not shown to be better than the champion: {told}; {advice}"
    return Gate(name, "failed", message, figures | {"rows_needed": needed})


def class_drop(duel: Duel, *, most: float) -> Gate:
    """No class loses more than `most` of recall or of F1 against the champion; those with few rows count together."""
    classes = np.arange(len(duel.names))
    labels, candidate, champion = (
        answers[:, None] == classes for answers in (duel.labels, duel.candidate, duel.champion)
    )
    return label_drop(replace(duel, labels=labels, candidate=candidate, champion=champion), most=most)


def label_drop(duel: Duel, *, most: float) -> Gate:
    """The same of several labels a row."""
    groups, unjudged = _judged_groups(duel)
    figures: dict[str, Any] = {"max_class_drop": most, "least_rows": LEAST_CLASS_ROWS, "not_judged": unjudged}
    if not groups:
        message = (
            "no row of a class that the champion knows is new to both versions: bring a test_dataset with such rows"
        )
        return Gate("class_drop", "failed", message, figures)
    drops = [_drop(duel, name, group) for name, group in groups.items()]
    worst = max(drops, key=lambda drop: max(drop["recall_drop"], drop["f1_drop"]))
    figures["classes"] = drops
    by = max(worst["recall_drop"], worst["f1_drop"])
    of = "recall" if worst["recall_drop"] >= worst["f1_drop"] else "F1"
    of_rows = "1 row" if worst["rows"] == 1 else f"{worst['rows']} rows"
    told = f"{worst['label']} loses {by:.4f} of {of} on {of_rows}"
    # A difference of two ratios may pass the limit by its last bit alone.
    if by > most + 1e-9:
        message = f"{told}, more than max_class_drop {most:g}"
        if (share := 1 / worst["rows"]) > most:
            message += f"; a single one of these rows counts {share:.2g}, so more test rows of this kind would help"
        return Gate("class_drop", "failed", message, figures)
    verb = f"at worst {told}" if by > 0 else "no class loses anything"
    return Gate("class_drop", "passed", f"{verb}; {len(drops)} judged, limit {most:g}", figures)


def _judged_groups(duel: Duel) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Classes to judge by what they are called: each with enough rows alone, the others together. And those that are
    not judged alone, with their rows."""
    known = set(duel.champion_names)
    rows = {index: int(duel.labels[:, index].sum()) for index, name in enumerate(duel.names) if name in known}
    groups = {duel.names[index]: [index] for index in rows if rows[index] >= LEAST_CLASS_ROWS}
    few = [index for index in rows if 0 < rows[index] < LEAST_CLASS_ROWS]
    together = sum(rows[index] for index in few)
    # Where no class has enough rows, what there is must do: McNemar's test says whether it does.
    if together >= LEAST_CLASS_ROWS or (together and not groups):
        named = "the class" if len(few) == 1 else f"the group of {len(few)} classes"
        groups[f"{named} with fewer than {LEAST_CLASS_ROWS} rows"] = few
    return groups, {duel.names[index]: count for index, count in rows.items() if count < LEAST_CLASS_ROWS}


def _drop(duel: Duel, name: str, group: Sequence[int]) -> dict[str, Any]:
    """What a class, or several taken together, lose against the champion."""
    own = duel.labels[:, group]
    due = int(own.sum())
    recall, f1 = [], []
    for said in (duel.candidate[:, group], duel.champion[:, group]):
        hits = int((said & own).sum())
        recall.append(hits / max(due, 1))
        f1.append(2 * hits / max(int(said.sum()) + due, 1))
    return {"label": name, "rows": due, "recall_drop": recall[1] - recall[0], "f1_drop": f1[1] - f1[0]}


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
