"""Tags of words and the entities that they mean: BIO, of which `I-` may only follow `B-` or `I-` of its own type.

Output 0 is O, 1 + 2t and 2 + 2t are the beginning and the inside of type t. Models from elsewhere may have learnt IOB1
or no beginnings at all: an entity may begin with its inside if nothing else explains it, and gets a beginning. Pure.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from modeling.weights import FloatArray

Tags = npt.NDArray[np.int64]
OUTSIDE = 0
_LEAST = np.float32(1e-30)  # a probability of 0 has no logarithm
_BARE_INSIDE = (
    3.0  # what an inside without a beginning costs, as a logarithm: less than any other tag there, if it is sure
)


class Run(NamedTuple):
    """An entity: its first word, the one behind its last, its type, and how sure the model is of the type."""

    first: int
    stop: int
    type: int
    score: float


def tag_names(labels: list[str] | tuple[str, ...]) -> list[str]:
    """Return the outputs' names in their order."""
    return ["O", *(f"{prefix}-{label}" for label in labels for prefix in "BI")]


def type_of(tags: Tags) -> Tags:
    """Return the type of each tag, -1 of O."""
    return (tags + 1) // 2 - 1


def decode(probabilities: FloatArray) -> list[Run]:
    """Return the entities of a text's words, float32[words, outputs], by the most probable legal tags.

    An entity's score is the mean over its words of the probability of its type, beginning or inside.
    """
    if not len(probabilities):
        return []
    tags = best_tags(probabilities)
    return [Run(first, stop, type_, _score(probabilities[first:stop], type_)) for first, stop, type_ in runs_of(tags)]


def _score(probabilities: FloatArray, type_: int) -> float:
    own = probabilities[:, 1 + 2 * type_ : 3 + 2 * type_].sum(axis=1, dtype=np.float64)
    return min(1.0, float(own.mean()))


def best_tags(probabilities: FloatArray) -> Tags:
    """Return the legal tags int64[words] with the highest product of probabilities (Viterbi, 1967), where an inside in
    the place of a beginning counts a twentieth."""
    tags: Tags = probabilities.argmax(axis=1).astype(np.int64)
    if are_legal(tags):
        return tags
    tags = _viterbi(np.log(np.maximum(probabilities, _LEAST)).astype(np.float64))
    found: Tags = tags - _are_bare(tags).astype(np.int64)
    return found


def are_legal(tags: Tags) -> bool:
    """Say whether each inside follows its own type."""
    return not _are_bare(tags).any()


def _are_bare(tags: Tags) -> npt.NDArray[np.bool_]:
    """Which words are the inside of an entity that did not begin."""
    before = np.concatenate([[OUTSIDE], tags[:-1]])
    is_inside = (tags > 0) & (tags % 2 == 0)
    return np.asarray(is_inside & (type_of(before) != type_of(tags)), np.bool_)


def _viterbi(scores: npt.NDArray[np.float64]) -> Tags:
    words, outputs = scores.shape
    begins, insides = np.arange(1, outputs, 2), np.arange(2, outputs, 2)
    came_from = np.zeros((words, outputs), np.int64)
    total = scores[0].copy()
    total[insides] -= _BARE_INSIDE
    for word in range(1, words):
        best = int(total.argmax())
        own = np.where(total[begins] >= total[insides], begins, insides)
        goes_on = total[own] >= total[best] - _BARE_INSIDE
        came_from[word] = best
        came_from[word, insides] = np.where(goes_on, own, best)
        reached = np.full(outputs, total[best])
        reached[insides] = np.where(goes_on, total[own], total[best] - _BARE_INSIDE)
        total = reached + scores[word]
    tags = np.zeros(words, np.int64)
    tags[-1] = total.argmax()
    for word in range(words - 1, 0, -1):
        tags[word - 1] = came_from[word, tags[word]]
    return tags


def runs_of(tags: Tags) -> list[tuple[int, int, int]]:
    """Return the first word, the one behind the last and the type of each entity that legal tags mean."""
    types = type_of(tags)
    before = np.concatenate([[-1], types[:-1]])
    starts = np.flatnonzero((types >= 0) & ((tags % 2 == 1) | (types != before)))
    is_end = np.ones(len(tags), bool)
    is_end[:-1] = (types[1:] != types[:-1]) | (tags[1:] % 2 == 1)
    stops = np.flatnonzero(is_end & (types >= 0)) + 1
    return list(zip(starts.tolist(), stops.tolist(), types[starts].tolist(), strict=True))


def tags_of(runs: list[tuple[int, int, int]], words: int) -> Tags:
    """Return the tags int64[words] of entities given as `runs_of` gives them."""
    tags = np.zeros(words, np.int64)
    for first, stop, type_ in runs:
        tags[first:stop] = 2 + 2 * type_
        tags[first] = 1 + 2 * type_
    return tags
