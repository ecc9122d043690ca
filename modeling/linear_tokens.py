"""The baseline of entities that can be served: hashed features of words and their neighbours, and a linear model.

A word's features are itself, its shape, its beginnings and ends, runs of characters, and words and shapes of its
neighbours: what taggers went by before they had embeddings (Ratinov and Roth, Design challenges and misconceptions in
named entity recognition, CoNLL 2009). It needs no backbone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from modeling import weights
from modeling.errors import InputUnfit, WeightsInvalid
from modeling.inputs import Example
from modeling.inputs.words import LOCATED, Located, Offsets, find_words
from modeling.weights import FloatArray

WEIGHTS_NAME: Final = "baseline.safetensors"
FEATURES: Final = 1 << 17
MOST_WORDS: Final = 100_000  # of an input: each costs some 50 µs
_WORDS_AT_ONCE = 4_096
_SCHEMA: Final = "1"  # raised when a word gets other features
_WINDOW = 2
_AFFIX = 4
_READ = 24  # characters of a word
_RUNS = (3, 4)
_SHAPES = ((re.compile("[A-ZÀ-Þ]"), "X"), (re.compile(r"[^\W\d_A-ZÀ-Þ]"), "x"), (re.compile(r"\d"), "9"))
_REPEATED = re.compile(r"(.)\1+")


@dataclass(frozen=True)
class LinearTokens:
    """`columns` float32[features, outputs], which a sparse product reads row by row; `bias` float32[outputs]."""

    columns: FloatArray
    bias: FloatArray

    @classmethod
    def of(cls, weight: FloatArray, bias: FloatArray) -> LinearTokens:
        """`weight` is float32[outputs, features]."""
        return cls(np.ascontiguousarray(weight.T, np.float32), bias)

    @property
    def size_bytes(self) -> int:
        return self.columns.nbytes + self.bias.nbytes

    def margins(self, texts: Sequence[Example]) -> list[FloatArray]:
        """Decision values float32[words, outputs] of each text."""
        places = [find_words(text_of(text)) for text in texts]
        parts = [part @ self.columns + self.bias for part in feature_parts(list(map(text_of, texts)), places)]
        values = np.concatenate([np.zeros((0, len(self.bias)), np.float32), *parts]).astype(np.float32)
        return np.split(values, np.cumsum([len(own) for own in places])[:-1])

    def files(self) -> dict[str, bytes]:
        tensors = {"weight": np.ascontiguousarray(self.columns.T), "bias": self.bias}
        return {WEIGHTS_NAME: weights.to_bytes(tensors, {"features": _SCHEMA})}

    @classmethod
    def read(cls, folder: Path) -> LinearTokens:
        """Raises `WeightsInvalid`."""
        tensors, metadata = weights.read(folder / WEIGHTS_NAME)
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is None or bias is None or weight.shape != (len(bias), FEATURES):
            raise WeightsInvalid("the baseline's weights are incomplete, or do not fit its features")
        if metadata.get("features") != _SCHEMA:
            raise WeightsInvalid("the baseline was trained on features that this release does not make")
        return cls.of(weight, bias)


def text_of(example: Example) -> str:
    """Raises `InputUnfit` for a pair."""
    if not isinstance(example, str):
        raise InputUnfit("the input is a pair, and places in one text are asked for; send one text")
    return example


def located_words(example: Example) -> dict[str, Any]:
    """Return what an answer needs beside the scores of the words, which are the positions here."""
    text = text_of(example)
    words = find_words(text)
    if len(words) > MOST_WORDS:
        raise InputUnfit(f"the input has {len(words):,} words, more than {MOST_WORDS:,}; send it in parts")
    places = np.arange(len(words), dtype=np.int32)
    return {LOCATED: Located(text, words, places, places + 1, words, 0)}


def word_features(texts: Sequence[str], places: Sequence[Offsets]) -> Any:
    """Return a sparse matrix float32[words, 2^17] of the words of all texts, one after the other, rows of length 1."""
    from scipy.sparse import csr_matrix, vstack

    parts = list(feature_parts(texts, places))
    return vstack(parts, format="csr") if parts else csr_matrix((0, FEATURES), dtype=np.float32)


def feature_parts(texts: Sequence[str], places: Sequence[Offsets]) -> Iterator[Any]:
    """Yield the rows of `word_features` in parts: a word's names take 2 kB until they are hashed."""
    from sklearn.feature_extraction import FeatureHasher

    hasher = FeatureHasher(FEATURES, input_type="string", dtype=np.float32, alternate_sign=False)
    rows = (names for text, own in zip(texts, places, strict=True) for names in _named(text, own))
    while part := list(itertools.islice(rows, _WORDS_AT_ONCE)):
        found = hasher.transform(part)
        lengths = np.sqrt(np.asarray(found.multiply(found).sum(axis=1)).ravel())
        found.data /= np.repeat(np.maximum(lengths, 1e-9), np.diff(found.indptr)).astype(np.float32)
        yield found


def _named(text: str, places: Offsets) -> Iterator[list[str]]:
    """The features of each word by name."""
    words = [text[start:end][:_READ] for start, end in places.tolist()]
    lowered = [word.lower() for word in words]
    shapes = [_shape(word) for word in words]
    gaps = [False, *(int(places[i, 0]) == int(places[i - 1, 1]) for i in range(1, len(words)))]
    for place, word in enumerate(words):
        low = lowered[place]
        names = [
            "bias",
            f"w={low}",
            f"W={word}",
            f"s={shapes[place]}",
            f"len={min(len(word), 8)}",
            f"gap={gaps[place]}",
        ]
        for size in range(1, min(_AFFIX, len(low)) + 1):
            names += (f"<{low[:size]}", f">{low[-size:]}")
        marked = f"^{low}$"
        names += [f"r={marked[at : at + size]}" for size in _RUNS for at in range(len(marked) - size + 1)]
        for step in range(-_WINDOW, _WINDOW + 1):
            at = place + step
            if step and 0 <= at < len(words):
                names += (f"{step}w={lowered[at]}", f"{step}s={shapes[at]}")
            elif step:
                names.append(f"{step}w=")
        if place:
            names.append(f"-1+w={lowered[place - 1]}|{low}")
            names.append(f"-1+s={shapes[place - 1]}|{shapes[place]}")
        if place + 1 < len(words):
            names.append(f"w+1={low}|{lowered[place + 1]}")
            names.append(f"s+1={shapes[place]}|{shapes[place + 1]}")
        yield names


def _shape(word: str) -> str:
    """`Xx` of Ada, `X9` of A380: kinds of characters, each run once."""
    if word.isascii() and word.islower():
        return "x"
    shape = word
    for pattern, sign in _SHAPES:
        shape = pattern.sub(sign, shape)
    return _REPEATED.sub(r"\1", shape)
