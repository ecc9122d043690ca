"""Entities: stretches of a text, each with a label. A head tags the words; legal tags become entities.

A text of any length is read in windows, each word answered for by the window in which it is furthest from an edge, and
decoded once. An entity's text is always what the input has between its offsets.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from msgspec import UNSET, Struct

from modeling.heads import softmax
from modeling.inputs.words import LOCATED, Located, Offsets, utf16_offsets
from modeling.tasks import tagging
from modeling.tasks.base import Answer, Answers, Calibration, Embedding, Options, RowOutput, Task
from modeling.tasks.parity import is_near_in_fp32, temperature_of
from modeling.weights import FloatArray

_FAR, _CLEAR = 0.1, 0.2  # probabilities of golden rows in lower precision, and of the winner before the second


class Entity(Struct, gc=False):
    """`text` is `input[start:end]`; with `offset_unit: utf16` start and end count UTF-16 units."""

    start: int
    end: int
    label: str
    score: float
    text: str


class Entities(Answer, omit_defaults=True):
    """`entities` are in the order of the text."""

    entities: list[Entity]
    embedding: Embedding = UNSET


@dataclass(frozen=True, slots=True)
class TokenLabels(Task):
    """`labels` are the types of entities; a head has an output for O and two for each type."""

    kind: ClassVar[str] = "token_labels"
    needs: ClassVar[Literal["pooled", "states"]] = "states"
    answer_column: ClassVar[str] = "spans"
    reads_windows: ClassVar[bool] = True
    options: ClassVar[frozenset[str]] = frozenset({"threshold", "aggregation_strategy", "offset_unit"})
    observes: ClassVar[tuple[str, ...]] = ("confidence", "labels")
    answer_type: ClassVar[type[Answer]] = Entities

    def outputs(self, labels: Sequence[str]) -> int:
        return 1 + 2 * len(labels)

    def calibration(
        self, document: Mapping[str, Any], labels: Sequence[str], reference: Mapping[str, Any] | None
    ) -> Calibration:
        if document.get("thresholds") is not None:
            raise ValueError(f"thresholds are for several labels, not for {self.name}")
        return Calibration(temperature_of(document))

    def scores(self, logits: FloatArray, calibration: Calibration) -> FloatArray:
        """Probabilities float32[positions, outputs] that share 1 among the tags."""
        return softmax(logits / np.float32(calibration.temperature))

    def answers(self, scores: FloatArray, calibration: Calibration) -> Answers:
        """The most probable tag, int64[positions], legal or not."""
        return np.asarray(scores.argmax(axis=1), np.int64)

    def reduce(
        self, rows: Sequence[RowOutput], labels: Sequence[str], calibration: Calibration, options: Options
    ) -> Entities:
        """By `aggregation_strategy`, Hugging Face's names for how a word's pieces become one: its `first` one, their
        `average`, the surest (`max`); `simple` groups pieces whatever their words, `none` answers each piece with its
        tag."""
        located = [row.extra[LOCATED] for row in rows]
        scores, offsets = units([row.scores for row in rows], located, options.aggregation_strategy or "first")
        text = located[0].text
        if options.aggregation_strategy == "none":
            names, tags = tagging.tag_names(tuple(labels)), scores.argmax(axis=1)
            found = [(unit, unit + 1, names[tag], float(scores[unit, tag])) for unit, tag in enumerate(tags) if tag]
        else:
            found = [(run.first, run.stop, labels[run.type], run.score) for run in tagging.decode(scores)]
        least = options.threshold or 0.0
        kept = [one for one in found if one[3] >= least and offsets[one[0], 0] < offsets[one[1] - 1, 1]]
        places = np.asarray([(offsets[first, 0], offsets[stop - 1, 1]) for first, stop, *_ in kept], np.int32)
        shown = utf16_offsets(text, places) if options.offset_unit == "utf16" and kept else places
        return Entities(
            0,
            [
                Entity(start, end, label, score, text[slice(*place)])
                for (*_, label, score), place, (start, end) in zip(kept, places.tolist(), shown.tolist(), strict=True)
            ],
        )

    def observed(self, answers: Sequence[Entities], calibration: Calibration) -> Sequence[Sequence[float]]:
        scores = [entity.score for answer in answers for entity in answer.entities]
        return scores, [len(answer.entities) for answer in answers]

    def same(self, wanted: FloatArray, got: FloatArray, calibration: Calibration, *, precision: str) -> bool:
        """In fp32 by logits; else no probability is far off, and a clear tag stays."""
        if precision == "fp32":
            is_known = np.ptp(wanted, axis=0) > 0  # not those that an imported checkpoint never gives
            return is_near_in_fp32(wanted[:, is_known], got[:, is_known]) if is_known.any() else True
        p, q = self.scores(wanted, calibration), self.scores(got, calibration)
        ordered = np.sort(p, axis=1)
        is_clear = ordered[:, -1] - ordered[:, -2] > _CLEAR
        return bool(np.abs(p - q).max() <= _FAR and not (p.argmax(1) != q.argmax(1))[is_clear].any())


def units(scores: Sequence[FloatArray], located: Sequence[Located], strategy: str) -> tuple[FloatArray, Offsets]:
    """Return what is decoded, float32[units, outputs], words or pieces of the whole text, and the place of each.

    `scores` are those of each window's positions.
    """
    parts = [_in_window(own, where, strategy) for own, where in zip(scores, located, strict=True)]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([own for own, _ in parts]), np.concatenate([places for _, places in parts])


def _in_window(scores: FloatArray, where: Located, strategy: str) -> tuple[FloatArray, Offsets]:
    if strategy in {"simple", "none"}:
        return _whole_characters(scores[where.begin : where.begin + len(where.pieces)], where)
    if strategy == "first":
        return scores[where.first], where.words
    if strategy == "average":
        sums = np.concatenate([np.zeros((1, scores.shape[1])), np.cumsum(scores, axis=0, dtype=np.float64)])
        counts = (where.stop - where.first)[:, None]
        return ((sums[where.stop] - sums[where.first]) / counts).astype(np.float32), where.words
    assert strategy == "max", strategy
    surest = scores.max(axis=1)
    chosen = [
        first + int(surest[first:stop].argmax())
        for first, stop in zip(where.first.tolist(), where.stop.tolist(), strict=True)
    ]
    return scores[np.asarray(chosen, np.int64)], where.words


def _whole_characters(scores: FloatArray, where: Located) -> tuple[FloatArray, Offsets]:
    """Pieces that are parts of one character are one, by their mean."""
    if not len(where.pieces):
        return scores, where.pieces
    is_new = np.ones(len(where.pieces), bool)
    is_new[1:] = (where.pieces[1:] != where.pieces[:-1]).any(axis=1)
    firsts = np.flatnonzero(is_new)
    sums = np.add.reduceat(scores, firsts, axis=0)
    counts = np.diff([*firsts.tolist(), len(where.pieces)])
    return (sums / counts[:, None]).astype(np.float32), _trimmed(where.text, where.pieces[firsts])


def _trimmed(text: str, places: Offsets) -> Offsets:
    """Places without the blanks that some tokenizers count to what follows, and with the marks that some leave out."""
    found = places.copy()
    for row, (start, end) in enumerate(places.tolist()):
        piece = text[start:end]
        first, last = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
        while first < last < len(text) and unicodedata.category(text[last]).startswith("M"):
            last += 1
        found[row] = first, max(first, last)
    return found
