"""Sentences of a file in the manner of CoNLL: a token a line with its tag in the last column, a blank line between
sentences. Each becomes a row with its text, the tokens joined by blanks, and its spans.

Columns are separated by tabs or, without any, by blanks. The token is in the first column, or in the second if the
first counts the tokens (CoNLL-U). A row has the number of the line of its first token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.annotated import SPANS, TEXT
from finetune.data.record_batches import NOTHING, FindingLog, Limits, RowSource, table
from finetune.data.spans import to_cell
from finetune.data.tag_schemes import TagReader, join_tokens, split_tag
from finetune.data.text_lines import TextFile, Utf8Lines

_DOCUMENT = "-DOCSTART-"
_LOOKED_AT = 20
_FIX = "write a token and its tag on each line, separated by a tab or a blank: Ada B-PER"


def looks_like_conll(text: str) -> bool:
    """Say whether the beginning of a file is tokens with tags; a last line that was cut does not count."""
    lines = [line for line in text.splitlines()[:-1] if line.strip() and not line.startswith(("# ", _DOCUMENT))]
    lines = lines[:_LOOKED_AT]
    columns = [_columns(line) for line in lines]
    return len(lines) >= 2 and all(len(own) > 1 and split_tag(own[-1]) is not None for own in columns)


@contextlib.contextmanager
def open_conll(path: Path, log: FindingLog, limits: Limits) -> Iterator[RowSource]:
    text = TextFile.look(path, log)
    if text is None:
        yield NOTHING
        return
    with text.open() as stream:
        yield table((TEXT, SPANS), _rows(Utf8Lines(stream, log, limits), log, limits), log, limits)


@dataclass
class _Sentence:
    row: int = 0
    lines: list[list[str]] = field(default_factory=list)
    characters: int = 0
    is_sound: bool = True

    @property
    def tokens(self) -> list[str]:
        """Of the first column, or of the second if the first counts them."""
        firsts = [columns[0] for columns in self.lines]
        is_counted = firsts == [str(number) for number in range(1, len(firsts) + 1)]
        has_more = all(len(columns) > 2 for columns in self.lines)
        return [columns[1] for columns in self.lines] if is_counted and has_more else firsts

    @property
    def tags(self) -> list[str]:
        return [columns[-1] for columns in self.lines]


def _rows(lines: Utf8Lines, log: FindingLog, limits: Limits) -> Iterator[tuple[int, Sequence[str]]]:
    tags = TagReader()
    for sentence in _sentences(lines, log, limits):
        text, places = join_tokens(sentence.tokens)
        yield sentence.row, (text, to_cell(tags.spans(sentence.row, sentence.tags, places)))
    tags.tell(log, "tags")


def _sentences(lines: Utf8Lines, log: FindingLog, limits: Limits) -> Iterator[_Sentence]:
    """Those whose lines can all be read."""
    sentence = _Sentence()
    while True:
        lines.row += 1
        lines.is_damaged = False
        line = next(lines, None)
        if line is None or not line.strip() or _is_aside(line):
            if sentence.lines and sentence.is_sound:
                yield sentence
            sentence = _Sentence()
            if line is None:
                return
            continue
        sentence.row = sentence.row or lines.row
        columns = _columns(line)
        sentence.characters += len(line)
        if sentence.characters > limits.row_bytes:
            if sentence.is_sound:
                message = f"the sentence from line {sentence.row} on has more than {limits.row_bytes:,} characters"
                log.note("long", message, row=sentence.row, fix="put a blank line between sentences")
            sentence.is_sound, sentence.lines = False, []
        elif lines.is_damaged:
            sentence.is_sound = False
        elif len(columns) < 2:
            message = f"line {lines.row} has one column, {line.strip()[:40]!r}, and needs a token and its tag"
            log.note("columns", message, code="tokens_tags_length", row=lines.row, fix=_FIX)
            sentence.is_sound = False
        elif split_tag(columns[-1]) is None:
            message = f"line {lines.row} ends with {columns[-1][:40]!r}, which is a tag of no known scheme"
            fix = "put the tags into the last column: O, B-TYPE and I-TYPE (or IOB1, BIOES, BILOU)"
            log.note("tag", message, code="unknown_scheme", row=lines.row, fix=fix)
            sentence.is_sound = False
        else:
            sentence.lines.append(columns)


def _is_aside(line: str) -> bool:
    """A comment of CoNLL-U, which does not end with a tag as the token # would, or the beginning of a document."""
    is_comment = line.startswith("# ") and (" = " in line or split_tag(_columns(line)[-1]) is None)
    return line.startswith(_DOCUMENT) or is_comment


def _columns(line: str) -> list[str]:
    stripped = line.strip("\r\n")
    return [column.strip() for column in stripped.split("\t")] if "\t" in stripped else stripped.split()
