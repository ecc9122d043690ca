"""What waits for an engine, oldest first, and the batch to form of it. Plain data; its owner brings the lock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from modeling.heads import TaskHead
from modeling.inputs import Example
from modeling.tasks import Calibration, Task
from modeling.weights import FloatArray
from service.inference.capacity import WINDOW_BATCHES, LoadModel
from service.inference.errors import DeadlineExceeded, InferenceFailed
from service.metrics import ModelSeries

_WINDOW_ROWS = 512  # sorting more costs more than it saves


Margins = Callable[[Sequence[Example]], FloatArray | list[FloatArray]]
"""Examples to logits float32[rows, labels], or float32[places, outputs] for each."""


class Model(Protocol):
    """What rows are computed by, besides the lane's engine. Two objects are two models.

    `margins` takes the place of backbone and head in a model without them.
    """

    @property
    def adapter_key(self) -> str | None: ...
    @property
    def head(self) -> TaskHead | None: ...
    @property
    def margins(self) -> Margins | None: ...
    @property
    def task(self) -> Task: ...
    @property
    def calibration(self) -> Calibration: ...


class Work(Protocol):
    """A row as its lane prepared it. `cost` is in the lane's unit; `extra` is for the answer."""

    @property
    def cost(self) -> int: ...
    @property
    def extra(self) -> Mapping[str, Any]: ...


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request, on the event loop. Its caller waits for `future` alone: done with all entries, or with the
    first error.

    `deadline` is in seconds of the worker's clock, `tokens` the estimate before the inputs are rows, `forecast_s`
    the longest wait predicted then, and `missing` how many entries have not ended. The last four are of the batches
    that computed it: the latest start, the longest run, the most rows, and an engine.
    """

    model: Model
    series: ModelSeries
    inputs: Sequence[Example]
    deadline: float
    future: asyncio.Future[None]
    max_length: int
    truncate: bool = True
    tokens: int = 0
    is_announced: bool = False
    preprocessed_at: float = 0.0
    admitted_at: float = 0.0
    forecast_s: float = 0.0
    enqueued_at: float = 0.0
    entries: list[QueueEntry] = field(default_factory=list)
    missing: int = 0
    started_at: float = 0.0
    inference_s: float = 0.0
    batch_rows: int = 0
    engine: str = ""

    @property
    def is_over(self) -> bool:
        """Nothing more is computed for it: answered, failed, expired or abandoned."""
        return self.future.done()

    def fill(self, prepared: Sequence[Sequence[Work]]) -> list[QueueEntry]:
        """Make entries of the prepared examples, in their order: one for each window of each."""
        self.entries = [
            QueueEntry(self, work, work.cost, place) for place, works in enumerate(prepared) for work in works
        ]
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
    """One row on its way, and in the end its result. `place` is that of its example in the ticket; `width` is what the
    row is padded to when it runs alone."""

    ticket: Ticket
    work: Work
    length: int
    place: int = 0
    width: int = 0
    due_at: float = 0.0
    is_ended: bool = False
    vector: FloatArray | None = None
    scores: FloatArray | None = None

    def end(self) -> None:
        """Every entry that was queued ends exactly once: computed, failed or withdrawn."""
        assert not self.is_ended, "an entry ended twice"
        self.is_ended = True


Outcome = tuple[FloatArray, FloatArray | None] | InferenceFailed
"""Of a row: its vector and its scores, or the error that it alone met."""


@dataclass(slots=True, eq=False)
class Batch:
    """The rows of one engine run, all padded to `width`, and what the run gave. `tokens` counts padding;
    `is_saturated`: more was waiting than it could hold."""

    entries: list[QueueEntry]
    width: int
    tokens: int
    predicted_s: float
    is_saturated: bool
    started_at: float = 0.0
    seconds: float = 0.0
    engine: str = ""
    outcomes: Sequence[Outcome] = ()


class EntryQueue:
    """Entries that wait, and those chosen ahead for the next batch. An entry whose client has gone is taken out at
    once, wherever it is.

    `tokens` and the length are of the entries that no batch was formed of yet; `announced_tokens` are those of requests
    that are being preprocessed.
    """

    def __init__(self, load: LoadModel, *, max_rows: int) -> None:
        self._load, self._max_rows = load, max_rows
        self._entries: dict[QueueEntry, None] = {}
        self._ready: list[QueueEntry] = []
        self.tokens = self.announced_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_full(self) -> bool:
        """Whether as much waits as one batch holds."""
        return self.tokens >= self._load.max_tokens or len(self._entries) >= self._max_rows

    @property
    def tokens_ahead(self) -> int:
        """Of everything that a request arriving now would wait for."""
        return self.tokens + self.announced_tokens + sum([entry.length for entry in self._ready])

    def announce(self, ticket: Ticket) -> None:
        """Counts a request's estimated tokens until `retract`."""
        ticket.is_announced = True
        self.announced_tokens += ticket.tokens

    def retract(self, ticket: Ticket) -> None:
        if ticket.is_announced:
            ticket.is_announced = False
            self.announced_tokens -= ticket.tokens

    def add(self, entries: Sequence[QueueEntry]) -> None:
        self._entries.update(dict.fromkeys(entries))
        self.tokens += sum([entry.length for entry in entries])

    def discard(self, entry: QueueEntry) -> bool:
        """Whether it was still waiting."""
        if entry in self._entries:
            self._remove(entry)
        elif entry in self._ready:
            self._ready.remove(entry)
        else:
            return False
        return True

    def clear(self) -> list[QueueEntry]:
        """Takes everything out."""
        entries = [*self._ready, *self._entries]
        self._entries, self._ready, self.tokens = {}, [], 0
        return entries

    def next(self, now: float) -> Batch | None:
        """The next batch; None if nothing waits that could still be in time."""
        is_saturated = self.is_full or bool(self._ready)
        entries, self._ready = self._ready or self._choose(now), []
        if not entries:
            return None
        width = max([entry.width for entry in entries])
        tokens = len(entries) * width
        return Batch(entries, width, tokens, self._load.cost.seconds(tokens), is_saturated)

    def choose_ahead(self, now: float) -> None:
        """Chooses the entries of the next batch now, if it is full."""
        if not self._ready and self.is_full:
            self._ready = self._choose(now)

    @property
    def is_chosen(self) -> bool:
        """Whether the entries of the next batch are chosen."""
        return bool(self._ready)

    def _choose(self, now: float) -> list[QueueEntry]:
        """Entries whose time is over stay behind: their ticket takes them out."""
        window = self._window(now)
        if not window:
            return []
        overdue = next((position for position, entry in enumerate(window) if entry.due_at > now), len(window))
        positions = pack(
            [entry.width for entry in window],
            max_tokens=self._load.max_tokens,
            max_rows=self._max_rows,
            fixed_tokens=self._load.cost.fixed_tokens,
            overdue=overdue,
        )
        entries = [window[position] for position in positions]
        for entry in entries:
            self._remove(entry)
        return entries

    def _window(self, now: float) -> list[QueueEntry]:
        """The oldest entries, as many as are worth choosing from."""
        window = []
        tokens = WINDOW_BATCHES * self._load.max_tokens
        for entry in self._entries:
            if entry.ticket.deadline > now:
                window.append(entry)
                tokens -= entry.width
                if tokens <= 0 or len(window) == _WINDOW_ROWS:
                    break
        return window

    def _remove(self, entry: QueueEntry) -> None:
        del self._entries[entry]
        self.tokens -= entry.length


def pack(
    widths: Sequence[int], *, max_tokens: int, max_rows: int, fixed_tokens: float = 0.0, overdue: int = 0
) -> list[int]:
    """Positions of the next batch in `widths`, which are oldest first. Padded tokens are rows times the widest.

    The oldest is always in. Then the one nearest in width joins, as long as that raises the share of useful tokens in
    what the batch costs, `fixed_tokens` (a run's fixed cost, in tokens) included: beside a dear start padding is cheap,
    in a batch that is large already it is not. The first `overdue` choose before all others do, so that they are
    overtaken only by each other. An entry wider than `max_tokens` runs alone.
    """
    chosen = [0]
    widest = useful = widths[0]
    for tier in (range(1, overdue), range(max(1, overdue), len(widths))):
        # Nearest first and, among equals, oldest first: sorting is stable. Taken from the end.
        narrower = sorted((p for p in reversed(tier) if widths[p] <= widest), key=widths.__getitem__)
        wider = sorted((p for p in reversed(tier) if widths[p] > widest), key=lambda p: -widths[p])
        while len(chosen) < max_rows:
            rows = len(chosen)
            narrow_gain = wide_gain = 0.0
            if narrower and widest * (rows + 1) <= max_tokens:
                narrow_gain = widths[narrower[-1]] / widest
            if wider and (width := widths[wider[-1]]) * (rows + 1) <= max_tokens:
                wide_gain = width / (width * (rows + 1) - widest * rows)  # it pads all others
            if max(narrow_gain, wide_gain) * (fixed_tokens + widest * rows) < useful:
                break
            chosen.append(narrower.pop() if narrow_gain >= wide_gain else wider.pop())
            widest, useful = max(widest, widths[chosen[-1]]), useful + widths[chosen[-1]]
    return sorted(chosen)
