"""What waits: a request's ticket, an entry for each of its inputs, and what is known of the batch it ended in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modeling.preprocess import TextInput
from modeling.weights import FloatArray
from service.inference.errors import DeadlineExceeded


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request. Its caller waits for `future` alone: done with all entries, or with the first error.

    `deadline` is in seconds of the batcher's clock, `tokens` what the inputs were estimated at before tokenising,
    `forecast_s` how long it was then to wait at most, and `missing` how many entries have not ended. All of it belongs
    to the event loop.
    """

    model: Any
    inputs: Sequence[TextInput]
    deadline: float
    future: asyncio.Future[None]
    max_length: int
    truncate: bool = True
    tokens: int = 0
    is_announced: bool = False
    tokenized_at: float = 0.0
    admitted_at: float = 0.0
    forecast_s: float = 0.0
    enqueued_at: float = 0.0
    entries: list[QueueEntry] = field(default_factory=list)
    missing: int = 0

    @property
    def is_over(self) -> bool:
        """Nobody waits any more: answered, failed, expired or abandoned."""
        return self.future.done()

    def fill(self, works: Sequence[Any]) -> list[QueueEntry]:
        """Entries for the tokenised inputs, in their order."""
        self.entries = [QueueEntry(self, work, work.length) for work in works]
        self.missing = len(self.entries)
        return self.entries

    def let_go(self) -> list[QueueEntry]:
        """Its entries, once all have ended. They know the ticket; without it knowing them all are freed at once."""
        entries, self.entries = self.entries, []
        return entries

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        self.fail(DeadlineExceeded("the deadline passed before the answer was ready"))


@dataclass(slots=True, eq=False)
class QueueEntry:
    """One input on its way, and in the end its result. `width` is what its row is padded to when it runs alone."""

    ticket: Ticket
    work: Any
    length: int
    width: int = 0
    due_at: float = 0.0
    is_ended: bool = False
    vector: FloatArray | None = None
    scores: FloatArray | None = None
    batch: BatchFacts | None = None

    @property
    def model(self) -> Any:
        return self.ticket.model

    def end(self) -> None:
        """Every entry that was queued ends exactly once: computed, failed or withdrawn."""
        assert not self.is_ended, "an entry ended twice"
        self.is_ended = True


@dataclass(slots=True)
class BatchFacts:
    """Of the run that computed an entry. `width` is what its rows were padded to."""

    rows: int
    width: int
    started_at: float
    seconds: float
    engine: str
