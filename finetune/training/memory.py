"""How much of a step goes through the model at once, and what to do when that is too much."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from finetune.jobs.failures import RunError


@dataclass(frozen=True, slots=True)
class PassSize:
    """The most rows and, where a step may be divided by length, the most tokens of a pass."""

    rows: int
    tokens: int | None = None

    def half(self) -> PassSize | None:
        """Half of it; None where a pass is one row already."""
        if self.rows == 1:
            return None
        return replace(self, rows=self.rows // 2, tokens=None if self.tokens is None else max(1, self.tokens // 2))


class OutOfMemory(RunError):
    def __init__(self, size: PassSize) -> None:
        super().__init__(
            "out_of_memory",
            f"a pass of {size.rows} rows needs more memory than there is, after it was halved once",
            hint="use a smaller batch_size or max_length, or gradient_checkpointing; "
            "gradient_accumulation keeps the rows of a step",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on the GPU, in Python, or in torch's CPU allocator, which has no class for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def release() -> None:
    """Gives back what the failed attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_that_fits(attempt: Callable[[PassSize], None], most: PassSize) -> PassSize:
    """The first of `most`, its half, its quarter… whose attempt does not run out of memory. Raises `OutOfMemory`."""
    size = most
    while True:
        try:
            attempt(size)
            return size
        except (RuntimeError, MemoryError) as error:
            half = size.half()
            if not is_out_of_memory(error):
                raise
            if half is None:
                raise OutOfMemory(size) from error
        release()
        size = half
