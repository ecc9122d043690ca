"""What comes out of a model: the protocol of a task, and the values that pass between a task and its callers.

A task is one object without state. Evaluation and serving share it, so that a row is answered as it was evaluated.
Pure: no torch, no file, no queue, no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Raw, UnsetType

from modeling.weights import FloatArray

Example = Any
"""One input as its modality reads it; opaque to everything else."""
Answers = npt.NDArray[np.int64] | npt.NDArray[np.bool_] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Options:
    """What a request asks for. `top_k` bounds the scores returned; `threshold` is the score below which a model
    abstains, or from which on a label is given; embeddings come only if asked for. `prompt_name` names a prompt of the
    backbone to be used instead of its default one. `aggregation_strategy` says how the pieces of a word become one, and
    `offset_unit` what offsets count."""

    top_k: int | None = None
    threshold: float | None = None
    truncate: bool = True
    max_length: int | None = None
    return_embedding: bool = False
    prompt_name: str | None = None
    aggregation_strategy: str | None = None
    offset_unit: str | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a version's logits become answers, as its `calibration.json` and `reference_stats.json` say.

    `temperature` divides logits. `thresholds` are for several labels: one probability per label from which it is given.
    `value_shares` are for values: in rising order, each with the share of validation answers below it; empty if the
    version brings no reference.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    value_shares: tuple[tuple[float, float], ...] = ()


NO_CALIBRATION: Final = Calibration()


@dataclass(frozen=True, slots=True)
class RowOutput:
    """What a head gave for one row: its scores, float32[outputs] or, of a task that goes by states, float32[positions,
    outputs]; and what its features carried along for the answer."""

    scores: FloatArray
    extra: Mapping[str, Any] = field(default_factory=dict)


class Answer(msgspec.Struct, omit_defaults=True):
    """One input's answer as it goes over the wire. `index` is the input's position in the request."""

    index: int


Embedding = Annotated[Raw | UnsetType, Meta(extra_json_schema={"type": "array", "items": {"type": "number"}})]
"""The backbone's vector as a JSON array, if the request asked for it."""


class Score(msgspec.Struct, gc=False):
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Task(Protocol):
    """`kind` is what training goes by: the same kind serves several modalities. `needs` says what of the backbone's
    output the head takes: a vector for the row, or a state for each of its positions, which are then the rows of
    `scores`, `answers` and `same`. `answer_column` is what a dataset's column of answers is called unless a job says
    otherwise. `reads_windows`: an input is never cut, but read in windows that say where they are.
    `expands`: an input becomes other rows than itself. `options` are the request
    parameters that mean something; `observes` names the histograms that describe answers, in the order in which
    `observed` gives their values."""

    name: str
    modality: str
    kind: ClassVar[str]
    needs: ClassVar[Literal["pooled", "states"]] = "pooled"
    options: ClassVar[frozenset[str]]
    observes: ClassVar[tuple[str, ...]]
    has_answers: ClassVar[bool] = True
    answer_column: ClassVar[str] = "label"
    reads_windows: ClassVar[bool] = False
    expands: ClassVar[bool] = False
    answer_type: ClassVar[type[Answer]]

    def outputs(self, labels: Sequence[str]) -> int:
        """Return how many values a head gives per row."""
        return len(labels)

    def calibration(
        self, document: Mapping[str, Any], labels: Sequence[str], reference: Mapping[str, Any] | None
    ) -> Calibration:
        """Read what a version stores. Raises `ValueError` or `TypeError` if it does not fit the task or the labels."""

    def expand(self, item: Example, options: Options) -> list[Example]:
        """Return the rows that one input of a request becomes."""
        return [item]

    def scores(self, logits: FloatArray, calibration: Calibration) -> FloatArray:
        """Turn logits float32[rows, outputs] into what is answered from, row by row. Non-finite values stay so."""

    def answers(self, scores: FloatArray, calibration: Calibration) -> Answers:
        """Return what is answered for rows of `scores`, as an array."""

    def reduce(
        self, rows: Sequence[RowOutput], labels: Sequence[str], calibration: Calibration, options: Options
    ) -> Answer:
        """Combine the rows of one input into its answer: the mean of their scores if it was read in several
        windows. `index` is left at 0."""

    def observed(self, answers: Sequence[Any], calibration: Calibration) -> Sequence[Sequence[float]]:
        """Return the values to observe, one list per name in `observes`."""

    def same(self, wanted: FloatArray, got: FloatArray, calibration: Calibration, *, precision: str) -> bool:
        """Say whether golden rows' logits, float32[rows, outputs], count as reproduced on an engine of `precision`."""
