"""Runs a batch so that one bad row fails alone. Called on the engine's thread; knows no queue and no event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modeling.errors import EngineFailed, NonFiniteOutput
from modeling.weights import FloatArray
from service.inference.entries import QueueEntry
from service.inference.errors import InferenceFailed

_log = logging.getLogger("service.isolation")


@dataclass(frozen=True, slots=True)
class Outputs:
    """Vectors float32[rows, width], scores float32[outputs] per row where the model has a head, and which rows are
    finite."""

    vectors: FloatArray
    scores: Sequence[FloatArray | None]
    is_finite: Sequence[bool]


Compute = Callable[[Sequence[QueueEntry]], Outputs]
Outcome = tuple[FloatArray, FloatArray | None] | InferenceFailed
"""Of a row: its vector and its scores, or the error that it alone met."""


def compute_isolated(compute: Compute, entries: Sequence[QueueEntry]) -> list[Outcome]:
    """One outcome per entry. A batch that fails is halved until only the culprit fails."""
    try:
        outputs = compute(entries)
    except Exception as error:
        if len(entries) > 1:
            middle = len(entries) // 2
            return compute_isolated(compute, entries[:middle]) + compute_isolated(compute, entries[middle:])
        if not isinstance(error, EngineFailed):
            _log.exception("inference failed", extra={"action": "inference_failed"})
        return [InferenceFailed("the engine failed for this input")]
    return [
        (vector, scores)
        if is_finite
        else InferenceFailed(str(NonFiniteOutput("the model gave values that are not finite for this input")))
        for vector, scores, is_finite in zip(outputs.vectors, outputs.scores, outputs.is_finite, strict=True)
    ]
