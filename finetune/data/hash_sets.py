"""Examples as sets of 64-bit hashes, many at once: what near duplicates are found by, whatever is hashed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]

BATCH_SIZE = 1 << 19  # of examples hashed at once, as their modality counts; a character takes some 60 bytes meanwhile


@dataclass(frozen=True, slots=True)
class HashSets:
    """`hashes[offsets[i]:offsets[i + 1]]` is what example `i` has."""

    hashes: Hashes
    offsets: Offsets

    @property
    def sizes(self) -> Offsets:
        return np.diff(self.offsets)

    def as_sets(self) -> HashSets:
        """Return each example's hashes sorted, and each once."""
        rows = np.repeat(np.arange(len(self.offsets) - 1), self.sizes)
        order = np.lexsort((self.hashes, rows))
        rows, hashes = rows[order], self.hashes[order]
        is_new = np.ones(len(hashes), bool)
        is_new[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
        counts = np.bincount(rows[is_new], minlength=len(self.offsets) - 1)
        return HashSets(hashes[is_new], np.concatenate([[0], np.cumsum(counts)]))


def batches(sizes: npt.NDArray[np.int64], size: int = BATCH_SIZE) -> Iterator[tuple[int, int]]:
    """Yield ranges of consecutive examples of about this size together, at least one example each."""
    ends = np.cumsum(sizes)
    start, done = 0, 0
    while start < len(sizes):
        end = max(start + 1, int(np.searchsorted(ends, done + size, side="right")))
        yield start, end
        start, done = end, int(ends[end - 1])


def mix(values: Hashes) -> Hashes:
    """A bijection on 64 bits that spreads every input bit over all of them (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
