"""Errors of modeling.

ModelingError
├── BackboneUnavailable      the source cannot be found or is incomplete
├── ConfigRefused            a checkpoint's configuration asks for what is never allowed
├── CheckpointRefused        a checkpoint would harm the process that reads it, or answer nothing
├── UnsupportedArchitecture  a model type or head that is not known here
├── AdapterMismatch          an adapter's modules or shapes do not fit the backbone
├── WeightsInvalid           a weights file is truncated, misshaped or not finite
├── InputTooLong             an input exceeds the limit and may not be cut
├── InputUnfit               an input of another shape than the task takes
├── PreprocessorFailed       the checkpoint's own preprocessor could not read an input
├── GoldenRowsDiffer         a loaded version does not reproduce its stored answers
└── EngineFailed             the engine could not compute a batch
    └── NonFiniteOutput      a row came out as NaN or infinity
"""

from __future__ import annotations


class ModelingError(Exception):
    """Base of all errors of this package."""


class BackboneUnavailable(ModelingError):
    """The backbone's source cannot be found, reached or is incomplete."""


class ConfigRefused(ModelingError):
    """A checkpoint's configuration names code or settings that are never taken from a checkpoint."""


class CheckpointRefused(ModelingError):
    """A checkpoint that takes more time, memory or files than it may, or whose numbers or preprocessor cannot serve."""


class UnsupportedArchitecture(ModelingError):
    """A model type or a classification head that is not known here."""


class AdapterMismatch(ModelingError):
    """An adapter's modules or shapes do not fit its backbone."""


class WeightsInvalid(ModelingError):
    """A weights file is truncated, misshaped or holds values that are not finite."""


class InputTooLong(ModelingError):
    """An input exceeds the limit and the caller forbade cutting it."""

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index


class InputUnfit(ModelingError):
    """An input of another shape than the task takes: a pair where one text is read."""


class PreprocessorFailed(ModelingError):
    """The checkpoint's own preprocessor could not read an input."""


class GoldenRowsDiffer(ModelingError):
    """A loaded version does not reproduce the answers stored when it was trained."""


class EngineFailed(ModelingError):
    """The engine could not compute a batch."""


class NonFiniteOutput(EngineFailed):
    """A row came out as NaN or infinity."""
