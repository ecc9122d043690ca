"""Errors of a run, as the child process reports them.

RunError(code, message, hint, retryable)
├── DatasetInvalid       findings that forbid training
├── NonFiniteLoss        the loss became NaN or infinite
└── ProcessLost          one of several processes that train together is gone

Cancelled, Stopped       the run was asked to end, or to make way for a while (no failures)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.jobs.records import JobFailure


class RunError(Exception):
    """A failure that a person can act on."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        retryable: bool = False,
        findings: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.failure = JobFailure(code=code, message=message, hint=hint, retryable=retryable, findings=findings or [])


class DatasetInvalid(RunError):
    def __init__(self, message: str, findings: list[dict[str, Any]]) -> None:
        super().__init__(
            "dataset_invalid", message, hint="fix the rows that the findings name and upload again", findings=findings
        )


class NonFiniteLoss(RunError):
    """`rows` are numbers of rows in their file; none if the gradient alone is not finite."""

    def __init__(self, step: int, *, rows: Sequence[int] = (), learning_rate: float = 0.0, precision: str = "") -> None:
        what = f"the loss of row {', '.join(map(str, rows[:20]))}" if rows else "the gradient"
        lower = "" if precision == "fp32" else ", or precision fp32"
        super().__init__(
            "non_finite_loss",
            f"{what} became infinite or NaN at step {step} (learning rate {learning_rate:.2g}, {precision})",
            hint=f"use a smaller learning_rate or more warmup_ratio{lower}"
            + ("; look at these rows, too" if rows else ""),
        )


class ProcessLost(RunError):
    """`rank` counts from 1; the job's own process is 0."""

    def __init__(self, rank: int, *, of: int, what: str, step: int) -> None:
        super().__init__(
            "process_lost",
            f"training process {rank} of {of} {what} at step {step}",
            hint="the worker's log has the details; submit the job again, with devices 1 if it happens again",
            retryable=True,
        )


class Cancelled(Exception):
    """The run was asked to stop; `keep_best` says whether to register the best so far."""

    def __init__(self, *, keep_best: bool) -> None:
        super().__init__("cancelled")
        self.keep_best = keep_best


class Stopped(Exception):
    """The worker shuts down: save what is needed to go on elsewhere, then leave."""
