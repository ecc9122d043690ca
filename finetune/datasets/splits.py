"""Divides labelled rows into training, validation and test.

Every text gets a position in [0, 1): training lies at the bottom, the test share at the top, so that
another share of validation moves no row into or out of test. Rows whose normalised texts are equal
form one group and never part. A pure function of the data: neither row order nor the clock matters.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt

from finetune.datasets.labelled import LabelledRows

Strategy = Literal["hash", "stratified", "random"]
Indices = npt.NDArray[np.int64]

_TRAIN, _VALIDATION, _TEST = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Split:
    """Positions (not row numbers) of the rows on each side, ascending."""

    train: Indices
    validation: Indices
    test: Indices


@dataclass(slots=True)
class _Group:
    """All rows with one normalised text. `label` is the one most of them carry."""

    digest: bytes
    rows: list[int] = field(default_factory=list)
    label: str = ""
    position: float = 0.0
    side: int = _TRAIN


@dataclass(frozen=True, slots=True)
class _Shares:
    validation: float
    test: float

    def __post_init__(self) -> None:
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1):
            raise ValueError("validation and test shares must not be negative and must leave rows to train on")

    def side_of(self, position: float) -> int:
        if position >= 1 - self.test:
            return _TEST
        return _VALIDATION if position >= 1 - self.test - self.validation else _TRAIN

    def wanted(self) -> list[int]:
        """Sides that every class should stand on, the most needed first."""
        shares = {_TRAIN: 1.0, _VALIDATION: self.validation, _TEST: self.test}
        return [side for side, share in shares.items() if share > 0]

    def distance(self, position: float, side: int) -> float:
        train_end, test_start = 1 - self.test - self.validation, 1 - self.test
        low, high = ((0.0, train_end), (train_end, test_start), (test_start, 1.0))[side]
        return max(low - position, position - high, 0.0)


def split_rows(rows: LabelledRows, *, strategy: Strategy, validation: float, test: float, seed: int) -> Split:
    """Splits by `strategy`; shares are of all rows, the rest trains.

    - `hash` (the default of jobs): the position is a stable hash of the text, whatever the seed, so a
      row falls on the same side in every later dataset; shares are met on average.
    - `random`: by rank in an order drawn with `seed`; shares are met up to a group.
    - `stratified`: the same within each class.

    Then each class is topped up, so that it stands on every side with a share as far as it has
    different texts: first on training, then validation, then test. Raises `ValueError` for shares
    that are negative or leave nothing to train on.
    """
    shares = _Shares(validation, test)
    groups = _groups(rows)
    _place(groups, strategy, seed)
    for group in groups:
        group.side = shares.side_of(group.position)
    _top_up(groups, shares)
    return Split(*(_indices(groups, side) for side in (_TRAIN, _VALIDATION, _TEST)))


def normalise(text: str) -> str:
    """NFKC, case folded, whitespace collapsed: texts equal under it count as the same text."""
    # Folding can undo the composed form (and composing can bring back a case), hence NFKC on both sides.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def text_digest(text: str) -> bytes:
    """16 bytes that stand for the normalised text, the same on every machine and in every version."""
    return blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def stable_fraction(text: str, seed: int = 0) -> float:
    """A number in [0, 1), spread evenly over texts, that depends on the normalised text and `seed` only."""
    return _fraction(text_digest(text), seed)


def _fraction(digest: bytes, seed: int) -> float:
    salt = (seed % 2**64).to_bytes(8, "little")
    number = int.from_bytes(blake2b(digest, digest_size=8, salt=salt).digest(), "little")
    return (number >> 11) / 2**53  # 53 bits are what a float holds exactly; more could round up to 1.0


def _groups(rows: LabelledRows) -> list[_Group]:
    by_digest: dict[bytes, _Group] = {}
    for row, text in enumerate(rows.texts):
        digest = text_digest(text)
        group = by_digest.get(digest)
        if group is None:
            group = by_digest[digest] = _Group(digest)
        group.rows.append(row)
    for group in by_digest.values():
        group.label = _most_common([rows.labels[row] for row in group.rows])
    return sorted(by_digest.values(), key=lambda group: group.digest)


def _most_common(labels: list[str]) -> str:
    """Of labels equally common, the first in the alphabet: row order must not matter."""
    if len(labels) == 1:
        return labels[0]
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def _place(groups: list[_Group], strategy: Strategy, seed: int) -> None:
    """Gives every group its position in [0, 1)."""
    for group in groups:
        group.position = _fraction(group.digest, 0 if strategy == "hash" else seed)
    match strategy:
        case "hash":
            return
        case "random":
            _spread(groups)
        case "stratified":
            for members in _by_label(groups).values():
                _spread(members)
        case _:
            assert_never(strategy)


def _spread(groups: list[_Group]) -> None:
    """Replaces positions by the share of rows that lie below the middle of each group."""
    total = sum(len(group.rows) for group in groups)
    below = 0
    for group in sorted(groups, key=lambda group: (group.position, group.digest)):
        group.position = (below + len(group.rows) / 2) / total
        below += len(group.rows)


def _by_label(groups: Iterable[_Group]) -> dict[str, list[_Group]]:
    members: defaultdict[str, list[_Group]] = defaultdict(list)
    for group in groups:
        members[group.label].append(group)
    return dict(members)


def _top_up(groups: list[_Group], shares: _Shares) -> None:
    """Moves, class by class, the group that lies closest to a side on which the class does not stand yet.

    A group counts for the label most of its rows carry, so classes do not compete for groups. Training
    may take the last group of a side; the other sides take only where one remains.
    """
    for members in _by_label(groups).values():
        for side in shares.wanted():
            held = Counter(group.side for group in members)
            spare = [group for group in members if held[group.side] > (0 if side == _TRAIN else 1)]
            if held[side] == 0 and spare:
                closest = min(spare, key=lambda group: (shares.distance(group.position, side), group.digest))
                closest.side = side


def _indices(groups: list[_Group], side: int) -> Indices:
    return np.array(sorted(row for group in groups if group.side == side for row in group.rows), dtype=np.int64)
