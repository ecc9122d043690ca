"""Entities: spans of a text, each with a type."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from finetune.data.records import Finding, row_finding
from finetune.data.spans import Span, check_spans, cuts_a_word, read_spans, to_cell
from finetune.data.targets.base import Keys, Target, conflicting_labels
from finetune.data.targets.metric import Metric
from finetune.data.targets.multi_label import iterative_strata, rare_labels
from modeling.inputs import BadCell, Example

if TYPE_CHECKING:
    from finetune.data.labelled import LabelledRows


@dataclass(frozen=True, slots=True)
class SpanTarget(Target):
    """A cell is a list of spans, `[]` if there are none; a label is the JSON of `[start, end, type]`, in order."""

    kind: ClassVar[str] = "token_labels"
    has_suspects: ClassVar[bool] = True
    names_words: ClassVar[bool] = True
    losses: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("entity_f1", "entity F1"), Metric("macro_f1", "macro F1"))
    refuses: ClassVar[dict[str, str]] = {
        name: f"{name} is for whole texts, and means nothing for entities; leave it out"
        for name in ("oversample", "label_smoothing", "abstain", "class_weights")
    }

    def read(self, cell: str) -> str:
        return to_cell(read_spans(cell))

    def fit(self, label: str, example: Example) -> str:
        """The spans without what the source says is there, once that is checked."""
        if not isinstance(example, str):
            raise BadCell("belongs to a pair, and spans are of one text", code="parse_error", fix="leave text_pair out")
        spans = read_spans(label)
        check_spans(example, spans)
        return _as_label(dict.fromkeys(_trimmed(example, span) for span in spans))

    def names_of(self, label: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for *_, name in json.loads(label)))

    def relabelled(self, label: str, names: Mapping[str, str | None]) -> str | None:
        """A text stays, with the spans that are left."""
        renamed = [(start, end, names.get(name, name)) for start, end, name in json.loads(label)]
        return _as_label((start, end, name) for start, end, name in renamed if name is not None)

    def conflicts(self, rows: LabelledRows, keys: Keys) -> list[Finding]:
        """Of equal texts, whose blanks may differ, by what their spans say."""
        said = [
            json.dumps([[text[start:end], name] for start, end, name in json.loads(label)], ensure_ascii=False)
            for text, label in zip(rows.examples, rows.labels, strict=True)
        ]
        return conflicting_labels(replace(rows, labels=said), keys)

    def strata(self, labels: Sequence[str]) -> list[str]:
        return iterative_strata([self.names_of(label) for label in labels])

    def findings(self, rows: LabelledRows, groups: Keys, needed: int) -> list[Finding]:
        """No span at all is an error; types that are rare, and spans that no tags of words give, are warnings."""
        inputs: defaultdict[str, set[int]] = defaultdict(set)
        for label, group in zip(rows.labels, groups, strict=True):
            for name in self.names_of(label):
                inputs[name].add(group)
        if not inputs:
            message = f"none of the {len(rows):,} rows has a span"
            fix = "annotate some texts, or choose another column of spans"
            numbers = rows.row_numbers.tolist()
            return [row_finding(code="single_class", severity="error", message=message, rows=numbers, fix=fix)]
        return [*rare_labels(rows, inputs, needed), *_cut_words(rows)]


def _cut_words(rows: LabelledRows) -> list[Finding]:
    cut = [
        number
        for number, text, label in zip(rows.row_numbers.tolist(), rows.examples, rows.labels, strict=True)
        if cuts_a_word(text, [Span(*span) for span in json.loads(label)])
    ]
    if not cut:
        return []
    message = (
        f"{len(cut):,} rows have spans that begin or end within a word; a word is labelled whole, so they can never "
    )
    message += "be answered exactly, and count as mistakes"
    fix = "let spans begin and end with words; punctuation is no part of a word"
    return [row_finding(code="span_cuts_a_word", severity="warning", message=message, rows=cut, fix=fix)]


def _trimmed(text: str, span: Span) -> tuple[int, int, str]:
    """Without blanks at its edges, which tools let people mark."""
    part = text[span.start : span.end]
    return span.start + len(part) - len(part.lstrip()), span.end - len(part) + len(part.rstrip()), span.label


def _as_label(spans: Iterable[tuple[int, int, str]]) -> str:
    return json.dumps([list(span) for span in spans], ensure_ascii=False)
