"""Rows with the same input, or nearly the same. Pure; row order and the clock do not matter.

Inputs are the same if their modality gives them one digest. They are near duplicates if the Jaccard similarity of
their sets of hashes (`SHINGLINGS`) is at least 0.8; a modality without such sets has none. Candidates come from
MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3): 16 bands
of 4 find a pair at 0.8 with probability 0.9998, one at 0.9 with certainty for all that matters. Every candidate is
then compared exactly, so nothing is merged by chance.

Near duplicates of near duplicates belong together too, but such chains can run through a whole dataset of
form letters. A group above `largest_group` is therefore cut: inputs gather around one each that they
are near duplicates of themselves, in groups no larger than that; what is left over stays alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from finetune.data.hash_sets import HashSets, batches, mix
from finetune.data.text_shingles import shingle_hashes
from modeling.inputs import Example, Modality

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_BANDS, _BAND_ROWS = 16, 4
_LEADERS = 16  # rounds in which a bucket's first input is compared with the others, and of cutting a group
_SEED = 20_260_101


@dataclass(frozen=True, slots=True)
class Shingling:
    """How examples of a modality become sets of hashes, and what the sets hold, in the words of messages."""

    hashes: Callable[[Sequence[Example]], HashSets]
    holds: str


SHINGLINGS: Final[dict[str, Shingling]] = {"text": Shingling(shingle_hashes, "runs of three words")}


@dataclass(frozen=True, slots=True)
class Duplicates:
    """`input_of[i]` numbers row `i`'s input, `group_of[i]` its group of near duplicates, both int64[rows].

    `digests[n]` is the digest of input `n`; inputs are numbered in the order of their digests, groups in the order
    of their smallest one, so neither depends on row order.
    """

    input_of: Indices
    group_of: Indices
    digests: list[bytes]
    is_cut: bool = False

    def take(self, rows: Indices) -> Duplicates:
        """What is known of these rows; numbers and digests stay as they are."""
        return Duplicates(self.input_of[rows], self.group_of[rows], self.digests, self.is_cut)


def largest_group(inputs: int) -> int:
    """How many different inputs may form a group: a twentieth of all, at least 10."""
    return max(10, inputs // 20)


def find_duplicates(examples: Sequence[Example], modality: Modality) -> Duplicates:
    """Exact and near duplicates among all rows.

    Time and memory grow linearly: some 20 µs and 200 bytes a row of ten words beside the examples.
    """
    input_of, firsts, digests = _exact(examples, modality)
    shingling = SHINGLINGS.get(modality.name)
    if len(digests) == 0 or shingling is None:
        return Duplicates(input_of, input_of.copy(), digests)
    labels, is_cut = _near(_Inputs([examples[row] for row in firsts.tolist()], modality, shingling))
    return Duplicates(input_of, _numbered(labels)[input_of], digests, is_cut)


def _exact(examples: Sequence[Example], modality: Modality) -> tuple[Indices, Indices, list[bytes]]:
    """The number of each row's input, a row of each input, and the digests in order."""
    if not examples:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), []
    # Fixed-width strings compare as bytes; the zero bytes that numpy drops at the end it drops on both sides.
    joined = np.frombuffer(b"".join(map(modality.digest, examples)), "S16")
    unique, firsts, input_of = np.unique(joined, return_index=True, return_inverse=True)
    raw = unique.tobytes()
    return input_of.astype(np.int64), firsts, [raw[start : start + 16] for start in range(0, len(raw), 16)]


class _Inputs:
    """Different examples in the order of their digests, with their sizes."""

    def __init__(self, examples: list[Example], modality: Modality, shingling: Shingling) -> None:
        self.examples, self.hashes = examples, shingling.hashes
        self.sizes = np.fromiter(map(modality.size, examples), np.int64, len(examples)) + 1

    def sets(self, numbers: Indices) -> HashSets:
        return self.hashes([self.examples[number] for number in numbers.tolist()]).as_sets()


def _near(inputs: _Inputs) -> tuple[Indices, bool]:
    """A label for every input, equal for near duplicates; and whether an oversize group was cut."""
    count = len(inputs.examples)
    labels = np.arange(count)
    filled, keys = _band_keys(inputs)
    for band in range(_BANDS):
        labels = _joined_by_band(inputs, labels, filled, keys[band])
    sizes = np.bincount(labels, minlength=count)
    oversize = np.flatnonzero(sizes > largest_group(count))
    for label in oversize.tolist():
        _cut(inputs, labels, np.flatnonzero(labels == label))
    return labels, len(oversize) > 0


def _joined_by_band(inputs: _Inputs, labels: Indices, numbers: Indices, keys: npt.NDArray[np.uint32]) -> Indices:
    """The labels after each bucket's first input was compared with the others; those unlike it start anew."""
    order = np.argsort(keys, kind="stable")
    keys, numbers = keys[order], numbers[order]
    for _ in range(_LEADERS):
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        if is_first.all():
            break
        leaders = numbers[is_first][np.cumsum(is_first) - 1]
        # Inputs already in one group need no comparison: only whether they are connected matters.
        is_open = labels[leaders] != labels[numbers]
        pairs = np.stack([leaders[is_open], numbers[is_open]])
        labels = _joined(labels, pairs[:, _are_near(inputs, pairs)])
        is_left = labels[leaders] != labels[numbers]
        keys, numbers = keys[is_left], numbers[is_left]
    return labels


def _band_keys(inputs: _Inputs) -> tuple[Indices, npt.NDArray[np.uint32]]:
    """The inputs whose sets are not empty, and uint32[bands, those]: equal keys make candidates. 64 bytes an input."""
    draw = np.random.default_rng(_SEED)
    factors = draw.integers(0, 1 << 63, size=(2, _BANDS * _BAND_ROWS), dtype=np.uint64) | np.uint64(1)
    found, keys = [], []
    for start, end in batches(inputs.sizes):
        sets = inputs.hashes(inputs.examples[start:end])
        filled = np.flatnonzero(sets.sizes)
        found.append(filled + start)
        if len(filled):
            keys.append(_keys_of(sets.hashes, sets.offsets[filled], factors))
    if not keys:
        return np.zeros(0, np.int64), np.zeros((_BANDS, 0), np.uint32)
    return np.concatenate(found), np.concatenate(keys, axis=1)


def _keys_of(
    hashes: npt.NDArray[np.uint64], starts: Indices, factors: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint32]:
    keys = np.zeros((_BANDS, len(starts)), np.uint32)
    for band in range(_BANDS):
        key = np.zeros(len(starts), np.uint64)
        for row in range(band * _BAND_ROWS, (band + 1) * _BAND_ROWS):
            permuted = hashes * factors[0, row]
            permuted += factors[1, row]
            permuted >>= np.uint64(32)  # of a product, the high bits are the mixed ones
            key = mix(key + np.minimum.reduceat(permuted, starts))
        keys[band] = key.astype(np.uint32)
    return keys


def _are_near(inputs: _Inputs, pairs: Indices) -> Flags:
    """Whether the sets of each pair int64[2, n] reach the similarity, exactly."""
    found = np.zeros(pairs.shape[1], bool)
    for start, end in batches(inputs.sizes[pairs[0]] + inputs.sizes[pairs[1]]):
        numbers, places = np.unique(pairs[:, start:end].ravel(), return_inverse=True)
        found[start:end] = _reach_similarity(inputs.sets(numbers), *places.reshape(2, -1))
    return found


def _reach_similarity(sets: HashSets, one: Indices, other: Indices) -> Flags:
    sizes = sets.sizes
    pair = np.concatenate([np.repeat(np.arange(len(one)), sizes[side]) for side in (one, other)])
    hashes = np.concatenate([sets.hashes[_ranges(sets.offsets[side], sizes[side])] for side in (one, other)])
    order = np.lexsort((hashes, pair))
    pair, hashes = pair[order], hashes[order]
    is_shared = (pair[1:] == pair[:-1]) & (hashes[1:] == hashes[:-1])
    shared = np.bincount(pair[1:][is_shared], minlength=len(one))
    # shared / (a + b - shared) >= 4 / 5, in whole numbers
    return np.asarray(9 * shared >= 4 * (sizes[one] + sizes[other]))


def _ranges(starts: Indices, sizes: Indices) -> Indices:
    """starts[0], starts[0] + 1, … (sizes[0] of them), starts[1], …"""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def _joined(labels: Indices, pairs: Indices) -> Indices:
    """The labels after the groups of each pair became one, which keeps the smallest label."""
    if pairs.shape[1] == 0:
        return labels
    count = len(labels)
    edges = coo_array((np.ones(pairs.shape[1], np.int8), (labels[pairs[0]], labels[pairs[1]])), shape=(count, count))
    _, component = connected_components(edges, directed=False)
    _, smallest = np.unique(component, return_index=True)
    return np.asarray(smallest[component[labels]], np.int64)


def _cut(inputs: _Inputs, labels: Indices, members: Indices) -> None:
    """Replaces one group by groups around an input each, the smallest numbers first, within the limit."""
    most = largest_group(len(labels))
    labels[members] = members
    for _ in range(_LEADERS):
        if len(members) < 2:
            return
        leader, others = members[0], members[1:]
        is_near = _are_near(inputs, np.stack([np.full(len(others), leader), others]))
        gathered = others[is_near][: most - 1]
        labels[gathered] = leader
        members = np.setdiff1d(others, gathered, assume_unique=True)


def _numbered(labels: Indices) -> Indices:
    return np.asarray(np.unique(labels, return_inverse=True)[1], np.int64)
