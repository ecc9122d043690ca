"""Text to token ids, the same call in training and serving. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from modeling.errors import InputTooLong

# Tokenizers cut after encoding everything (tokenizers#1573: 650,000 characters cost 45 ms each), so a
# text is first cut to this many characters per token that may remain.
CHARACTERS_PER_TOKEN = 16

TextInput = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One input ready for an engine: `input_ids` and `type_ids` are int64[length], special tokens included."""

    input_ids: npt.NDArray[np.int64]
    type_ids: npt.NDArray[np.int64]
    is_truncated: bool = False

    @property
    def length(self) -> int:
        """What the input costs, in tokens."""
        return len(self.input_ids)


class TextPreprocessor:
    """Tokenises for one backbone. Safe to call from several threads: nothing is mutated after construction."""

    def __init__(self, tokenizer_file: Path, *, max_length: int) -> None:
        self.max_length = max_length
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        # Exports bake in padding and truncation of their own; ours are explicit.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._specials = {
            False: self._tokenizer.num_special_tokens_to_add(False),
            True: self._tokenizer.num_special_tokens_to_add(True),
        }

    def encode(
        self, inputs: Sequence[TextInput], *, truncate: bool = True, max_length: int | None = None
    ) -> list[Encoded]:
        """Encodes each input, cut to `max_length` tokens (at most the backbone's own limit).

        Raises `InputTooLong` with the input's index where cutting is needed and `truncate` is off.
        """
        limit = min(max_length or self.max_length, self.max_length)
        characters = limit * CHARACTERS_PER_TOKEN if truncate else None
        bare = self._tokenizer.encode_batch(
            [_cut(item, characters) for item in _flatten(inputs)], add_special_tokens=False
        )
        encoded, position = [], 0
        for index, item in enumerate(inputs):
            width = 1 if isinstance(item, str) else 2
            encoded.append(self._assemble(bare[position : position + width], limit, truncate=truncate, index=index))
            position += width
        return encoded

    def _assemble(self, parts: list[Encoding], limit: int, *, truncate: bool, index: int) -> Encoded:
        room = max(0, limit - self._specials[len(parts) == 2])
        total = sum(len(part.ids) for part in parts)
        is_truncated = total > room
        if is_truncated:
            if not truncate:
                raise InputTooLong(
                    f"input {index} has {total + limit - room} tokens, more than {limit}; shorten it or set truncate",
                    index=index,
                )
            for part, size in zip(parts, _shares([len(part.ids) for part in parts], room), strict=True):
                part.truncate(size)
        whole = self._tokenizer.post_process(parts[0], parts[1] if len(parts) == 2 else None, True)
        return Encoded(
            np.asarray(whole.ids, dtype=np.int64), np.asarray(whole.type_ids, dtype=np.int64), is_truncated=is_truncated
        )


def _flatten(inputs: Sequence[TextInput]) -> list[str]:
    flat: list[str] = []
    for item in inputs:
        if isinstance(item, str):
            flat.append(item)
        else:
            flat.extend(item)
    return flat


def _cut(text: str, characters: int | None) -> str:
    return text if characters is None or len(text) <= characters else text[:characters]


def _shares(lengths: list[int], room: int) -> list[int]:
    """Longest first: the longer of a pair is cut until both fit; a single text gets all the room."""
    if len(lengths) == 1:
        return [room]
    shorter = min(lengths)
    small = min(shorter, room // 2)
    big = room - small
    return [small, big] if lengths[0] == shorter else [big, small]
