"""Which rows make a step, and how a step is divided into passes of little padding. Tensors are made on a thread ahead.

A step's rows are a function of seed, epoch and position, so a resumed run sees the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from modeling.engines.protocol import Collate
from modeling.inputs import Arrays, Example, Features, Preprocessor, single
from modeling.weights import IntArray

_WINDOW_BATCHES = 50
_ENCODED_AT_ONCE = 1000
_LONG: Any = np.int64
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Preprocessed rows end to end: `arrays` by the names of the encoder's inputs, [positions, …] each, row i from
    `starts[i]` to `starts[i + 1]`; whole numbers are kept in as few bytes as they need."""

    arrays: dict[str, npt.NDArray[Any]]
    starts: IntArray
    collate: Collate

    @classmethod
    def encode(cls, preprocessor: Preprocessor, examples: Sequence[Example]) -> FeatureRows:
        return cls.stacked(
            preprocessor,
            (
                single(preprocessor.encode(examples[start : start + _ENCODED_AT_ONCE]))
                for start in range(0, len(examples), _ENCODED_AT_ONCE)
            ),
        )

    @classmethod
    def stacked(cls, preprocessor: Preprocessor, several: Iterable[Sequence[Features]]) -> FeatureRows:
        """Rows that are encoded already, some at a time."""
        parts: dict[str, list[npt.NDArray[Any]]] = {}
        lengths = [0]
        for rows in several:
            for name in rows[0].arrays:
                parts.setdefault(name, []).append(_narrow(np.concatenate([row.arrays[name] for row in rows])))
            lengths += [row.cost for row in rows]
        arrays = {name: np.concatenate(found) for name, found in parts.items()}
        return cls(arrays, np.cumsum(lengths, dtype=_LONG), preprocessor.collate)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.starts)

    def batch(self, rows: IntArray) -> Arrays:
        """The arrays of a batch of these rows, as wide as the longest."""
        features = [self._features(int(row)) for row in rows]
        return self.collate(features, max(row.cost for row in features))

    def _features(self, row: int) -> Features:
        place = slice(int(self.starts[row]), int(self.starts[row + 1]))
        return Features({name: _wide(array[place]) for name, array in self.arrays.items()}, place.stop - place.start)


def _narrow(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not np.issubdtype(array.dtype, np.integer) or not array.size:
        return array
    return array.astype(np.int8 if array.max() < 128 and array.min() >= 0 else np.int32)


def _wide(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(_LONG) if np.issubdtype(array.dtype, np.integer) else array


def epoch_size(rows: int, classes: IntArray | None) -> int:
    """How many rows an epoch has: of each class as many as of the most frequent one where `classes` are given."""
    if classes is None:
        return rows
    counts = np.bincount(classes)
    return int((counts > 0).sum() * counts.max())


def epoch_order(
    lengths: Sequence[int] | IntArray, *, rows_per_step: int, seed: int, epoch: int, classes: IntArray | None = None
) -> Iterator[IntArray]:
    """The rows of each step of an epoch, of similar length: rows are shuffled, sorted by length within windows, and
    the steps are shuffled again. With `classes` int64[rows], rows of rarer ones come again until all have as many: each
    row equally often, but for a remainder that is drawn."""
    lengths = np.asarray(lengths)
    random = np.random.default_rng([seed, epoch])
    drawn = np.arange(len(lengths)) if classes is None else _repeated(classes, random)
    order = random.permutation(drawn)
    window = rows_per_step * _WINDOW_BATCHES
    steps = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        steps += [part[at : at + rows_per_step] for at in range(0, len(part), rows_per_step)]
    for index in random.permutation(len(steps)):
        yield steps[index].astype(_LONG)


def _repeated(classes: IntArray, random: np.random.Generator) -> IntArray:
    most = int(np.bincount(classes).max())
    parts = []
    for label in np.unique(classes):
        rows = np.flatnonzero(classes == label)
        whole, rest = divmod(most, len(rows))
        parts += [np.tile(rows, whole), random.permutation(rows)[:rest]]
    return np.concatenate(parts)


def passes(lengths: IntArray, rows: IntArray, *, most_rows: int, most_tokens: int | None) -> list[IntArray]:
    """A step's rows in passes, each of at most `most_rows` rows and `most_tokens` tokens with padding (one row at
    least), the longest first: what does not fit the memory fails at once. Without `most_tokens` the order is kept."""
    if most_tokens is None:
        return [rows[at : at + most_rows] for at in range(0, len(rows), most_rows)]
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    found, start = [], 0
    while start < len(order):
        size = min(most_rows, max(1, most_tokens // int(lengths[order[start]])))
        found.append(order[start : start + size])
        start += size
    return found


@dataclass(frozen=True, slots=True)
class Batch:
    """One pass: its rows, and the encoder's inputs [rows, width, …] on the device."""

    rows: IntArray
    inputs: dict[str, torch.Tensor]


def make_batch(features: FeatureRows, rows: IntArray, device: torch.device) -> Batch:
    arrays = features.batch(rows)
    return Batch(rows, {name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


class Ahead(Generic[T]):
    """Calls `make(step)` on a thread for the step after the one that is asked for."""

    def __init__(self, make: Callable[[int], T], *, last: int) -> None:
        self._make, self._last = make, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[T]] | None = None

    def get(self, step: int) -> T:
        expected = self._next
        made = expected[1].result() if expected is not None and expected[0] == step else self._make(step)
        self._next = (step + 1, self._thread.submit(self._make, step + 1)) if step + 1 < self._last else None
        return made

    def forget(self) -> None:
        """What was made ahead no longer fits."""
        if self._next is not None:
            self._next[1].cancel()
            self._next = None

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
