"""Rows of annotation tools: what Doccano, Label Studio and Prodigy export, and rows of tokens and tags, as a text and
its spans. A row of none of these shapes is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from finetune.data.record_batches import FindingLog
from finetune.data.spans import spans_of, to_cell
from finetune.data.tag_schemes import TagReader, are_tags, join_tokens, place_tokens
from modeling.inputs import BadCell

TEXT, SPANS = "text", "spans"
TAG_COLUMNS: Final = ("tags", "ner_tags", "ner", "bio_tags", "labels", "label")
_SPAN_COLUMNS: Final = ("spans", "entities", "label", "labels")
_SETTLED: Final = frozenset({"reject", "ignore"})

Row = dict[str, Any]
Cell = str | None


class Annotations:
    """Reads the rows of one file, and remembers the scheme of its tags."""

    def __init__(self, log: FindingLog) -> None:
        self._log, self._tags, self._tag_column = log, TagReader(), ""

    def tell(self) -> None:
        """After the last row: note what only all rows together show."""
        self._tags.tell(self._log, self._tag_column)

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
        if row.get("answer") in _SETTLED and SPANS in row:
            message = f"row {number} was answered with {row['answer']!r}, and is left out"
            fix = "nothing to do; accept it in the tool to train on it"
            self._log.note("answer", message, code="row_left_out", severity="info", row=number, fix=fix)
            return None
        if isinstance(row.get(TEXT), str) and (name := _span_column(row)) is not None:
            items = row.pop(name)
            return {**_plain(row), SPANS: to_cell(spans_of(items))}
        tokens = row.get("tokens")
        if isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens):
            return self._tagged(number, row, tokens)
        return row

    def _tagged(self, number: int, row: Row, tokens: list[str]) -> dict[str, Any] | None:
        name = next((name for name in TAG_COLUMNS if isinstance(row.get(name), list)), None)
        if name is None:
            return row
        tags = row[name]
        if len(tags) != len(tokens):
            message = f"row {number} has {len(tokens)} tokens and {len(tags)} tags"
            fix = "give each token one tag"
            self._log.note("length", message, code="tokens_tags_length", row=number, column=name, fix=fix)
            return None
        if not all(isinstance(tag, str) for tag in tags) or not are_tags(tags):
            odd = next((str(tag) for tag in tags if not isinstance(tag, str) or not are_tags([tag])), "")
            message = f"row {number} has the tag {odd[:40]!r} under {name!r}, which is of no known scheme, so the row "
            message += "has no spans"
            fix = "write O, B-TYPE and I-TYPE (or IOB1, BIOES, BILOU); of numbers, write the names that they stand for"
            self._log.note("tag", message, code="unknown_scheme", severity="warning", row=number, column=name, fix=fix)
            return row
        self._tag_column = name
        text = row.get(TEXT)
        places = place_tokens(text, tokens) if isinstance(text, str) else None
        if places is None:
            text, places = join_tokens(tokens)
        spans = self._tags.spans(number, tags, places)
        rest = {key: value for key, value in row.items() if key not in {"tokens", name}}
        return {**rest, TEXT: text, SPANS: to_cell(spans)}

    def _label_studio(self, number: int, row: Row) -> dict[str, Any] | None:
        data = row["data"]
        texts = {name: value for name, value in data.items() if isinstance(value, str)}
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
        name = TEXT if TEXT in texts else next(iter(texts))
        items = [one["value"] for one in settled[0].get("result") or [] if _is_span(one)]
        others = {key: value for key, value in texts.items() if key != name}
        return {**others, TEXT: texts[name], SPANS: to_cell(spans_of(items))}


def _is_span(region: Any) -> bool:
    """Whether a region of Label Studio marks a stretch of text: choices and relations do not."""
    value = region.get("value") if isinstance(region, dict) else None
    return isinstance(value, dict) and {"start", "end", "labels"} <= value.keys()


def _span_column(row: Mapping[str, Any]) -> str | None:
    """The column that holds spans as objects or triples."""
    for name in _SPAN_COLUMNS:
        items = row.get(name)
        if not isinstance(items, list) or not items:
            continue
        if all(_looks_like_span(item) for item in items):
            return name
    has_none = isinstance(row.get(SPANS), list) and not row[SPANS]
    return SPANS if has_none else None


def _looks_like_span(item: Any) -> bool:
    if isinstance(item, list):
        return len(item) == 3 and isinstance(item[2], str) and not isinstance(item[0], list | dict)
    return isinstance(item, dict) and ({"start", "end"} <= item.keys() or {"start_offset", "end_offset"} <= item.keys())


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without what tools keep beside the annotation: objects, and lists of them."""
    return {name: value for name, value in row.items() if not _is_nested(value)}


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, list | dict) for one in value))
