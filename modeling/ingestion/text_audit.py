"""Whether a checkpoint's tokenizer may read the texts of strangers: what it holds, and what it does to texts made to
provoke it. Runs where it may fail, in a child process with limits: a bad one takes memory, time or the process.

Documents first, since to build a tokenizer runs its normaliser; then vocabulary and layout; then the texts.
"""

from __future__ import annotations

import base64
import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling.errors import BackboneUnavailable, CheckpointRefused, PreprocessorFailed
from modeling.ingestion.base import read_json
from modeling.inputs.text import TextPreprocessor, normaliser

MAX_ADDED_TOKENS = 20_000
MAX_ADDED_CHARACTERS = 1000  # of one
MAX_STEPS = 50  # of normaliser and pre-tokenizer each
MAX_REPLACEMENT = 1000  # characters
MAX_GROWTH = 64  # times as many characters, or tokens a character
# A text of the second size may take this much processor time, and not grow faster than in proportion; a text of the
# largest body takes some 60 times as long.
_SIZES = (1024, 16_384)
_MOST_S, _NOTICED_S, _STEEPER = 1.0, 0.05, 4.0

_SENTENCE = "Another, rather longer text: it has numbers (42), punctuation; and ends here. "
PROBES = ("a short text", _SENTENCE, _SENTENCE * 20, ("a short text", _SENTENCE), (_SENTENCE * 20, "a short text"))
_REPEATED = (
    *(" ", "a", "A", "1", "\n", "\t", "\r\n", "\u0301", "\u200d", "\ufeff", "\x00", "\ufffd", "中", "あ", "é", "😀"),
    *("Ж", "Ω", "ש", "ع", "क", "ก", "한"),
    *("-", ".", "'", "_", "/", "\u00a0", "\u2581", "\ufdfa", "ß", "a ", "a1", "a.", "1,", "e\u0301", " \n", "Aa"),
)
# Behind the repetition: what does not match makes a pattern try all over again, and some try only if a literal follows.
# The first is in no class but negated ones.
_BREAKS = "\ue000!\u00a7a\n"
_PARTS = ("normalizer", "pre_tokenizer")
_SHORT = 32  # characters
_LITERAL = re.compile(r"\\(.)|([^\\\[\](){}|?*+^$.])")
_CODE_POINT = re.compile(r"\\(?:x\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4}))")
_CLASSES = {"s": " ", "S": "a", "w": "a", "W": "-", "d": "1", "D": "a", "p": "a", "P": "-", "n": "\n", "r": "\r"}


def audit(folder: Path, *, limit: int, vocabulary: int, types: int) -> None:
    """Check the `tokenizer.json` of a folder of ours. `vocabulary` and `types` are how many rows the embeddings of
    tokens and of segments have; a model of up to one type gets none.

    Raises `CheckpointRefused` with what, where and how to fix it; `modeling.errors` if it cannot be read at all.
    """
    check_document(folder)
    document = read_json(folder / "tokenizer.json", {})
    preprocessor = TextPreprocessor(folder, limit=limit)
    _check_ids(preprocessor, limit=limit, vocabulary=vocabulary, types=types)
    literals = _literals_of(document)
    behind = _BREAKS + "".join(letter for found in literals for letter in found)
    for unit in _units(document, literals):
        _check_text(preprocessor, unit, behind)


def check_document(folder: Path) -> None:
    """Check what a folder's `tokenizer.json` says, and each step of its normaliser by itself: the part of `audit` that
    needs neither a tokenizer nor torch. Raises as `audit` does."""
    document = read_json(folder / "tokenizer.json", {})
    try:
        _check_added_tokens(document)
        for part in _PARTS:
            _check_steps(part, document.get(part))
        _check_model(document.get("model") or {})
        _check_normaliser(document)
    except (AttributeError, KeyError, TypeError) as error:  # JSON, but of another shape
        raise BackboneUnavailable(f"tokenizer.json cannot be read: {error}; save the tokenizer again") from error


def _check_added_tokens(document: Mapping[str, Any]) -> None:
    added = document.get("added_tokens") or []
    if not isinstance(added, list):
        raise CheckpointRefused("tokenizer.json: added_tokens is no list; save the tokenizer again")
    if len(added) > MAX_ADDED_TOKENS:
        raise CheckpointRefused(
            f"tokenizer.json has {len(added):,} added tokens, more than {MAX_ADDED_TOKENS:,}; put them into the "
            "vocabulary of its model"
        )
    for token in added:
        content = str(token.get("content", "")) if isinstance(token, dict) else ""
        if len(content) > MAX_ADDED_CHARACTERS:
            raise CheckpointRefused(
                f"tokenizer.json: the added token {content[:20]!r}… has {len(content):,} characters, more than "
                f"{MAX_ADDED_CHARACTERS:,}; remove it"
            )


def _check_steps(part: str, step: Any) -> None:
    """Raise if the steps, one inside another, make a text longer than `MAX_GROWTH` times."""
    steps = list(_steps(step))
    if len(steps) > MAX_STEPS:
        raise CheckpointRefused(f"tokenizer.json: {part} has {len(steps):,} steps, more than {MAX_STEPS}; remove some")
    growth = 1.0
    for found in steps:
        content, pattern = str(found.get("content") or found.get("prepend") or ""), _pattern(found)
        if max(len(content), len(pattern)) > MAX_REPLACEMENT:
            raise CheckpointRefused(
                f"tokenizer.json: a pattern or replacement in {part} has more than {MAX_REPLACEMENT:,} characters; "
                "shorten it"
            )
        if found.get("type") == "Precompiled":
            growth *= max(1.0, _longest_mapping(str(found.get("precompiled_charsmap") or "")))
        if found.get("type") == "Replace":
            is_string = "String" in (found.get("pattern") or {})
            growth *= max(1.0, len(content) / (max(1, len(pattern)) if is_string else 1))
    if growth > MAX_GROWTH:
        raise CheckpointRefused(
            f"tokenizer.json: the replacements in {part} can make a text {growth:.3g} times as long, more than "
            f"{MAX_GROWTH}; remove those that lengthen texts"
        )


def _longest_mapping(charsmap: str) -> int:
    """Return how many bytes a table of sentencepiece puts in place of a character at most: behind the size of a trie
    and the trie come the texts that it points to, each with a NUL at its end."""
    try:
        table = base64.b64decode(charsmap, validate=True)
    except ValueError as error:
        raise BackboneUnavailable(
            "tokenizer.json: precompiled_charsmap is not base64; save the tokenizer again"
        ) from error
    texts = 4 + int.from_bytes(table[:4], "little")
    return max(map(len, table[texts:].split(b"\0")))


def _check_normaliser(document: Mapping[str, Any]) -> None:
    """Run the steps one after another, each on what the one before it made, so that none sees a text that has grown
    beyond bounds: a pattern that matches where there is nothing doubles a text at each step."""
    steps = [normaliser(step) for step in _steps(document.get("normalizer")) if "normalizers" not in step]
    for unit in _units(document, _literals_of(document)):
        text = made = unit * (_SHORT // len(unit) + 1)
        for step in steps:
            try:
                made = step(made)
            except PreprocessorFailed:  # `_read` says more of it
                break
            _check_growth(len(made), "characters", text, unit)


def _units(document: Mapping[str, Any], literals: Sequence[Sequence[str]]) -> list[str]:
    """What is repeated to make texts that provoke."""
    found = dict.fromkeys((*_REPEATED, *_provocations(literals), *_first_added(document)))
    return [unit for unit in found if unit]


def _literals_of(document: Mapping[str, Any]) -> list[list[str]]:
    return [_literals(_pattern(step)) for part in _PARTS for step in _steps(document.get(part))]


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """The steps in their order, and before those that it is made of each that has some."""
    waiting = [step]
    while waiting:
        found = waiting.pop(0)
        if isinstance(found, dict):
            yield found
            waiting = [*(found.get("normalizers") or []), *(found.get("pretokenizers") or []), *waiting]


def _pattern(step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern") or {}
    return str(pattern.get("Regex") or pattern.get("String") or "") if isinstance(pattern, dict) else ""


def _check_model(model: Mapping[str, Any]) -> None:
    if model.get("dropout"):
        raise CheckpointRefused(
            f"tokenizer.json: model.dropout is {model['dropout']}, so equal texts would get different answers; set it "
            "to null"
        )


def _check_ids(preprocessor: TextPreprocessor, *, limit: int, vocabulary: int, types: int) -> None:
    """Every id that can come out must have a row in the embeddings."""
    token, largest = preprocessor.last_token()
    if largest >= vocabulary:
        raise CheckpointRefused(
            f"tokenizer.json gives the token {token[:40]!r} the id {largest}, but config.json's vocab_size is "
            f"{vocabulary}, so the embeddings have no row for it; save the tokenizer that the model was trained with, "
            "or enlarge the embeddings with resize_token_embeddings and train them"
        )
    padding = preprocessor.padding["input_ids"]
    if not 0 <= padding < vocabulary:
        raise CheckpointRefused(
            f"config.json: pad_token_id is {padding}, outside of 0 to {vocabulary - 1}; write the id of the padding "
            "token"
        )
    specials, segments = preprocessor.around()
    if max(specials, default=0) >= vocabulary or (types > 1 and max(segments, default=0) >= types):
        raise CheckpointRefused(
            "tokenizer.json: post_processor writes ids or types that the embeddings have no row for; it must use ids "
            f"below {vocabulary} and types below {types}"
        )
    if len(specials) >= limit:
        raise CheckpointRefused(
            f"tokenizer.json: post_processor writes {len(specials)} special tokens, and the model reads {limit} in all;"
            " shorten its template"
        )


def _provocations(literals: Sequence[Sequence[str]]) -> Iterator[str]:
    """What patterns look for, since only that makes them work."""
    for found in literals:
        yield from found
        yield "".join(found)
        yield from (a + b for a, b in itertools.pairwise(found))


def _first_added(document: Mapping[str, Any]) -> list[str]:
    return [str(token.get("content", ""))[:100] for token in (document.get("added_tokens") or [])[:4]]


def _literals(pattern: str) -> list[str]:
    written = [chr(int("".join(found), 16) % 0x110000) for found in _CODE_POINT.findall(pattern)]
    others = _LITERAL.findall(_CODE_POINT.sub("", pattern))
    found = [*written, *(_CLASSES.get(escaped, escaped) if escaped else plain for escaped, plain in others)]
    return [letter for letter in dict.fromkeys(found) if not "\ud800" <= letter <= "\udfff"][:40]


def _check_text(preprocessor: TextPreprocessor, unit: str, behind: str) -> None:
    """Raise unless `unit` repeated takes time and tokens in proportion to its length, and gives the same ones twice."""
    _read(preprocessor, unit, behind, _SHORT)  # some need minutes for a few hundred characters
    small, large = (_read(preprocessor, unit, behind, size) for size in _SIZES)
    if large > _NOTICED_S:  # the first run also fills caches
        small, large = (_read(preprocessor, unit, behind, size) for size in _SIZES)
    steepness = large / max(small, 1e-3) * _SIZES[0] / _SIZES[1]
    if large > _MOST_S or (large > _NOTICED_S and steepness > _STEEPER):
        raise CheckpointRefused(
            f"tokenizer.json: {unit[:20]!r} repeated takes {small:.2g} s for {_SIZES[0]:,} characters and {large:.2g} s"
            f" for {_SIZES[1]:,}; replace the patterns of normalizer and pre_tokenizer that try one place again and "
            "again"
        )


def _read(preprocessor: TextPreprocessor, unit: str, behind: str, size: int) -> float:
    """Read a text of this size and return the processor time, which does not depend on what else the machine does."""
    text = unit * (size // len(unit)) + behind
    started = time.process_time()
    try:
        if size < _SIZES[1]:
            _check_growth(len(preprocessor.normalised(text)), "characters", text, unit)
        tokens = preprocessor.tokens(text)
    except PreprocessorFailed as error:
        raise CheckpointRefused(
            f"tokenizer.json cannot read {unit[:20]!r} repeated ({str(error.__cause__)[:200]}); correct it, or save "
            "the tokenizer again with a current version"
        ) from error
    seconds = time.process_time() - started
    _check_growth(len(tokens), "tokens", text, unit)
    if size == _SIZES[0] and preprocessor.tokens(text) != tokens:
        raise CheckpointRefused(
            f"tokenizer.json gives {unit[:20]!r} repeated other tokens each time; remove what is random in it"
        )
    return seconds


def _check_growth(count: int, what: str, text: str, unit: str) -> None:
    if count > MAX_GROWTH * len(text):
        raise CheckpointRefused(
            f"tokenizer.json makes {count:,} {what} of {len(text):,} characters, {unit[:20]!r} repeated; remove the "
            "steps that lengthen texts"
        )
