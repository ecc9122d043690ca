"""The baseline that can be served: tf-idf and a linear model, stored as JSON and safetensors.

It needs no backbone, so it is an engine of its own. Margins take the place of a head's logits: `modeling.tasks` makes
probabilities of them, at a temperature fitted on validation rows, or takes them as values.

Features are words and pairs of words, runs of 2 to 5 characters within words (`char_wb`), or both, each part of length
1. Characters are for what has no words, or no blanks between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling import weights
from modeling.errors import WeightsInvalid
from modeling.inputs.text import TextInput, as_one
from modeling.weights import FloatArray

VOCABULARY_NAME = "vocabulary.json"
WEIGHTS_NAME = "baseline.safetensors"
MAX_FEATURES, MAX_CHARACTER_FEATURES = 200_000, 100_000
MOST_READ = 2_000  # characters of a text, of which runs are made; its words are all read
_SHARED: dict[str, Any] = {"lowercase": True, "sublinear_tf": True, "dtype": np.float32}
_WORDS: dict[str, Any] = {**_SHARED, "ngram_range": (1, 2)}
_CHARACTERS: dict[str, Any] = {**_SHARED, "analyzer": "char_wb", "ngram_range": (2, 5)}


@dataclass(frozen=True)
class LinearText:
    """`terms` in column order, then the runs of `characters`, made of the first `characters_read` of a text; `idf`
    float32[features], `weight` float32[outputs, features], `bias` float32[outputs]."""

    terms: tuple[str, ...]
    idf: FloatArray
    weight: FloatArray
    bias: FloatArray
    characters: tuple[str, ...] = ()
    characters_read: int = MOST_READ

    def __post_init__(self) -> None:
        border = len(self.terms)
        parts = ((_WORDS, self.terms, slice(border)), (_CHARACTERS, self.characters, slice(border, None)))
        made = [(_fixed(options, terms, self.idf[own]), own) for options, terms, own in parts if terms]
        object.__setattr__(self, "_parts", made)

    @property
    def size_bytes(self) -> int:
        text = sum(map(len, self.terms)) + sum(map(len, self.characters))
        return self.weight.nbytes + self.idf.nbytes + self.bias.nbytes + text

    def margins(self, texts: Sequence[TextInput]) -> FloatArray:
        """Decision values float32[rows, outputs]; a pair is read as one text."""
        read = [as_one(text) for text in texts]
        found = np.tile(self.bias, (len(read), 1))
        parts: list[tuple[Any, slice]] = self.__dict__["_parts"]
        for vectorizer, own in parts:
            cut = read if vectorizer.analyzer == "word" else (text[: self.characters_read] for text in read)
            found = found + vectorizer.transform(cut) @ self.weight[:, own].T
        return np.asarray(found, dtype=np.float32)

    def files(self) -> dict[str, bytes]:
        """The artefact's files by name. One of words alone is written as it always was."""
        tensors = {"idf": self.idf, "weight": self.weight, "bias": self.bias}
        vocabulary: dict[str, Any] = {"schema": 1, "ngram_range": [1, 2], "terms": self.terms}
        if self.characters:
            runs = {"ngram_range": [2, 5], "read": self.characters_read, "terms": self.characters}
            vocabulary |= {"schema": 2, "characters": runs}
        return {WEIGHTS_NAME: weights.to_bytes(tensors), VOCABULARY_NAME: json.dumps(vocabulary).encode()}

    @classmethod
    def read(cls, folder: Path) -> LinearText:
        """Raises `WeightsInvalid`."""
        tensors, _ = weights.read(folder / WEIGHTS_NAME)
        try:
            vocabulary = json.loads((folder / VOCABULARY_NAME).read_bytes())
            terms, runs = tuple(vocabulary["terms"]), vocabulary.get("characters", {})
            characters, read = tuple(runs.get("terms", ())), int(runs.get("read", MOST_READ))
            idf, weight, bias = tensors["idf"], tensors["weight"], tensors["bias"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsInvalid("the baseline's files are incomplete") from error
        features = len(terms) + len(characters)
        if idf.shape != (features,) or weight.shape != (len(bias), features):
            raise WeightsInvalid("the baseline's weights do not fit its vocabulary")
        return cls(terms, idf, weight, bias, characters, read)


def _fixed(options: dict[str, Any], terms: Iterable[str], idf: FloatArray) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(vocabulary={term: index for index, term in enumerate(terms)}, **options)
    vectorizer.idf_ = idf
    return vectorizer


def new_vectorizer() -> Any:
    """An unfitted vectorizer of words with the options that serving assumes."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(max_features=MAX_FEATURES, **_WORDS)


def new_character_vectorizer(vocabulary: Sequence[str] | None = None) -> Any:
    """The same of runs of characters, with these runs if they are known."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    most = None if vocabulary is not None else MAX_CHARACTER_FEATURES
    return TfidfVectorizer(max_features=most, vocabulary=vocabulary, **_CHARACTERS)
