"""Where the words of a text are, the same for every tokenizer: what a model of entities labels, one tag each.

A word is a run of letters and digits; a sign by itself; and, in scripts that are written without blanks, one character.
Combining marks belong to what they combine with. Tokenizers disagree about words, and some take a comma for part of the
one before it; entities would then begin and end where no annotator marks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import regex

LOCATED: Final = "located"
"""Where a row's `extra` holds its `Located`."""
Offsets = npt.NDArray[np.int32]
"""int32[n, 2]: the start and the end of each, in code points."""

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|(?:[[\p{{L}}\p{{N}}_]--[{_UNSPACED}]]\p{{M}}*)+|\S\p{{M}}*", regex.V1)


@dataclass(frozen=True, slots=True)
class Located:
    """The words that a row answers for, of the `text` that it is a window of.

    `words` are their places in the text. Word i was read as the row's positions `first[i]` to `stop[i]`, both
    int32[words]; a position may belong to two words, if the tokenizer joined them. `pieces` are the places in the text
    of the positions `begin`, `begin + 1`, …, each of which is answered for by this row alone.
    """

    text: str
    words: Offsets
    first: npt.NDArray[np.int32]
    stop: npt.NDArray[np.int32]
    pieces: Offsets
    begin: int


def find_words(text: str) -> Offsets:
    """Return the places of the words of a text, in order."""
    found = [match.span() for match in _WORD.finditer(text)]
    return np.asarray(found, np.int32).reshape(-1, 2)


def pieces_of_words(words: Offsets, pieces: Offsets) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the first piece that overlaps each word, and the one behind the last; equal if none does."""
    starts, ends = np.maximum.accumulate(pieces[:, 0]), np.maximum.accumulate(pieces[:, 1])
    first = np.searchsorted(ends, words[:, 0], side="right")
    stop = np.searchsorted(starts, words[:, 1], side="left")
    return first.astype(np.int32), np.maximum(first, stop).astype(np.int32)


def utf16_offsets(text: str, offsets: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return offsets in code points as offsets in UTF-16 units, which JavaScript and Java count."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    before = np.concatenate([[0], np.cumsum(letters > 0xFFFF)]).astype(np.int32)
    return offsets + before[offsets]


def codepoint_offsets(text: str, offsets: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the code points at these UTF-16 units; units inside of a character count as its start. Offsets beyond the
    text stay beyond it."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    starts = np.concatenate([[0], np.cumsum(1 + (letters > 0xFFFF))])
    found = np.searchsorted(starts, offsets, side="right") - 1
    return np.where(offsets > starts[-1], offsets, found).astype(np.int32)
