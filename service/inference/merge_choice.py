"""Which adapter of a backbone is merged, by whose rows it computes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Rows = Mapping[str | None, int]  # of one window, by adapter; None: rows without one


@dataclass(frozen=True, slots=True)
class MergePolicy:
    """An adapter with at least `share` of the rows in each of `windows` windows is merged; `share` 0: none ever is.

    A window with fewer than `min_rows` says that there is little to gain. Merging takes seconds of a core and saves a
    tenth of some milliseconds a row, so it pays after thousands of rows.
    """

    share: float = 0.0
    windows: int = 2
    min_rows: int = 1000
    window_s: float = 60.0

    @property
    def kept_share(self) -> float:
        """Above it a merged adapter stays, so that a share that wavers changes nothing."""
        return self.share * 5 / 8


def choose_merged(windows: Sequence[Rows], merged: str | None, policy: MergePolicy) -> str | None:
    """The adapter to be merged from now on, by the rows of the last windows; `merged` is the one that is now.

    While nothing is computed nothing changes.
    """
    if not policy.share:
        return None
    last = windows[-policy.windows :]
    total = sum(sum(rows.values()) for rows in last)
    if len(last) < policy.windows or not total:
        return merged
    if merged is not None and sum(rows.get(merged, 0) for rows in last) >= policy.kept_share * total:
        return merged
    candidates = [key for key in last[-1] if key is not None and all(_dominates(key, rows, policy) for rows in last)]
    return max(candidates, key=lambda key: last[-1][key], default=None)


def _dominates(key: str, rows: Rows, policy: MergePolicy) -> bool:
    total = sum(rows.values())
    return total >= policy.min_rows and rows.get(key, 0) >= policy.share * total
