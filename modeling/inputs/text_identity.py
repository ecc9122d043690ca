"""When two strings count as the same."""

from __future__ import annotations

import unicodedata


def normalise(text: str) -> str:
    """Return NFKC, case folded, whitespace collapsed: strings equal under it count as the same."""
    return " ".join(fold(text).split())


def fold(text: str) -> str:
    """Do the same, and leave whitespace as it is."""
    if text.isascii():
        return text.lower()  # the same, ten times as fast
    # Folding can undo the composed form (and composing can bring back a case), hence NFKC on both sides.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
