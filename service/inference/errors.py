"""Errors of inference.

InferenceError
├── EmptyInput           there is nothing to predict on
├── BatchTooLarge        more inputs than one request may bring
├── QueueFull            no room, or it could not start in time; carries when to come back
├── ModelNotReady        known, but loading, failed or without its engine
├── MemoryBudgetExceeded it does not fit beside the models that must stay
├── DeadlineExceeded     the caller's time ran out before the answer was there
├── NotPredictable       a backbone was asked for labels, or a baseline for embeddings
├── ParameterUnfit       a parameter that means nothing for the model's task
└── InferenceFailed      the engine failed for this input
"""

from __future__ import annotations

from typing import Any


class InferenceError(Exception):
    """Base of all errors of this package. `retry_after_s` is set where coming back can help."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EmptyInput(InferenceError):
    """There is nothing to predict on."""


class BatchTooLarge(InferenceError):
    """More inputs than one request may bring."""


class QueueFull(InferenceError):
    """No room in the queue, or the work could not start in time."""

    def __init__(self, message: str, *, reason: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.reason = reason


class ModelNotReady(InferenceError):
    """The model is known, but loading, failed or without its engine."""


class MemoryBudgetExceeded(InferenceError):
    """The model does not fit into memory beside those that must stay."""


class DeadlineExceeded(InferenceError):
    """The caller's time ran out before the answer was there."""


class NotPredictable(InferenceError):
    """A backbone was asked for labels, or a baseline, which is over words, for embeddings."""


class ParameterUnfit(InferenceError):
    """A parameter of the request means nothing for the model's task."""

    def __init__(self, message: str, *, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The place in the request, as a problem document lists it."""
        return [{"loc": ["body", "parameters", self.parameter], "message": str(self)}]


class InferenceFailed(InferenceError):
    """The engine failed for this input."""
