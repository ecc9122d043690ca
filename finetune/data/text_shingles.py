"""Texts as sets of hashed word runs, many texts at once.

A text's set holds its runs of three words ("word 3-shingles"); a text of one or two words has one run of
all its words, a text without a word the empty set. Case and punctuation do not count. Scripts that put
no spaces between words (Chinese, Japanese, Thai) count each character as a word.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finetune.data.hash_sets import Hashes, HashSets, mix
from modeling.inputs.text import TextInput, as_one
from modeling.inputs.text_identity import fold

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


def shingle_hashes(texts: Sequence[TextInput]) -> HashSets:
    """64-bit hashes of the runs in the order of the text, repeats included."""
    rows, words = word_hashes(texts)
    if len(words) == 0:
        return HashSets(words, np.zeros(len(texts) + 1, np.int64))
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
    return HashSets(mix(mixed[is_whole]), np.concatenate([[0], np.cumsum(counts)]))


def word_hashes(texts: Sequence[TextInput]) -> tuple[npt.NDArray[np.int64], Hashes]:
    """Every word as the number of its text and a hash of its characters, in order."""
    folded = [fold(as_one(text)) for text in texts]
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
