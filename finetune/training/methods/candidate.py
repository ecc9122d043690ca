"""What a method hands back: its answers on the held-out rows, and how to write itself down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from model_registry.manifest import VersionKind
from modeling.heads import TaskHead
from modeling.inputs import Example
from modeling.linear_text import LinearText
from modeling.linear_tokens import LinearTokens
from modeling.weights import FloatArray

# Why a training ended before its last step, as `details["stopped"]` says.
CANCELLED: Final = "cancelled"
OUT_OF_TIME: Final = "max_seconds is used up"


@dataclass(frozen=True, slots=True)
class Servable:
    """The weights as they will be served: `head` or `linear`, plus whatever `write_extra` puts beside them.

    `logits` runs what the server will run, from raw examples, on the engine that it is likely to run it on, and gives
    what the task's rules take;
    `reference_logits` in torch and fp32, for golden rows. None where the two are the same. `golden_logits` are those of
    every position, of tasks that go by them.
    """

    logits: Callable[[Sequence[Example]], Any]
    head: TaskHead | None = None
    linear: LinearText | LinearTokens | None = None
    write_extra: Callable[[Path], None] | None = None
    reference_logits: Callable[[Sequence[Example]], Any] | None = None
    golden_logits: Callable[[Sequence[Example]], Sequence[FloatArray]] | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One trained method. `validation_logits` come from a model that never saw the validation rows.

    `finish` gives the weights to serve: the baseline and the probe refit on training and validation
    rows together once they are chosen; the others return what they trained.
    """

    method: str
    kind: VersionKind
    validation_logits: Any
    finish: Callable[[], Servable]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    head: TaskHead | None = None
