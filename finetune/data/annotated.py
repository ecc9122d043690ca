"""Rows of annotation tools: what Doccano, Label Studio and Prodigy export, and rows of tokens and tags, as a text and
its spans. A row of none of these shapes is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from finetune.data.record_batches import FindingLog
from finetune.data.spans import Span, spans_of, to_cell
from finetune.data.tag_schemes import TagReader, are_tags, join_tokens, place_tokens
from modeling.inputs import BadCell

TEXT, SPANS = "text", "spans"
_TAGS_BY_NAME: Final = ("ner_tags", "bio_tags", "ner")
TAG_COLUMNS: Final = ("tags", *_TAGS_BY_NAME, "labels", "label")
_SPAN_COLUMNS: Final = ("spans", "entities", "label", "labels")
_PRODIGY: Final = ("accept", "reject", "ignore")

Row = dict[str, Any]


class Annotations:
    """Reads the rows of one file. `known` has read them all before: what only some rows show holds for the others, as
    that texts without an entity have an empty list in the place of their spans."""

    def __init__(self, log: FindingLog, known: Annotations | None = None) -> None:
        self._log, self._tags, self._tag_column = log, TagReader(), ""
        self.span_column: str | None = known.span_column if known is not None else None

    def tell(self) -> None:
        """After the last row: note what only all rows together show."""
        self._tags.tell(self._log, self._tag_column)

    def settled(self, columns: Iterable[str]) -> list[str]:
        """Return the columns of a file of which all rows were read: that of the spans has its own name."""
        found = [name for name in columns if name != self.span_column or name == SPANS]
        return found if self.span_column is None or SPANS in found else [*found, SPANS]

    def concerns(self, row: Mapping[str, Any]) -> bool:
        """Say whether `read` may change a row."""
        return self.span_column is not None or any(isinstance(cell, list | tuple) for cell in row.values())

    def read(self, number: int, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row with its text and spans as plain cells; unchanged if it is not annotated so. None, with a
        finding, if it cannot be used."""
        try:
            return self._read(number, dict(row))
        except BadCell as error:
            self._log.note("span", f"row {number} {error}", code=error.code, row=number, column=SPANS, fix=error.fix)
            return None

    def _read(self, number: int, row: Row) -> dict[str, Any] | None:
        if isinstance(row.get("annotations"), list) and isinstance(row.get("data"), dict):
            return self._label_studio(number, row)
        if _is_of_prodigy(row):
            return self._prodigy(number, row)
        if isinstance(row.get(TEXT), str) and (name := self._span_column(row)) is not None:
            items = row.pop(name, None)
            return {**_plain(row), SPANS: to_cell(spans_of(items or []))}
        tokens = row.get("tokens")
        if isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens):
            return self._tagged(number, row, tokens)
        return row

    def _span_column(self, row: Mapping[str, Any]) -> str | None:
        """The column that holds spans as objects or triples, in this row or in others."""
        for name in _SPAN_COLUMNS:
            items = row.get(name)
            if isinstance(items, list) and items and all(map(_looks_like_span, items)):
                self.span_column = self.span_column or name
                return name
        if isinstance(row.get(SPANS), list) and not row[SPANS]:
            return SPANS
        known = self.span_column
        return known if known is not None and row.get(known) in (None, []) else None

    def _prodigy(self, number: int, row: Row) -> dict[str, Any] | None:
        if row.get("answer", "accept") != "accept":
            message = f"row {number} was answered with {row['answer']!r}, and is left out"
            fix = "nothing to do; accept it in the tool to train on it"
            self._log.note("answer", message, code="row_left_out", severity="info", row=number, fix=fix)
            return None
        items = row.pop(SPANS, None)
        return {**_plain(row), SPANS: to_cell(spans_of(items or []))}

    def _tagged(self, number: int, row: Row, tokens: list[str]) -> dict[str, Any] | None:
        given = [name for name in TAG_COLUMNS if isinstance(row.get(name), list) and row[name]]
        name = next(
            (name for name in given if all(isinstance(tag, str) for tag in row[name]) and are_tags(row[name])), ""
        )
        if not name:
            self._tell_unknown(number, row, [one for one in given if one in _TAGS_BY_NAME])
            return row
        tags = row[name]
        if len(tags) != len(tokens):
            message = f"row {number} has {len(tokens)} tokens and {len(tags)} tags"
            fix = "give each token one tag"
            self._log.note("length", message, code="tokens_tags_length", row=number, column=name, fix=fix)
            return None
        self._tag_column = name
        text = row.get(TEXT)
        places = None
        if isinstance(text, str):
            places = place_tokens(text, tokens)
            if places is None:
                fix = "leave the text out, and the tokens are joined by blanks; or give the tokens as the text has them"
                raise BadCell("has tokens that are not in its text in this order", code="span_text_mismatch", fix=fix)
        else:
            text, places = join_tokens(tokens)
        return {**row, TEXT: text, SPANS: to_cell(self._tags.spans(number, tags, places))}

    def _tell_unknown(self, number: int, row: Row, names: list[str]) -> None:
        for name in names[:1]:
            odd = next((str(tag) for tag in row[name] if not isinstance(tag, str) or not are_tags([tag])), "")
            message = f"row {number} has the tag {odd[:40]!r} under {name!r}, which is of no known scheme, so the row "
            message += "has no spans"
            fix = "write O, B-TYPE and I-TYPE (or IOB1, BIOES, BILOU); of numbers, write the names that they stand for"
            self._log.note("tag", message, code="unknown_scheme", severity="warning", row=number, column=name, fix=fix)

    def _label_studio(self, number: int, row: Row) -> dict[str, Any] | None:
        texts = {name: value for name, value in row["data"].items() if isinstance(value, str)}
        settled = [one for one in row["annotations"] if isinstance(one, dict) and not one.get("was_cancelled")]
        if not settled or not texts:
            message = f"row {number} has no annotation, and is left out" if texts else f"row {number} has no text"
            fix = "nothing to do; annotate it to train on it" if texts else "export tasks whose data has a text"
            self._log.note("task", message, code="row_left_out", severity="info", row=number, fix=fix)
            return None
        if len(settled) > 1:
            message = f"row {number} has {len(settled)} annotations, of which the first is read"
            fix = "nothing to do; export one annotation for each task to choose which"
            self._log.note("several", message, code="several_annotations", severity="info", row=number, fix=fix)
        regions = [one["value"] for one in settled[0].get("result") or [] if _has_value(one)]
        other = next((key for value in regions for key in value if key in {"hypertextlabels", "paragraphlabels"}), None)
        if other is not None:
            fix = "export texts that were annotated as Text, whose offsets count their characters"
            raise BadCell(f"has regions of {other}, whose offsets are not of the text", code="parse_error", fix=fix)
        spans = spans_of([value for value in regions if {"start", "end", "labels"} <= value.keys()])
        name = _text_of(texts, spans)
        found: Row = {key: value for key, value in texts.items() if key != name} | {TEXT: texts[name]}
        choices = [choice for value in regions for choice in value.get("choices") or [] if isinstance(choice, str)]
        if choices:
            found["label"] = choices[0] if len(choices) == 1 else choices
        if spans or not choices:
            found[SPANS] = to_cell(spans)
        return found


def _text_of(texts: Mapping[str, str], spans: list[Span]) -> str:
    """The name of the text that the spans are of."""
    if TEXT in texts:
        return TEXT
    named = [span for span in spans if span.text is not None]
    fitting = [
        name
        for name, text in texts.items()
        if all(text[span.start : span.end].strip() == (span.text or "").strip() for span in named)
    ]
    return max(fitting or texts, key=lambda name: len(texts[name]))


def _has_value(region: Any) -> bool:
    return isinstance(region, dict) and isinstance(region.get("value"), dict)


def _is_of_prodigy(row: Mapping[str, Any]) -> bool:
    has_objects = isinstance(row.get("tokens"), list) and any(isinstance(token, dict) for token in row["tokens"])
    return isinstance(row.get(TEXT), str) and (
        "_input_hash" in row or (row.get("answer") in _PRODIGY and (has_objects or SPANS in row))
    )


def _looks_like_span(item: Any) -> bool:
    if isinstance(item, list):
        return len(item) == 3 and isinstance(item[2], str) and not isinstance(item[0], list | dict)
    return isinstance(item, dict) and ({"start", "end"} <= item.keys() or {"start_offset", "end_offset"} <= item.keys())


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without what tools keep beside the annotation: objects, and lists of them."""
    return {name: value for name, value in row.items() if not _is_nested(value)}


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, list | dict) for one in value))
