"""Spans of a text, each with a label, in the shapes in which annotation tools write them; one shape from here on.

A cell holds a list, each item `[start, end, label]` or an object with `start` and `end` (or `start_offset` and
`end_offset`) and `label` (or `labels` with one). Offsets are code points, the end is behind the last. Pure.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling.inputs import BadCell
from modeling.inputs.words import Offsets, codepoint_offsets, find_words

_SHAPE = 'write a list such as [{"start": 0, "end": 5, "label": "PER"}], or [[0, 5, "PER"]]; [] if there is none'
_STARTS, _ENDS, _LABELS = ("start", "start_offset"), ("end", "end_offset"), ("label", "labels")
MOST_SPANS = 20_000  # of one text


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """`text` is what the source says that is there; None if it does not."""

    start: int
    end: int
    label: str
    text: str | None = None


def read_spans(cell: str) -> list[Span]:
    """Return the spans of a cell in their order. Raises `BadCell`."""
    try:
        items = json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise _bad(f"holds {cell.strip()[:60]!r}, which is no list of spans") from error
    return spans_of(items)


def spans_of(items: Any) -> list[Span]:
    """The same of what JSON gave. Raises `BadCell`."""
    if not isinstance(items, list) or len(items) > MOST_SPANS:
        raise _bad("holds no list of spans" if not isinstance(items, list) else f"holds more than {MOST_SPANS:,} spans")
    return sorted(map(_span, items), key=lambda span: (span.start, span.end, span.label))


def _span(item: Any) -> Span:
    if isinstance(item, list) and len(item) == 3:
        return Span(_place(item[0]), _place(item[1]), _label(item[2]))
    if isinstance(item, Mapping):
        start, end, label = (_first(item, names) for names in (_STARTS, _ENDS, _LABELS))
        text = item.get("text")
        return Span(_place(start), _place(end), _label(label), text if isinstance(text, str) else None)
    raise _bad(f"holds {str(item)[:60]!r}, which is no span")


def _first(item: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((item[name] for name in names if name in item), None)


def _place(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise _bad(f"holds a span from or to {str(value)[:30]!r}, which is no place in a text")
    return value


def _label(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if not isinstance(value, str) or not value.strip():
        raise _bad(f"holds a span with the label {str(value)[:60]!r}; each needs one name")
    return value.strip()


def _bad(what: str) -> BadCell:
    return BadCell(what, code="parse_error", fix=_SHAPE)


def to_cell(spans: Iterable[Span]) -> str:
    """Return the spans as a cell that `read_spans` reads, with their texts as far as the source has them."""
    items = [
        {"start": span.start, "end": span.end, "label": span.label} | ({} if span.text is None else {"text": span.text})
        for span in spans
    ]
    return json.dumps(items, ensure_ascii=False)


def check_spans(text: str, spans: Sequence[Span]) -> None:
    """Raise `BadCell` for spans that a model cannot be trained on: outside of the text, empty, not what the source says
    is there, or overlapping."""
    for span in spans:
        if not span.start < span.end <= len(text) or not text[span.start : span.end].strip():
            what = f"has a span {span.start} to {span.end}, and the text has {len(text):,} characters"
            fix = "count characters (code points) from 0, the end behind the last; or remove the span"
            raise BadCell(what, code="span_outside_text", fix=_in_utf16(text, span) or fix)
        if span.text is not None and text[span.start : span.end].strip() != span.text.strip():
            there = text[span.start : span.end][:40]
            what = f"has {span.text[:40]!r} at {span.start} to {span.end}, where the text has {there!r}"
            fix = "export the spans of this very text: white space or markup may have been changed since"
            raise BadCell(what, code="span_text_mismatch", fix=_in_utf16(text, span) or fix)
    ordered = sorted({(span.start, span.end, span.label): span for span in spans}.values(), key=lambda span: span.start)
    for before, span in itertools.pairwise(ordered):
        if span.start < before.end:
            what = f"has overlapping spans, {_named(before)} and {_named(span)}"
            fix = "keep one of the two, or train a model for each kind of entity: a word has one tag"
            raise BadCell(what, code="overlapping_spans", fix=fix)


def _named(span: Span) -> str:
    return f"{span.label[:40]!r} ({span.start} to {span.end})"


def _in_utf16(text: str, span: Span) -> str | None:
    """What to do if the offsets fit as UTF-16 units."""
    if span.text is None or text.isascii():
        return None
    start, end = codepoint_offsets(text, np.asarray([span.start, span.end], np.int32)).tolist()
    if text[start:end].strip() != span.text.strip():
        return None
    return "these offsets count UTF-16 units, as JavaScript does: count code points, of which an emoji is one"


def words_in(words: Offsets, start: int, end: int) -> tuple[int, int]:
    """Return the first word that overlaps a span, and the one behind the last."""
    first = int(np.searchsorted(words[:, 1], start, side="right"))
    return first, max(first, int(np.searchsorted(words[:, 0], end, side="left")))


def cuts_a_word(text: str, spans: Sequence[Span]) -> bool:
    """Say whether a span begins or ends within a word, blanks at its edges aside."""
    words = find_words(text)
    for span in spans:
        part = text[span.start : span.end]
        start, end = span.start + len(part) - len(part.lstrip()), span.end - len(part) + len(part.rstrip())
        first, stop = words_in(words, start, end)
        if first == stop or words[first, 0] != start or words[stop - 1, 1] != end:
            return True
    return False
