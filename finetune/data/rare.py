"""Classes with too few different inputs to be on every side of a split: kept for training, dropped, or merged.

Pure. Near duplicates count once, for they never part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from finetune.data.duplicates import Duplicates
from finetune.data.labelled import LabelledRows
from finetune.data.options import RareClasses
from finetune.data.records import Finding, row_finding
from finetune.data.targets.base import Keys, with_sizes
from modeling.inputs.text_identity import normalise

MERGED = "other"


def rare_names(rows: LabelledRows, groups: Keys, least: int) -> dict[str, int]:
    """The classes or labels with fewer than `least` different inputs, each with how many it has."""
    inputs = inputs_by_name(rows, groups)
    return {name: len(own) for name, own in inputs.items() if len(own) < least}


def inputs_by_name(rows: LabelledRows, groups: Keys) -> dict[str, set[int]]:
    """The groups of inputs of each class or label."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for label, group in zip(rows.labels, groups, strict=True):
        for name in rows.target.names_of(label):
            found[name].add(group)
    return found


def settle(
    given: Sequence[LabelledRows], duplicates: Duplicates, rare: RareClasses
) -> tuple[list[LabelledRows], Duplicates, list[Finding]]:
    """The rows of each side after `drop` or `other`, by the sizes of the classes in the first, the training rows."""
    train = given[0]
    if rare.policy == "keep" or not len(train):
        return list(given), duplicates, []
    sizes = rare_names(train, duplicates.group_of[: len(train)].tolist(), rare.least)
    if not sizes:
        return list(given), duplicates, []
    merged = _merged_name(train.names() - set(sizes))
    names: Mapping[str, str | None] = dict.fromkeys(sizes, merged if rare.policy == "other" else None)
    kept, left = [], []
    for rows in given:
        labels = [rows.target.relabelled(label, names) for label in rows.labels]
        places = np.flatnonzero([label is not None for label in labels]).astype(np.int64)
        kept.append(places)
        own = rows.take(places)
        left.append(replace(own, labels=[label for label in labels if label is not None]))
    offsets = np.cumsum([0, *map(len, given)])
    order = np.concatenate([places + offset for places, offset in zip(kept, offsets, strict=False)]).astype(np.int64)
    return left, duplicates.take(order), [_told(train, sizes, rare, merged)]


def _merged_name(others: set[str]) -> str:
    """`other`, or as the data spells a class of that name."""
    return min((name for name in others if normalise(name) == MERGED), default=MERGED)


def _told(train: LabelledRows, sizes: Mapping[str, int], rare: RareClasses, merged: str) -> Finding:
    what = "are merged into " + repr(merged) if rare.policy == "other" else "are left out"
    kind = "labels" if train.target.kind == "multi_label" else "classes"
    return row_finding(
        code="rare_class",
        severity="warning",
        rows=train.numbers_with(set(sizes)),
        count=len(sizes),
        message=f"{len(sizes):,} of {len(train.names()):,} {kind} with fewer than {rare.least} different "
        f"{train.modality.plural} (near duplicates count once) {what}, as rare_classes {rare.policy} asks: "
        f"{with_sizes(sizes)}",
        fix="nothing to do; add rows, or set a smaller min_rows_per_class or rare_classes keep, to train on them",
    )
