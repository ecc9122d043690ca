"""Which entries share the next batch. One pure function; knows widths in order of age and nothing else of an entry."""

from __future__ import annotations

from collections.abc import Sequence


def pack(
    widths: Sequence[int], *, max_tokens: int, max_rows: int, fixed_tokens: float = 0.0, overdue: int = 0
) -> list[int]:
    """Positions of the next batch in `widths`, which stand oldest first. Padded tokens are rows times the widest.

    The oldest is always in. Then the one nearest in width joins, as long as that raises the share of useful tokens in
    what the batch costs, `fixed_tokens` (a run's fixed cost, in tokens) included: beside a dear start padding is cheap,
    in a batch that is large already it is not. The first `overdue` choose before all others do, so that they are
    overtaken by nobody but each other. An entry wider than `max_tokens` runs alone.
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
