"""Divides labelled rows into training, validation and test.

Rows that must not part form one unit: near duplicates, or for the strategy `group` the rows with one
value. Every unit gets a position in [0, 1): training is at the bottom, the test share at the top, so that
another share of validation moves no row into or out of test. A pure function of the data: neither row order
nor the clock matters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt

from finetune.data.duplicates import Duplicates, find_duplicates
from finetune.data.labelled import LabelledRows
from finetune.data.options import TEST, TRAIN, VALIDATION

Strategy = Literal["hash", "stratified", "random", "group"]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """Positions (not row numbers) of the rows on each side, ascending."""

    train: Indices
    validation: Indices
    test: Indices

    @classmethod
    def of(cls, sides: npt.NDArray[np.int8]) -> Split:
        """From the side of every row."""
        return cls(*(np.flatnonzero(sides == side) for side in (TRAIN, VALIDATION, TEST)))


@dataclass(slots=True)
class _Units:
    """What never parts, by number: its rows, the label most of them carry, its position, its side, and whether that may
    change.

    Units are numbered in the order of their smallest digest, which breaks ties.
    """

    of_row: Indices
    sizes: Indices
    labels: Indices
    positions: npt.NDArray[np.float64]
    sides: npt.NDArray[np.int8]
    is_fixed: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Shares:
    validation: float
    test: float

    def __post_init__(self) -> None:
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1):
            raise ValueError("validation and test shares must not be negative and must leave rows to train on")

    def sides_of(self, positions: npt.NDArray[np.float64]) -> npt.NDArray[np.int8]:
        is_test, is_held_out = positions >= 1 - self.test, positions >= 1 - self.test - self.validation
        return np.where(is_test, TEST, np.where(is_held_out, VALIDATION, TRAIN)).astype(np.int8)

    def wanted(self) -> list[int]:
        """Sides that every class should be on, the most needed first."""
        shares = {TRAIN: 1.0, VALIDATION: self.validation, TEST: self.test}
        return [side for side, share in shares.items() if share > 0]

    def distances(self, positions: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.float64]:
        train_end, test_start = 1 - self.test - self.validation, 1 - self.test
        low, high = ((0.0, train_end), (train_end, test_start), (test_start, 1.0))[side]
        return np.maximum(np.maximum(low - positions, positions - high), 0.0)


def fraction(digest: bytes, seed: int) -> float:
    """A number in [0, 1) that depends on the digest and `seed` only."""
    salt = (seed % 2**64).to_bytes(8, "little")
    number = int.from_bytes(blake2b(digest, digest_size=8, salt=salt).digest(), "little")
    return (number >> 11) / 2**53  # 53 bits are what a float holds exactly; more could round up to 1.0


def split_rows(
    rows: LabelledRows,
    *,
    strategy: Strategy,
    validation: float,
    test: float,
    seed: int,
    duplicates: Duplicates | None = None,
    groups: Sequence[str | None] | None = None,
    rare: Collection[str] = (),
) -> Split:
    """Splits by `strategy`; shares are of all rows, the rest trains.

    - `hash` (the default of jobs): the position is a stable hash of the input, whatever the seed, so a
      row falls on the same side in every later dataset; shares are met on average. Near duplicates are
      where the lowest of their inputs would: rows added later can pull a row into training, never out.
    - `random`: by rank in an order drawn with `seed`; shares are met up to a unit.
    - `stratified`: the same within each class; for other targets, within each of their strata.
    - `group`: by a stable hash of each row's value in `groups`; a row without one goes by its input.

    Rows of a class in `rare`, and their near duplicates, train. Every other class is topped up, so that it is on every
    side with a share as far as it has different inputs: first on training, then validation, then test. A class whose
    rows are all among the near duplicates of others' gets one of these units for training.

    `duplicates` are found where they are not given. Raises `ValueError` for shares that are
    negative or leave nothing to train on.
    """
    shares = _Shares(validation, test)
    if strategy == "group":
        units = _units_of_values(rows, groups or [])
    else:
        units = _units_of_inputs(rows, duplicates or find_duplicates(rows.examples, rows.modality), strategy, seed)
    units.sides = shares.sides_of(units.positions)
    units.is_fixed[units.of_row[_has_name(rows, frozenset(rare))]] = True
    units.sides[units.is_fixed] = TRAIN
    _top_up(units, shares)
    _train_every_class(units, rows, shares)
    if strategy == "group":
        _fill(units, rows, shares)
    return Split.of(units.sides[units.of_row])


def _units_of_inputs(
    rows: LabelledRows, duplicates: Duplicates, strategy: Literal["hash", "stratified", "random"], seed: int
) -> _Units:
    _, of_row = np.unique(duplicates.group_of, return_inverse=True)
    inputs, firsts = np.unique(duplicates.input_of, return_index=True)
    drawn = [fraction(duplicates.digests[one], 0 if strategy == "hash" else seed) for one in inputs.tolist()]
    unit_of_input = of_row[firsts]
    count = int(of_row.max(initial=-1)) + 1
    units = _units(rows, of_row, np.ones(count))
    match strategy:
        case "hash":
            np.minimum.at(units.positions, unit_of_input, drawn)
        case "random" | "stratified":
            _, smallest = np.unique(unit_of_input, return_index=True)
            units.positions = np.asarray(drawn, np.float64)[smallest]
            _spread(units, by_label=strategy == "stratified")
        case _:
            assert_never(strategy)
    return units


def _units_of_values(rows: LabelledRows, values: Sequence[str | None]) -> _Units:
    digests = [
        _value_digest(value) if value and value.strip() else rows.modality.digest(example)
        for value, example in zip(values, rows.examples, strict=True)
    ]
    order = sorted(set(digests))
    numbers = {digest: number for number, digest in enumerate(order)}
    of_row = np.fromiter((numbers[digest] for digest in digests), np.int64, len(digests))
    return _units(rows, of_row, np.array([fraction(digest, 0) for digest in order], np.float64))


def _value_digest(value: str) -> bytes:
    return blake2b(value.strip().encode("utf-8", "surrogatepass"), digest_size=16, person=b"group").digest()


def _units(rows: LabelledRows, of_row: Indices, positions: npt.NDArray[np.float64]) -> _Units:
    count = len(positions)
    sizes = np.bincount(of_row, minlength=count)
    kinds = rows.target.strata(rows.labels)
    sides, is_fixed = np.zeros(count, np.int8), np.zeros(count, np.bool_)
    return _Units(of_row, sizes, _most_common(kinds, of_row), positions, sides, is_fixed)


def _most_common(labels: list[str], of_row: Indices) -> Indices:
    """For each unit the label most of its rows carry, numbered in the alphabet's order.

    Of labels equally common, the first in the alphabet: row order must not matter.
    """
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    by_row = np.fromiter((numbers[label] for label in labels), np.int64, len(labels))
    pairs, counts = np.unique(of_row * max(1, len(numbers)) + by_row, return_counts=True)
    units, candidates = np.divmod(pairs, max(1, len(numbers)))
    order = np.lexsort((candidates, -counts, units))
    _, firsts = np.unique(units[order], return_index=True)
    return np.asarray(candidates[order][firsts], np.int64)


def _spread(units: _Units, *, by_label: bool) -> None:
    """Replaces positions by the share of rows (of the class) that are below the middle of each unit."""
    classes = units.labels if by_label else np.zeros_like(units.labels)
    order = np.lexsort((np.arange(len(classes)), units.positions, classes))
    sizes, classes = units.sizes[order], classes[order]
    totals = np.bincount(classes, weights=sizes)
    before = np.cumsum(sizes) - sizes - np.concatenate([[0.0], np.cumsum(totals)])[classes]
    units.positions[order] = (before + sizes / 2) / totals[classes]


def _top_up(units: _Units, shares: _Shares) -> None:
    """Moves, class by class, the unit that is closest to a side on which the class is not yet.

    A unit counts for the label most of its rows carry, so classes do not compete for units. Training
    may take the last unit of a side; the other sides take only where one remains.
    """
    order = np.argsort(units.labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(units.labels[order])) + 1):
        for side in shares.wanted():
            held = np.bincount(units.sides[members], minlength=3)
            is_spare = (held[units.sides[members]] > (0 if side == TRAIN else 1)) & ~units.is_fixed[members]
            spare = members[is_spare]
            if held[side] == 0 and len(spare):
                distances = shares.distances(units.positions[spare], side)
                units.sides[spare[int(np.argmin(distances))]] = side


def _fill(units: _Units, rows: LabelledRows, shares: _Shares) -> None:
    """Moves the unit that is closest to a side without any, as far as one remains where it was and every class still
    trains: a group has rows of several classes, and was topped up for one."""
    for side in shares.wanted():
        held = np.bincount(units.sides, minlength=3)
        if held[side]:
            continue
        distances = shares.distances(units.positions, side)
        for unit in np.argsort(distances, kind="stable").tolist():
            if held[units.sides[unit]] > 1 and _trains_without(units, rows, unit):
                units.sides[unit] = side
                break


def _trains_without(units: _Units, rows: LabelledRows, unit: int) -> bool:
    """Whether every class still has a row to train on if this unit is elsewhere."""
    is_trained = (units.sides == TRAIN) & (np.arange(len(units.sides)) != unit)
    return rows.take(np.flatnonzero(is_trained[units.of_row])).names() == rows.names()


def _has_name(rows: LabelledRows, names: frozenset[str]) -> npt.NDArray[np.bool_]:
    """Which rows have any of these classes or labels."""
    having = {label for label in set(rows.labels) if not names.isdisjoint(rows.target.names_of(label))}
    return np.fromiter((label in having for label in rows.labels), bool, len(rows))


def _train_every_class(units: _Units, rows: LabelledRows, shares: _Shares) -> None:
    """Moves the nearest unit of each class that has no row to train on. Only a class whose rows are near duplicates of
    more rows of others lacks one here: its units count for their labels."""
    trained = rows.take(np.flatnonzero(units.sides[units.of_row] == TRAIN))
    for name in sorted(rows.names() - trained.names()):
        holding = np.unique(units.of_row[_has_name(rows, frozenset({name}))])
        if not (units.sides[holding] == TRAIN).any():
            units.sides[holding[int(np.argmin(shares.distances(units.positions[holding], TRAIN)))]] = TRAIN
