"""What a model of entities gave for a text, and what it should have given: values of any length, a row each.

Arrays of rows of different length are arrays of objects here, so that they are cut and joined like any other side's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.spans import words_in
from modeling.inputs.words import Offsets
from modeling.tasks import tagging
from modeling.weights import FloatArray, IntArray

Spans = npt.NDArray[np.int32]
"""int32[spans, 3]: start, end and type of each, in order."""
Ragged = npt.NDArray[Any]
"""One object a row."""


@dataclass(frozen=True)
class Tagged:
    """The words of a text, and what a head gave for each: `logits` float32[words, outputs]."""

    words: Offsets
    logits: FloatArray

    @cached_property
    def spans(self) -> Spans:
        """The entities of the most probable legal tags. No temperature changes them."""
        if not len(self.words):
            return np.zeros((0, 3), np.int32)
        shifted = self.logits - self.logits.max(axis=1, keepdims=True)
        runs = tagging.runs_of(tagging.best_tags(np.exp(shifted)))
        places = [(self.words[first, 0], self.words[stop - 1, 1], type_) for first, stop, type_ in runs]
        return np.asarray(places, np.int32).reshape(-1, 3)


def ragged(items: Iterable[Any]) -> Ragged:
    """Return an array of objects, one for each item."""
    found = list(items)
    array = np.empty(len(found), dtype=object)
    for place, item in enumerate(found):
        array[place] = item
    return array


def encode_spans(labels: Sequence[str], names: Sequence[str]) -> Ragged:
    """Return `Spans` for each label as `SpanTarget` writes it."""
    index = {name: place for place, name in enumerate(names)}
    return ragged(
        np.asarray([(start, end, index[name]) for start, end, name in json.loads(label)], np.int32).reshape(-1, 3)
        for label in labels
    )


def gold_tags(words: Offsets, spans: Spans) -> IntArray:
    """Return the tags int64[words] of spans; one that begins or ends within a word gets the whole word."""
    runs = []
    for start, end, type_ in spans.tolist():
        first, stop = words_in(words, start, end)
        if stop > first:
            runs.append((first, stop, type_))
    return tagging.tags_of(runs, len(words))


def renamed(outputs: Ragged, names: Sequence[str], into: Sequence[str], *, never: float) -> Ragged:
    """Return outputs of a model with these types as those of one with others: a type that it lacks it never gives, one
    that is not among `into` counts as outside."""
    known = {name: place for place, name in enumerate(names)}
    columns = [0, *(1 + 2 * known[name] + inside if name in known else -1 for name in into for inside in (0, 1))]
    foreign = [1 + 2 * known[name] + inside for name in names if name not in into for inside in (0, 1)]
    taken = np.asarray(columns)
    found = []
    for one in outputs:
        logits = np.where(taken >= 0, one.logits[:, np.maximum(taken, 0)], np.float32(never))
        if foreign:
            logits[:, 0] = np.logaddexp.reduce(one.logits[:, [0, *foreign]], axis=1)
        found.append(Tagged(one.words, logits.astype(np.float32)))
    return ragged(found)
