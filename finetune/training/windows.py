"""Texts as windows with a tag for each word: what methods train on whose head answers positions and not rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from finetune.evaluation.tagged import Ragged, Tagged, gold_tags, ragged
from finetune.training.embedding import length_batches
from modeling.engines.protocol import Engine, EngineBatch
from modeling.heads import TaskHead
from modeling.inputs import Example, Features, Preprocessor
from modeling.inputs.words import LOCATED, Located
from modeling.weights import FloatArray, IntArray

UNTAGGED: Final = -100  # of positions that begin no word; torch's cross-entropy leaves it out
_TOKENS_PER_BATCH = 4096
_EXAMPLES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of some texts, one after the other: `example_of` int64[windows] says of which text each is."""

    rows: list[Features]
    example_of: IntArray

    @classmethod
    def of(cls, preprocessor: Preprocessor, examples: Sequence[Example]) -> Windows:
        found: list[list[Features]] = []
        for start in range(0, len(examples), _EXAMPLES_AT_ONCE):
            found += preprocessor.windows(examples[start : start + _EXAMPLES_AT_ONCE])
        example_of = np.repeat(np.arange(len(found)), [len(own) for own in found])
        return cls([row for own in found for row in own], example_of.astype(np.int64))

    def located(self, window: int) -> Located:
        where: Located = self.rows[window].extra[LOCATED]
        return where

    def tags(self, window: int, targets: Ragged) -> npt.NDArray[np.int16]:
        """int16[positions]: the tag of each word at its first position, `UNTAGGED` at all others."""
        where = self.located(window)
        found = np.full(self.rows[window].cost, UNTAGGED, np.int16)
        found[where.first] = gold_tags(where.words, targets[self.example_of[window]])
        return found

    def gathered(self, logits: Sequence[FloatArray], examples: int) -> Ragged:
        """`Tagged` for each text, of the logits float32[words, outputs] of the words of each window."""
        words: list[list[Any]] = [[] for _ in range(examples)]
        values: list[list[FloatArray]] = [[] for _ in range(examples)]
        for window, own in enumerate(logits):
            example = int(self.example_of[window])
            words[example].append(self.located(window).words)
            values[example].append(own)
        return ragged(Tagged(np.concatenate(w), np.concatenate(v)) for w, v in zip(words, values, strict=True))


def in_parts(preprocessor: Preprocessor, examples: Sequence[Example]) -> Iterator[tuple[int, Windows]]:
    """Some texts at a time, with the number of those before."""
    for start in range(0, len(examples), _EXAMPLES_AT_ONCE):
        yield start, Windows.of(preprocessor, examples[start : start + _EXAMPLES_AT_ONCE])


def count_windows(preprocessor: Preprocessor, examples: Sequence[Example]) -> int:
    return sum(len(windows.rows) for _, windows in in_parts(preprocessor, examples))


def tagged_by(
    engine: Engine, head: TaskHead, preprocessor: Preprocessor, examples: Sequence[Example], adapter: str | None = None
) -> Ragged:
    """`Tagged` for each example, by a head on the states of an engine."""
    found: list[Tagged] = []
    for windows, states in word_states(engine, preprocessor, examples, adapter):
        logits = [head.logits(own) for own in states]
        found += windows.gathered(logits, int(windows.example_of[-1]) + 1).tolist()
    return ragged(found)


def word_states(
    engine: Engine, preprocessor: Preprocessor, examples: Sequence[Example], adapter: str | None = None
) -> Iterator[tuple[Windows, list[FloatArray]]]:
    """The windows of some texts at a time, and float32[words, hidden] of each: the state of each word's first
    position."""
    engine.open_states(adapter)
    for _, windows in in_parts(preprocessor, examples):
        found: list[FloatArray] = [np.zeros((0, 0), np.float32)] * len(windows.rows)
        for indices in length_batches(windows.rows, tokens=_TOKENS_PER_BATCH):
            batch = [windows.rows[index] for index in indices]
            keys = [adapter] * len(batch) if adapter else None
            states = engine.run(EngineBatch(batch, keys, range(len(batch)))).states
            for place, index in enumerate(indices.tolist()):
                found[index] = states[place][windows.located(index).first].copy()  # a part would keep all of them
        yield windows, found


def position_logits(
    engine: Engine, head: TaskHead, preprocessor: Preprocessor, examples: Sequence[Example], adapter: str | None = None
) -> list[FloatArray]:
    """float32[positions, outputs] of each example's first window, as golden rows hold them."""
    engine.open_states(adapter)
    found = []
    for own in preprocessor.windows(examples):
        keys = [adapter] if adapter else None
        found.append(head.logits(engine.run(EngineBatch(own[:1], keys, [0])).states[0]))
    return found
