"""Text: strings and pairs of strings, tokenised by the checkpoint's own tokenizer, alike in training and serving."""

from __future__ import annotations

import itertools
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from modeling.errors import (
    BackboneUnavailable,
    InputTooLong,
    InputUnfit,
    PreprocessorFailed,
    UnsupportedArchitecture,
)
from modeling.ingestion.base import PROMPTS_FILE
from modeling.inputs import text_probe_set
from modeling.inputs.base import Arrays, BadCell, Cell, Features, FileReference, padded
from modeling.inputs.text_identity import normalise
from modeling.inputs.words import LOCATED, Located, find_words, pieces_of_words

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# Tokenizers cut after encoding everything (tokenizers#1573: 650,000 characters cost 45 ms each), so a long text is read
# in slices from its start, each longer than the last, until they hold all the tokens that can be kept.
_CHARACTERS_PER_TOKEN = 8  # of the first slice: enough for most texts
_GROWTH = 4
# What follows a slice may change its last words: a character that combines, half of an added token, blanks. It changes
# no earlier ones if every step of the tokenizer is one of these; a tokenizer with any other reads the whole text.
_EDGE_WORDS = 8
_LOCAL_STEPS = frozenset(
    {
        *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Strip"),
        *("StripAccents", "BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Whitespace"),
        "WhitespaceSplit",
    }
)
_LOCAL_PATTERNS = frozenset({" {2,}", r"\s+", r"\s{2,}|[\n\r\t]"})

# Windows of a text that is longer than the model share this part of their tokens with the next.
_OVERLAP = 0.25
_LEAST_WINDOW, _MOST_WINDOWS = 32, 8_192

_ONE_TOKEN = {
    **{"ids": [0], "type_ids": [0], "tokens": [""], "words": [0], "offsets": [[0, 0]], "overflowing": []},
    **{"special_tokens_mask": [0], "attention_mask": [1], "sequence_ranges": {}},
}

# Padding id and number of segments by model type, where `config.json` leaves them out.
_DEFAULTS = {
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), (1, 2)),
    **dict.fromkeys(("bert", "albert", "electra", "nomic_bert"), (0, 2)),
    "modernbert": (50283, 0),
    "mpnet": (1, 0),
}


@dataclass(frozen=True, slots=True)
class Prompted:
    """A text or pair that comes behind a prompt of its own, instead of behind the backbone's."""

    prompt: str
    text: str | tuple[str, str]


TextInput = str | tuple[str, str] | Prompted


class Text:
    name: ClassVar[str] = "text"
    unit: ClassVar[str] = "token"
    plural: ClassVar[str] = "texts"
    ignores: ClassVar[str] = "case and whitespace"
    roles: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    suffixes: ClassVar[frozenset[str]] = frozenset()  # of .txt, the content becomes the cell
    libraries: ClassVar[tuple[str, ...]] = ("tokenizers",)
    has_baseline: ClassVar[bool] = True

    def open(self, folder: Path, *, limit: int) -> TextPreprocessor:
        return TextPreprocessor(folder, limit=limit)

    def read(self, cells: Mapping[str, Cell]) -> TextInput:
        first, second = cells["text"], cells.get("text_pair", "")
        if isinstance(first, FileReference) or isinstance(second, FileReference):
            raise BadCell("names a file, where a text is read", code="parse_error", fix="choose another column")
        return (first, second) if "text_pair" in cells else first

    def content(self, example: TextInput) -> bytes:
        return "\0".join(_prompted(example)).encode("utf-8", "surrogatepass")

    def digest(self, example: TextInput) -> bytes:
        joined = "\0".join(map(normalise, _parts(example)))
        return blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def size(self, example: TextInput) -> int:
        return len(example) if isinstance(example, str) else sum(map(len, _prompted(example)))

    def is_empty(self, example: TextInput) -> bool:
        return not any(part.strip() for part in _parts(example))

    def with_prompt(self, example: TextInput, prompt: str) -> TextInput:
        return Prompted(prompt, example.text if isinstance(example, Prompted) else example)

    def to_json(self, example: TextInput) -> str | list[str]:
        return example if isinstance(example, str) else list(_parts(example))

    def from_json(self, value: Any) -> TextInput:
        if isinstance(value, str):
            return value
        first, second = value
        return first, second

    def probe_set(self, count: int) -> tuple[list[TextInput], list[int]]:
        found, topics = text_probe_set.texts(count)
        return list(found), topics


def _parts(example: TextInput) -> tuple[str, ...]:
    if isinstance(example, Prompted):
        example = example.text
    return (example,) if isinstance(example, str) else example


def _prompted(example: TextInput, default: str = "") -> tuple[str, ...]:
    """The parts as they are read: the first one behind the example's own prompt, or else the default one."""
    first, *others = _parts(example)
    return (example.prompt if isinstance(example, Prompted) else default) + first, *others


def as_one(example: TextInput) -> str:
    """Return a pair as one text, for what knows no pairs."""
    return example if isinstance(example, str) else " ".join(_parts(example))


class TextPreprocessor:
    """Tokenise for one backbone. Safe to call from several threads: nothing is mutated after construction."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        """`folder` holds `tokenizer.json` and a checkpoint's `config.json`."""
        self.limit = limit
        config = _config(folder)
        self.padding = {"input_ids": int(config["pad_token_id"] or 0)}
        self._takes_types = takes_type_ids(config)
        self._prompt = default_prompt(folder)
        self._tokenizer = _tokenizer((folder / "tokenizer.json").read_text("utf-8"))
        self._layouts = {1: _layout(self._tokenizer, 1), 2: _layout(self._tokenizer, 2)}
        self._edge = _edge_words(self._tokenizer)
        self._takes_blanks = any(token.lstrip for token in self._tokenizer.get_added_tokens_decoder().values())

    def encode(
        self, examples: Sequence[TextInput], *, truncate: bool = True, limit: int | None = None
    ) -> list[list[Features]]:
        """Encode each text, cut to `limit` tokens (at most the backbone's own limit), special tokens included.

        Raises `InputTooLong` with the example's index if it does not fit and `truncate` is off.
        """
        most = min(limit or self.limit, self.limit)
        parts = [_prompted(item, self._prompt) for item in examples]
        pieces = self._read([part for own in parts for part in own], most if truncate else None)
        encoded, position = [], 0
        for index, own in enumerate(parts):
            width = len(own)
            encoded.append([self._assemble(pieces[position : position + width], most, truncate=truncate, index=index)])
            position += width
        return encoded

    def windows(self, examples: Sequence[TextInput], *, limit: int | None = None) -> list[list[Features]]:
        """Encode each text whole, in windows of at most `limit` tokens that overlap. `extra` holds under `located` the
        words that a window answers for: those that are further from its edges than from those of any other.

        Raises `InputUnfit` for a pair.
        """
        most = min(max(limit or self.limit, _LEAST_WINDOW), self.limit)
        parts = [_prompted(item, self._prompt) for item in examples]
        for index, own in enumerate(parts):
            if len(own) > 1:
                raise InputUnfit(f"input {index} is a pair, and places in one text are asked for; send one text")
        encodings = self._encode([text for (text,) in parts])
        found = []
        for index, (item, (prompted,), encoding) in enumerate(zip(examples, parts, encodings, strict=True)):
            (text,) = _parts(item)
            if len(encoding) > _MOST_WINDOWS * most * (1 - _OVERLAP):
                what = f"input {index} has {len(encoding):,} tokens, more than {_MOST_WINDOWS:,} windows of {most} hold"
                raise InputUnfit(f"{what}; send it in parts")
            found.append(self._windows(text, encoding, len(prompted) - len(text), most))
        return found

    def _windows(self, text: str, encoding: Encoding, prompt: int, most: int) -> list[Features]:
        """The windows of a text whose encoding begins with a prompt of so many characters."""
        layout = self._layouts[1]
        lead, room = len(layout.around[0][0]), max(1, most - layout.specials)
        pieces = np.maximum(np.asarray(encoding.offsets, np.int32).reshape(-1, 2) - np.int32(prompt), 0)
        words = find_words(text)
        first, stop = pieces_of_words(words, pieces)
        is_read = stop > first  # a tokenizer leaves some signs out
        words, first, stop = words[is_read], first[is_read], stop[is_read]
        starts, cuts = _window_places(len(encoding), room)
        borders = np.searchsorted(first, cuts)  # of the words that each window answers for
        prompted = int(np.searchsorted(np.maximum.accumulate(pieces[:, 1]), 0, side="right"))
        ids, rows = encoding.ids, []
        for number, start in enumerate(starts):
            own = slice(int(borders[number]), int(borders[number + 1]))
            features = self._features(*layout.fill([ids[start : start + room]]))
            shift, end = lead - start, lead + min(room, len(ids) - start)
            answered = slice(max(int(cuts[number]), prompted), max(int(cuts[number + 1]), prompted))
            located = Located(
                text,
                words[own],
                first[own] + np.int32(shift),
                np.minimum(stop[own] + np.int32(shift), np.int32(end)),
                pieces[answered],
                answered.start + shift,
            )
            rows.append(replace(features, extra={LOCATED: located}))
        return rows

    def collate(self, rows: Sequence[Features], width: int) -> Arrays:
        """int64[rows, width] of each input that the encoder takes."""
        return padded(rows, width, padding=self.padding, mask="attention_mask")

    def sample(self, cost: int) -> Features:
        ((row,),) = self.encode(["warm up"])
        return self._features(np.resize(row.arrays["input_ids"], cost), np.zeros(cost, dtype=np.int64))

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a whole text, with nothing cut off or added."""
        (encoding,) = self._encode([text])
        ids: list[int] = encoding.ids
        return ids

    def normalised(self, text: str) -> str:
        """Return what the tokenizer's normaliser makes of a text."""
        with _told():
            return str(self._tokenizer.normalizer.normalize_str(text)) if self._tokenizer.normalizer else text

    def last_token(self) -> tuple[str, int]:
        """Return the token with the largest id, and that id."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return max(vocabulary.items(), key=lambda item: item[1], default=("", -1))

    def around(self) -> tuple[list[int], list[int]]:
        """Return the ids of all special tokens that a single text or a pair gets, and the types of all positions."""
        ids, types = [], []
        for layout in self._layouts.values():
            ids += [id_ for edge, _ in layout.around for id_ in edge]
            types += [*layout.types, *(type_ for _, edge in layout.around for type_ in edge)]
        return ids, types

    def _features(
        self, ids: npt.NDArray[np.int64], types: npt.NDArray[np.int64], *, is_truncated: bool = False
    ) -> Features:
        arrays = {"input_ids": ids} | ({"token_type_ids": types} if self._takes_types else {})
        return Features(arrays, len(ids), is_truncated=is_truncated)

    def _read(self, texts: Sequence[str], limit: int | None) -> list[_Piece]:
        """Tokenises each text: all of it, or a slice that begins with more than `limit` of the same tokens."""
        size = sys.maxsize if limit is None or self._edge is None else (limit + self._edge) * _CHARACTERS_PER_TOKEN
        pieces: dict[int, _Piece] = {}
        waiting: Sequence[int] = range(len(texts))
        while waiting:
            encodings = self._encode([texts[row][:size] for row in waiting])
            for row, encoding in zip(waiting, encodings, strict=True):
                is_whole = len(texts[row]) <= size
                tokens = len(encoding) if is_whole else self._known_tokens(encoding, texts[row])
                if is_whole or limit is None or tokens > limit:
                    pieces[row] = _Piece(encoding, texts[row], tokens)
            waiting = [row for row in waiting if row not in pieces]
            size *= _GROWTH
        return [pieces[row] for row in range(len(texts))]

    def _encode(self, texts: Sequence[str]) -> Sequence[Encoding]:
        with _told():
            encodings: Sequence[Encoding] = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return encodings

    def _known_tokens(self, encoding: Encoding, text: str) -> int:
        """How many tokens of a slice the whole `text` begins with too."""
        words = [word for word in encoding.word_ids if word is not None]
        known = bisect_right(words, words[-1] - (self._edge or 0)) if words else 0
        offsets = encoding.offsets if self._takes_blanks else []
        # An added token behind the slice may take all blanks before it.
        while known and offsets and not text[slice(*offsets[known - 1])].strip():
            known -= 1
        return known

    def _assemble(self, pieces: Sequence[_Piece], limit: int, *, truncate: bool, index: int) -> Features:
        layout = self._layouts[len(pieces)]
        room = max(0, limit - layout.specials)
        total = sum(piece.tokens for piece in pieces)
        if total <= room:
            return self._features(*layout.fill([piece.encoding.ids for piece in pieces]))
        if not truncate:
            raise InputTooLong(
                f"input {index} has {total + limit - room} tokens, more than {limit}; shorten it or set truncate",
                index=index,
            )
        if len(pieces) == 2 and room % 2 and min(piece.tokens for piece in pieces) > room // 2:
            # The longer one gets the odd token, and slices do not tell which that is.
            pieces = self._read([piece.text for piece in pieces], None)
        sizes = _shares([piece.tokens for piece in pieces], room)
        kept = [piece.encoding.ids[:size] for piece, size in zip(pieces, sizes, strict=True)]
        return self._features(*layout.fill(kept), is_truncated=True)


_NO_WORDS = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}


@lru_cache(maxsize=4)
def _tokenizer(document: str) -> Tokenizer:
    """Fine-tunes have their backbone's: to build one holds all threads up, 25 ms for 30,000 words."""
    from tokenizers import Tokenizer  # what only reads rows goes without

    try:
        tokenizer = Tokenizer.from_str(document)
    except BaseException as error:
        if not _is_of_the_library(error):
            raise
        raise BackboneUnavailable(f"tokenizer.json cannot be read: {str(error)[:200]}") from error
    # Exports bake in padding and truncation of their own; ours are explicit.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def normaliser(step: Mapping[str, Any]) -> Callable[[str], str]:
    """Make one step of a `tokenizer.json`'s normaliser, by itself. Raises `BackboneUnavailable`; what it returns raises
    `PreprocessorFailed`."""
    alone = _tokenizer(json.dumps({**_NO_WORDS, "normalizer": step})).normalizer

    def normalised(text: str) -> str:
        with _told():
            return str(alone.normalize_str(text))

    return normalised


@contextmanager
def _told() -> Iterator[None]:
    """Raise `PreprocessorFailed` in place of what the library raises for an input."""
    try:
        yield
    except BaseException as error:
        if not _is_of_the_library(error):
            raise
        how = "failed" if isinstance(error, Exception) else "panicked"
        raise PreprocessorFailed(f"the model's tokenizer {how} on this input") from error


def _is_of_the_library(error: BaseException) -> bool:
    """It has no class of its own, and a panic of its native code is no `Exception`."""
    is_ours = isinstance(error, MemoryError) or not isinstance(error, Exception)
    return not is_ours or type(error).__name__ == "PanicException"


@dataclass(frozen=True, slots=True)
class _Piece:
    """A text's encoding, or that of a slice, of which the first `tokens` are the text's."""

    encoding: Encoding
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a tokenizer writes around its texts: ids and types before, between and after them, and each text's type.

    Its own `post_process` also makes encodings of all that was cut off, and for pairs in every combination.
    """

    around: tuple[tuple[list[int], list[int]], ...]
    types: tuple[int, ...]

    @property
    def specials(self) -> int:
        return sum(len(ids) for ids, _ in self.around)

    def fill(self, texts: Sequence[list[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """int64[length] ids and types of the texts' tokens with what belongs around them."""
        ids, types = list(self.around[0][0]), list(self.around[0][1])
        for text, type_id, (behind, behind_types) in zip(texts, self.types, self.around[1:], strict=True):
            ids += text + behind
            types += [type_id] * len(text) + behind_types
        return np.array(ids, dtype=np.int64), np.array(types, dtype=np.int64)


def _layout(tokenizer: Tokenizer, texts: int) -> _Layout:
    """Read it off one token for each text. Raises `UnsupportedArchitecture` if the texts are repeated or swapped."""
    from tokenizers import Encoding

    probe = Encoding()
    probe.__setstate__(json.dumps(_ONE_TOKEN).encode())
    whole = tokenizer.post_process(probe, probe if texts == 2 else None, True)
    places = [place for place, is_special in enumerate(whole.special_tokens_mask) if not is_special]
    if [whole.sequence_ids[place] for place in places] != list(range(texts)):
        raise UnsupportedArchitecture("tokenizer.json: its post_processor must write each text once, in their order")
    edges = [-1, *places, len(whole)]
    around = tuple(
        (whole.ids[start + 1 : end], whole.type_ids[start + 1 : end]) for start, end in itertools.pairwise(edges)
    )
    return _Layout(around, tuple(whole.type_ids[place] for place in places))


def takes_type_ids(config: Mapping[str, Any]) -> bool:
    """Say whether the encoder tells the two halves of a pair apart by segment ids."""
    return bool(config["type_vocab_size"] > 1 and config["model_type"] != "distilbert")


def default_prompt(folder: Path) -> str:
    """Return what comes before every text that has no prompt of its own."""
    file = folder / PROMPTS_FILE
    return str(json.loads(file.read_bytes())["default"]) if file.is_file() else ""


def _config(folder: Path) -> dict[str, Any]:
    """`config.json`, with what transformers takes for keys that it lacks."""
    config = json.loads((folder / "config.json").read_bytes())
    padding, types = _DEFAULTS.get(config["model_type"], (0, 0))
    return {"pad_token_id": padding, "type_vocab_size": types, **config}


def _edge_words(tokenizer: Tokenizer) -> int | None:
    """How many words at the end of a slice the text behind it may change; None if that may be any number."""
    added = list(tokenizer.get_added_tokens_decoder().values())
    steps = [json.loads(step.__getstate__()) for step in (tokenizer.normalizer, tokenizer.pre_tokenizer) if step]
    if not all(map(_is_local, steps)) or any(token.lstrip and token.normalized for token in added):
        return None
    contents = [token.content for token in added]
    if tokenizer.normalizer is not None:
        contents += [tokenizer.normalizer.normalize_str(content) for content in contents]
    return _EDGE_WORDS + max(map(len, contents), default=0)


def _is_local(step: dict[str, Any]) -> bool:
    if step["type"] == "Sequence":
        return all(map(_is_local, step.get("normalizers") or step.get("pretokenizers") or []))
    if step["type"] == "Replace":
        pattern = step["pattern"]
        return pattern.get("Regex") in _LOCAL_PATTERNS or 0 < len(pattern.get("String", "")) <= _EDGE_WORDS
    return step["type"] in _LOCAL_STEPS


def _window_places(tokens: int, room: int) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Where the windows of so many tokens start, evenly apart, and int64[windows + 1] where each begins to answer: in
    the middle of what it shares with the one before. The last cut is the end."""
    if tokens <= room:
        return [0], np.array([0, tokens])
    shared = int(room * _OVERLAP)
    count = -(-(tokens - shared) // (room - shared))
    starts = np.round(np.linspace(0, tokens - room, count)).astype(np.int64)
    middles = (starts[1:] + starts[:-1] + room) // 2
    return starts.tolist(), np.concatenate([[0], middles, [tokens]])


def _shares(lengths: list[int], room: int) -> list[int]:
    """Longest first: the longer of a pair is cut until both fit; a single text gets all the room."""
    if len(lengths) == 1:
        return [room]
    shorter = min(lengths)
    small = min(shorter, room // 2)
    big = room - small
    return [small, big] if lengths[0] == shorter else [big, small]
