"""What goes into a model: the protocol of a modality, and the values that pass between it and everything else.

Nothing outside a modality's own files knows what an example holds. Pure: no torch, no transformers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

import numpy as np
import numpy.typing as npt

Example = Any
"""One input as its modality reads it; opaque to everything else."""
Arrays = dict[str, npt.NDArray[Any]]
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class BadCell(ValueError):
    """A cell of a dataset that cannot be read: `what` is wrong with it, and how to fix it."""

    def __init__(self, what: str, *, code: str, fix: str) -> None:
        super().__init__(what)
        self.code, self.fix = code, fix


@dataclass(frozen=True, slots=True)
class FileReference:
    """A cell that names a file, by its path inside the dataset's own `folder`."""

    folder: Path
    name: str

    def read(self, most_bytes: int) -> bytes:
        """Return the file's content. Raises `BadCell` if it is larger, is missing, or is not in the folder."""
        path = PurePosixPath(self.name)
        try:
            file = (self.folder / path).resolve(strict=True)
            is_inside = file.is_relative_to(self.folder.resolve()) and file.is_file()
        except (OSError, ValueError, RuntimeError):  # no such file; a NUL in its name; a loop of links
            is_inside = False
        if not is_inside or path.is_absolute() or ".." in path.parts:
            fix = "upload the file with the dataset, and name it by its path inside"
            raise BadCell(f"names {self.name[:200]!r}, which is no file of the dataset", code="missing_file", fix=fix)
        with file.open("rb") as stream:
            content = stream.read(most_bytes + 1)
        if len(content) > most_bytes:
            what = f"names {self.name[:200]!r}, which has more than {most_bytes:,} bytes"
            raise BadCell(what, code="parse_error", fix="make the file smaller")
        return content


Cell = str | FileReference
"""What a column holds for a row, unless it is blank."""


@dataclass(frozen=True, slots=True)
class Features:
    """One row for an engine.

    `arrays` go by the names of the graph's inputs; the first axis of each is the row's positions. `cost` is what the
    row costs in the modality's unit, and how many positions its states have. Only rows with equal `key` share a batch.
    `extra` is what a head needs beside the engine's output.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    cost: int
    key: Hashable = None
    extra: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    is_truncated: bool = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class Preprocessor(Protocol):
    """Made from a checkpoint's own files; safe to call from several threads. `limit` is the most units that a row may
    cost, `padding` the value behind a row's own by the array's name, 0 for names left out."""

    @property
    def limit(self) -> int: ...
    @property
    def padding(self) -> Mapping[str, float]: ...

    def encode(
        self, examples: Sequence[Example], *, truncate: bool = True, limit: int | None = None
    ) -> list[list[Features]]:
        """Encode each example into one or more windows, each of at most `limit` units.

        Raises `InputTooLong` with the example's index if it does not fit and `truncate` is off.
        """

    def windows(self, examples: Sequence[Example], *, limit: int | None = None) -> list[list[Features]]:
        """Encode each example whole, in as many windows of at most `limit` units as it takes, for tasks that answer
        places inside of it. `extra` says what each window answers for. Raises `InputUnfit`."""

    def collate(self, rows: Sequence[Features], width: int) -> Arrays:
        """Stack rows into the arrays of a batch, [rows, width, …], padded behind."""

    def sample(self, cost: int) -> Features:
        """Return a row of exactly this cost, to time and check an engine with."""


class Modality(Protocol):
    """`unit` is what rows cost: tokens, patches, frames. `plural` is what several examples are called, and `ignores`
    what `digest` does not see, if anything, in the words of messages.

    `roles` are the columns that make up an example; the first is needed, and read from a column of its own name unless
    a job names another. `libraries` are the distributions on whose versions features depend. `has_baseline` says
    whether there is a model without a backbone to beat. An archive's files with one of `suffixes` become files of the
    dataset, which cells of the first role's column name.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    plural: ClassVar[str]
    ignores: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[frozenset[str]]
    libraries: ClassVar[tuple[str, ...]]
    has_baseline: ClassVar[bool]

    def open(self, folder: Path, *, limit: int) -> Preprocessor:
        """Open the preprocessor of a checkpoint's folder."""

    def read(self, cells: Mapping[str, Cell]) -> Example:
        """Read an example from its cells by role, none of them blank. Raises `BadCell`."""

    def content(self, example: Example) -> bytes:
        """Return what the example holds: equal if and only if its features are."""

    def digest(self, example: Example) -> bytes:
        """Return 16 bytes that identify the example, the same on every machine and in every version. Examples with
        equal digests count as the same: they stay on one side of a split."""

    def size(self, example: Example) -> int:
        """Return what the cost grows with, known before preprocessing: characters, pixels, samples."""

    def is_empty(self, example: Example) -> bool:
        """Say whether there is nothing in it to predict on."""

    def with_prompt(self, example: Example, prompt: str) -> Example:
        """Return the example behind this prompt instead of the backbone's own; asked for only of a backbone that has
        prompts."""

    def to_json(self, example: Example) -> Any:
        """Return the example as golden rows store it."""

    def from_json(self, value: Any) -> Example:
        """Read what `to_json` wrote. Raises `ValueError`."""

    def probe_set(self, count: int) -> tuple[list[Example], list[int]]:
        """Return examples and the number of each one's topic, to compare engines on before anybody's own are at
        hand."""


def padded(
    rows: Sequence[Features], width: int, *, padding: Mapping[str, float] = _NOTHING, mask: str | None = None
) -> Arrays:
    """Stack arrays [positions, …] of each name into [rows, width, …], padded behind; `mask` names an array int64[rows,
    width] that is added, 1 for a row's own positions."""
    stacked: Arrays = {}
    for name, first in rows[0].arrays.items():
        full = np.full((len(rows), width, *first.shape[1:]), padding.get(name, 0), dtype=first.dtype)
        for place, row in enumerate(rows):
            array = row.arrays[name]
            full[place, : len(array)] = array
        stacked[name] = full
    if mask is not None:
        own = np.zeros((len(rows), width), dtype=np.int64)
        for place, row in enumerate(rows):
            own[place, : row.cost] = 1
        stacked[mask] = own
    return stacked


def single(windows: Sequence[Sequence[Features]]) -> list[Features]:
    """Return the rows of examples that have one window each."""
    return [row for (row,) in windows]
