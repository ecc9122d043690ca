"""Tags of tokens, in any of the schemes in use, as spans: BIO (IOB2), IOB1, BIOES (BMES) and BILOU.

A tag is O, or a prefix and a type: `B-PER`. All schemes are read by one rule, as the evaluation of CoNLL does it: a
token begins an entity if its prefix says so, or if the one before it was of another type or ended. What differs is
which transitions are mistakes, and that shows when all tags were seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from finetune.data.record_batches import FindingLog
from finetune.data.spans import Span

_PREFIXES = frozenset("BIESLUM")
_BEGINS, _ENDS = frozenset("BSU"), frozenset("ESLU")
OUTSIDE = "O"


def split_tag(tag: str) -> tuple[str, str] | None:
    """Return prefix and type; `("O", "")` outside of entities, None for what is no tag."""
    tag = tag.strip()
    if tag in {OUTSIDE, "o", "_", "-"}:
        return OUTSIDE, ""
    prefix, dash, type_ = tag.partition("-")
    if not dash:
        prefix, dash, type_ = tag.partition("_")
    if dash and prefix in _PREFIXES and type_.strip():
        return prefix, type_.strip()
    return None


def are_tags(tags: Iterable[str]) -> bool:
    """Say whether all of these are tags of entities."""
    return all(split_tag(tag) is not None for tag in tags)


def join_tokens(tokens: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Return the tokens as one text with a blank between each two, and the place of each."""
    places, at = [], 0
    for token in tokens:
        places.append((at, at + len(token)))
        at += len(token) + 1
    return " ".join(tokens), places


def place_tokens(text: str, tokens: Sequence[str]) -> list[tuple[int, int]] | None:
    """Return where the tokens are in a text, in their order; None if they are not."""
    places, at = [], 0
    for token in tokens:
        start = text.find(token, at)
        if start < 0 or text[at:start].strip():
            return None
        at = start + len(token)
        places.append((start, at))
    return places


@dataclass
class TagReader:
    """Reads the tags of a file's rows, and remembers what tells their scheme."""

    prefixes: Counter[str] = field(default_factory=Counter)
    bare_insides: list[int] = field(default_factory=list)  # rows in which an entity begins with its inside
    needless_begins: int = 0  # after something else than its own type, where IOB1 has none
    broken: list[int] = field(default_factory=list)  # rows with an entity of BIOES or BILOU that is not closed
    rows: int = 0

    def spans(self, row: int, tags: Sequence[str], places: Sequence[tuple[int, int]]) -> list[Span]:
        """Return the spans that tags mean; all of them are tags. `places` are those of the tokens."""
        self.rows += 1
        found: list[tuple[int, int, str]] = []
        open_at, open_type, was_ended = -1, "", True
        for at, tag in enumerate(tags):
            prefix, type_ = split_tag(tag) or (OUTSIDE, "")
            self.prefixes[prefix] += 1
            goes_on = open_at >= 0 and not was_ended and type_ == open_type and prefix not in _BEGINS
            if prefix != OUTSIDE and not goes_on and prefix not in _BEGINS:
                self.bare_insides.append(row)
            if prefix == "B" and not (open_at >= 0 and type_ == open_type):
                self.needless_begins += 1
            if not goes_on:
                if open_at >= 0:
                    found.append((open_at, at, open_type))
                    if not was_ended:
                        self.broken.append(row)
                open_at, open_type = (at, type_) if prefix != OUTSIDE else (-1, "")
            was_ended = prefix in _ENDS or prefix == OUTSIDE
        if open_at >= 0:
            found.append((open_at, len(tags), open_type))
            if not was_ended:
                self.broken.append(row)
        return [Span(places[first][0], places[stop - 1][1], type_) for first, stop, type_ in found]

    @property
    def scheme(self) -> str:
        if self.prefixes["L"] or self.prefixes["U"]:
            return "BILOU"
        if self.prefixes["E"] or self.prefixes["S"] or self.prefixes["M"]:
            return "BIOES"
        return "IOB1" if self.bare_insides and not self.needless_begins else "BIO"

    def tell(self, log: FindingLog, column: str) -> None:
        """Note which scheme it is, and the rows that break its rules."""
        if not self.rows:
            return
        message = f"the tags in {column!r} are {self.scheme}, and were read as spans of the text"
        log.note("scheme", message, code="tag_scheme", severity="info", column=column, fix="nothing to do")
        closes = self.scheme in {"BILOU", "BIOES"}
        broken = self.bare_insides + (self.broken if closes else []) if self.scheme != "IOB1" else []
        for row in dict.fromkeys(broken):
            rule = "or is not closed" if closes else "or follows another type"
            message = f"row {row} has an entity that does not begin with its beginning, {rule}, which {self.scheme} "
            message += "does not allow; it was read as an entity of its own"
            fix = "look at these rows; give each entity one beginning"
            log.note(
                "transition", message, code="illegal_transition", severity="warning", row=row, column=column, fix=fix
            )
