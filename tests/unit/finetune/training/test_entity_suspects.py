"""Words with a wrong tag are found among texts whose tags are right."""

from __future__ import annotations

import json

import numpy as np

from finetune.data.labelled import LabelledRows
from finetune.data.targets.spans import SpanTarget
from finetune.jobs.link import SilentLink
from finetune.training.entity_suspects import find_entity_suspects
from tests.support import entities


def test_swapped_types_and_missed_entities_are_suspects() -> None:
    rows = entities.rows(400)
    labels = [[[one["start"], one["end"], one["label"]] for one in row["spans"]] for row in rows]
    wrong = [number for number, own in enumerate(labels) if len(own) == 2][:12]
    for number in wrong[:6]:
        labels[number][0][2] = {"PER": "LOC", "LOC": "PER"}[labels[number][0][2]]
    for number in wrong[6:]:
        del labels[number][1]
    given = LabelledRows(
        np.arange(1, 401),
        [row["text"] for row in rows],
        list(map(json.dumps, labels)),
        {},
        SpanTarget("token-classification"),
    )
    found = find_entity_suspects(given, SilentLink(), seed=0, side="side")
    numbers = [one["row"] - 1 for one in found]
    assert len(set(wrong) & set(numbers)) >= 10, found
    assert len(found) <= 20
    assert all("[" in one["text"] and one["given"] != one["suggested"] for one in found)
    swapped = next(one for one in found if one["row"] - 1 == wrong[0])
    assert {swapped["given"], swapped["suggested"]} == {"PER", "LOC"}


def test_few_texts_are_not_searched() -> None:
    rows = LabelledRows(np.arange(3), ["a"] * 3, ["[]"] * 3, {}, SpanTarget("token-classification"))
    assert find_entity_suspects(rows, SilentLink(), seed=0, side="side") == []
