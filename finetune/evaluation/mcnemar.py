"""The exact McNemar test: do two models differ on the same rows? Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

Answers = npt.NDArray[np.bool_]


def p_value(only_first: int, only_second: int) -> float:
    """Two-sided, from the rows that only one of the two gets right: a fair coin as often or more unevenly."""
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    return float(min(1.0, 2 * binom.cdf(min(only_first, only_second), discordant, 0.5)))


def least_discordant(significance: float) -> int:
    """How few rows on which the two differ can show anything, were all of them for one side: 2 · 0.5^n ≤ p."""
    return int(np.ceil(np.log2(2 / significance)))


def compare(is_right: Answers, other_is_right: Answers) -> dict[str, Any]:
    """Rows, rows that only the first or only the second gets right, and the p-value."""
    only_first, only_second = int((is_right & ~other_is_right).sum()), int((other_is_right & ~is_right).sum())
    return {
        "rows": len(is_right),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": p_value(only_first, only_second),
    }
