"""Rows with the same text, or nearly the same. Pure; row order and the clock do not matter.

Two texts are near duplicates where the Jaccard similarity of their sets of word 3-shingles (`shingles`)
is at least 0.8. Candidates come from MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3): 16 bands of 4 find a pair at 0.8 with probability 0.9998, one at
0.9 with certainty for all that matters. Every candidate is then compared exactly, so nothing is merged by
chance.

Near duplicates of near duplicates belong together too, but such chains can run through a whole dataset of
form letters. A group above `largest_group` is therefore cut: texts gather around one text each that they
are near duplicates of themselves, in groups no larger than that; what is left over stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from finetune.data.shingles import BATCH_CHARACTERS, ShingleSets, batches, mix, shingle_hashes, shingle_sets
from finetune.data.text_identity import text_digest

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_BANDS, _BAND_ROWS = 16, 4
_LEADERS = 16  # rounds in which a bucket's first text is compared with the others, and of cutting a group
_SEED = 20_260_101


@dataclass(frozen=True, slots=True)
class Duplicates:
    """`text_of[i]` numbers row `i`'s text, `group_of[i]` its group of near duplicates, both int64[rows].

    `digests[t]` stands for text `t`; texts are numbered in the order of their digests, groups in the order
    of their smallest one, so neither depends on row order.
    """

    text_of: Indices
    group_of: Indices
    digests: list[bytes]
    is_cut: bool = False

    def take(self, rows: Indices) -> Duplicates:
        """What is known of these rows; numbers and digests stay as they are."""
        return Duplicates(self.text_of[rows], self.group_of[rows], self.digests, self.is_cut)


def largest_group(texts: int) -> int:
    """How many different texts may form a group: a twentieth of all, at least 10."""
    return max(10, texts // 20)


def find_duplicates(texts: Sequence[str]) -> Duplicates:
    """Exact and near duplicates among all rows.

    Time and memory grow linearly: some 20 µs and 200 bytes a row of ten words beside the texts.
    """
    text_of, firsts, digests = _exact(texts)
    if len(digests) == 0:
        return Duplicates(text_of, text_of.copy(), digests)
    unique = _Texts([texts[row] for row in firsts.tolist()])
    labels, is_cut = _near(unique)
    return Duplicates(text_of, _numbered(labels)[text_of], digests, is_cut)


def _exact(texts: Sequence[str]) -> tuple[Indices, Indices, list[bytes]]:
    """The number of each row's text, a row of each text, and the digests in order."""
    if not texts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), []
    # Fixed-width strings compare as bytes; the zero bytes that numpy drops at the end it drops on both sides.
    joined = np.frombuffer(b"".join(map(text_digest, texts)), "S16")
    unique, firsts, text_of = np.unique(joined, return_index=True, return_inverse=True)
    raw = unique.tobytes()
    return text_of.astype(np.int64), firsts, [raw[start : start + 16] for start in range(0, len(raw), 16)]


class _Texts:
    """Different texts in the order of their digests, with their lengths in characters."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1

    def sets(self, numbers: Indices) -> ShingleSets:
        return shingle_sets([self.texts[number] for number in numbers.tolist()])


def _near(texts: _Texts) -> tuple[Indices, bool]:
    """A label for every text, equal for near duplicates; and whether an oversize group was cut."""
    count = len(texts.texts)
    labels = np.arange(count)
    with_words, keys = _band_keys(texts)
    for band in range(_BANDS):
        labels = _joined_by_band(texts, labels, with_words, keys[band])
    sizes = np.bincount(labels, minlength=count)
    oversize = np.flatnonzero(sizes > largest_group(count))
    for label in oversize.tolist():
        _cut(texts, labels, np.flatnonzero(labels == label))
    return labels, len(oversize) > 0


def _joined_by_band(texts: _Texts, labels: Indices, numbers: Indices, keys: npt.NDArray[np.uint32]) -> Indices:
    """The labels after each bucket's first text was compared with the others; those unlike it start anew."""
    order = np.argsort(keys, kind="stable")
    keys, numbers = keys[order], numbers[order]
    for _ in range(_LEADERS):
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        if is_first.all():
            break
        leaders = numbers[is_first][np.cumsum(is_first) - 1]
        # Texts already in one group need no comparison: only whether they are connected matters.
        is_open = labels[leaders] != labels[numbers]
        pairs = np.stack([leaders[is_open], numbers[is_open]])
        labels = _joined(labels, pairs[:, _are_near(texts, pairs)])
        is_left = labels[leaders] != labels[numbers]
        keys, numbers = keys[is_left], numbers[is_left]
    return labels


def _band_keys(texts: _Texts) -> tuple[Indices, npt.NDArray[np.uint32]]:
    """The texts that have words, and uint32[bands, those]: equal keys make candidates. 64 bytes a text."""
    draw = np.random.default_rng(_SEED)
    factors = draw.integers(0, 1 << 63, size=(2, _BANDS * _BAND_ROWS), dtype=np.uint64) | np.uint64(1)
    found, keys = [], []
    for start, end in batches(texts.lengths):
        sets = shingle_hashes(texts.texts[start:end])
        with_words = np.flatnonzero(sets.sizes)
        found.append(with_words + start)
        if len(with_words):
            keys.append(_keys_of(sets.hashes, sets.offsets[with_words], factors))
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


def _are_near(texts: _Texts, pairs: Indices) -> Flags:
    """Whether the sets of each pair int64[2, n] reach the similarity, exactly."""
    found = np.zeros(pairs.shape[1], bool)
    for start, end in batches(texts.lengths[pairs[0]] + texts.lengths[pairs[1]], BATCH_CHARACTERS):
        numbers, places = np.unique(pairs[:, start:end].ravel(), return_inverse=True)
        found[start:end] = _reach_similarity(texts.sets(numbers), *places.reshape(2, -1))
    return found


def _reach_similarity(sets: ShingleSets, one: Indices, other: Indices) -> Flags:
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


def _cut(texts: _Texts, labels: Indices, members: Indices) -> None:
    """Replaces one group by groups around a text each, the smallest numbers first, within the limit."""
    most = largest_group(len(labels))
    labels[members] = members
    for _ in range(_LEADERS):
        if len(members) < 2:
            return
        leader, others = members[0], members[1:]
        is_near = _are_near(texts, np.stack([np.full(len(others), leader), others]))
        gathered = others[is_near][: most - 1]
        labels[gathered] = leader
        members = np.setdiff1d(others, gathered, assume_unique=True)


def _numbered(labels: Indices) -> Indices:
    return np.asarray(np.unique(labels, return_inverse=True)[1], np.int64)
