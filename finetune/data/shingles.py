"""Texts as sets of hashed word runs, many texts at once. Knows nothing of what the sets are compared for.

A text's set holds its runs of three words ("word 3-shingles"); a text of one or two words has one run of
all its words, a text without a word the empty set. Case and punctuation do not count. Scripts that put
no spaces between words (Chinese, Japanese, Thai) count each character as a word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.data.text_identity import fold

Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]

BATCH_CHARACTERS = 1 << 19  # of texts hashed at once; each takes some 60 bytes meanwhile
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_SINGLE = 2  # a character that is a word by itself; 1 is part of a word, 0 none
_WORD_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xD6E8FEB86659FD93), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))


@dataclass(frozen=True, slots=True)
class ShingleSets:
    """`hashes[offsets[i]:offsets[i + 1]]` is the set of text `i`, sorted and without repeats if `is_sorted`."""

    hashes: Hashes
    offsets: Offsets

    @property
    def sizes(self) -> Offsets:
        return np.diff(self.offsets)


def batches(lengths: npt.NDArray[np.int64], characters: int = BATCH_CHARACTERS) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive texts with about so many characters together; at least one text each."""
    ends = np.cumsum(lengths)
    start, done = 0, 0
    while start < len(lengths):
        end = max(start + 1, int(np.searchsorted(ends, done + characters, side="right")))
        yield start, end
        start, done = end, int(ends[end - 1])


def shingle_hashes(texts: Sequence[str]) -> ShingleSets:
    """64-bit hashes of the runs in the order of the text, repeats included."""
    rows, words = word_hashes(texts)
    if len(words) == 0:
        return ShingleSets(words, np.zeros(len(texts) + 1, np.int64))
    is_first = np.empty(len(rows), bool)
    is_first[0] = True
    is_first[1:] = rows[1:] != rows[:-1]
    mixed = words * _FACTORS[0]
    is_whole = is_first.copy()
    for ahead in (1, 2):
        if len(rows) <= ahead:
            break
        is_same = rows[ahead:] == rows[:-ahead]
        mixed[:-ahead] += np.where(is_same, words[ahead:] * _FACTORS[ahead], np.uint64(0))
        if ahead == 2:
            is_whole[:-ahead] |= is_same
    counts = np.bincount(rows[is_whole], minlength=len(texts))
    return ShingleSets(mix(mixed[is_whole]), np.concatenate([[0], np.cumsum(counts)]))


def shingle_sets(texts: Sequence[str]) -> ShingleSets:
    """The same as sets: sorted, each run once."""
    found = shingle_hashes(texts)
    rows = np.repeat(np.arange(len(texts)), found.sizes)
    order = np.lexsort((found.hashes, rows))
    rows, hashes = rows[order], found.hashes[order]
    is_new = np.ones(len(hashes), bool)
    is_new[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
    counts = np.bincount(rows[is_new], minlength=len(texts))
    return ShingleSets(hashes[is_new], np.concatenate([[0], np.cumsum(counts)]))


def mix(values: Hashes) -> Hashes:
    """A bijection on 64 bits that spreads every input bit over all of them (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def word_hashes(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], Hashes]:
    """Every word as the number of its text and a hash of its characters, in order."""
    folded = [fold(text) for text in texts]
    joined = " ".join(folded).encode("utf-32-le", "surrogatepass")
    if not joined:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    codes = np.frombuffer(joined, np.uint32)
    kinds = _character_kinds()[codes]
    starts = kinds > 0
    starts[1:] &= (kinds[1:] == _SINGLE) | (kinds[:-1] != 1)
    places = np.flatnonzero(kinds)
    if len(places) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    first = np.flatnonzero(starts[places])
    sizes = np.diff(np.append(first, len(places)))
    within = np.arange(len(places)) - np.repeat(first, sizes)
    factors = np.multiply.accumulate(np.full(int(sizes.max()), _WORD_FACTOR))
    words = mix(np.add.reduceat(mix(codes[places].astype(np.uint64)) * factors[within], first))
    ends = np.cumsum([len(text) + 1 for text in folded])
    return np.searchsorted(ends, places[first], side="right"), words


@functools.cache
def _character_kinds() -> npt.NDArray[np.uint8]:
    """The kind of every code point, uint8[0x110000]."""
    everything = np.arange(0x110000, dtype=np.uint32).view("<U1")
    kinds = np.char.isalnum(everything).astype(np.uint8)
    for low, high in _UNSPACED:
        kinds[low : high + 1] *= _SINGLE
    return kinds
