"""Entries that wait, oldest first, and the batch to form of them. Its owner brings the lock."""

from __future__ import annotations

from collections.abc import Sequence

from service.inference.entries import QueueEntry
from service.inference.packing import pack

# Batches are packed from as many tokens as make so many batches. More to choose from means less padding, and that the
# old are overtaken more (docs/log.md).
WINDOW_BATCHES = 8
_WINDOW_ROWS = 512  # sorting more costs more than it saves


class EntryQueue:
    """Leaving costs as little as waiting: an entry whose client is gone is taken out at once, wherever it stands."""

    def __init__(self) -> None:
        self._entries: dict[QueueEntry, None] = {}
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Sequence[QueueEntry]) -> None:
        self._entries.update(dict.fromkeys(entries))
        self.tokens += sum(entry.length for entry in entries)

    def discard(self, entry: QueueEntry) -> bool:
        """Whether it was still waiting."""
        if entry not in self._entries:
            return False
        del self._entries[entry]
        self.tokens -= entry.length
        return True

    def clear(self) -> list[QueueEntry]:
        """Takes everything out."""
        entries, self._entries, self.tokens = list(self._entries), {}, 0
        return entries

    def take(self, now: float, *, max_tokens: int, max_rows: int, fixed_tokens: float) -> list[QueueEntry]:
        """The next batch; empty where nothing waits that could still be in time.

        Entries whose time is over stay behind: their ticket takes them out.
        """
        window = self._window(now, WINDOW_BATCHES * max_tokens)
        if not window:
            return []
        overdue = next((position for position, entry in enumerate(window) if entry.due_at > now), len(window))
        positions = pack(
            [entry.width for entry in window],
            max_tokens=max_tokens,
            max_rows=max_rows,
            fixed_tokens=fixed_tokens,
            overdue=overdue,
        )
        entries = [window[position] for position in positions]
        for entry in entries:
            del self._entries[entry]
            self.tokens -= entry.length
        return entries

    def _window(self, now: float, tokens: int) -> list[QueueEntry]:
        """The oldest entries, together so many tokens."""
        window = []
        for entry in self._entries:
            if entry.ticket.deadline > now:
                window.append(entry)
                tokens -= entry.width
                if tokens <= 0 or len(window) == _WINDOW_ROWS:
                    break
        return window
