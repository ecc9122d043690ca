"""The baseline that can be served: tf-idf and a linear model, stored as JSON and safetensors.

It needs no backbone, so it is an engine of its own. Margins take the place of a head's logits: `modeling.tasks` makes
probabilities of them, at a temperature fitted on validation rows, or takes them as values.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
MAX_FEATURES = 200_000
_OPTIONS: dict[str, Any] = {"lowercase": True, "ngram_range": (1, 2), "sublinear_tf": True, "dtype": np.float32}


@dataclass(frozen=True)
class LinearText:
    """`terms` in column order, `idf` float32[terms], `weight` float32[outputs, terms], `bias` float32[outputs]."""

    terms: tuple[str, ...]
    idf: FloatArray
    weight: FloatArray
    bias: FloatArray

    def __post_init__(self) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(vocabulary={term: index for index, term in enumerate(self.terms)}, **_OPTIONS)
        vectorizer.idf_ = self.idf
        object.__setattr__(self, "_vectorizer", vectorizer)

    @property
    def size_bytes(self) -> int:
        return self.weight.nbytes + self.idf.nbytes + self.bias.nbytes + sum(len(term) for term in self.terms)

    def margins(self, texts: Sequence[TextInput]) -> FloatArray:
        """Decision values float32[rows, outputs]; a pair is read as one text."""
        vectorizer: Any = self.__dict__["_vectorizer"]
        return np.asarray(vectorizer.transform(map(as_one, texts)) @ self.weight.T + self.bias, dtype=np.float32)

    def files(self) -> dict[str, bytes]:
        """The artefact's files by name."""
        tensors = {"idf": self.idf, "weight": self.weight, "bias": self.bias}
        vocabulary = {"schema": 1, "ngram_range": [1, 2], "terms": self.terms}
        return {WEIGHTS_NAME: weights.to_bytes(tensors), VOCABULARY_NAME: json.dumps(vocabulary).encode()}

    @classmethod
    def read(cls, folder: Path) -> LinearText:
        """Raises `WeightsInvalid`."""
        tensors, _ = weights.read(folder / WEIGHTS_NAME)
        try:
            terms = tuple(json.loads((folder / VOCABULARY_NAME).read_bytes())["terms"])
            idf, weight, bias = tensors["idf"], tensors["weight"], tensors["bias"]
        except (OSError, ValueError, KeyError) as error:
            raise WeightsInvalid("the baseline's files are incomplete") from error
        if idf.shape != (len(terms),) or weight.shape != (len(bias), len(terms)):
            raise WeightsInvalid("the baseline's weights do not fit its vocabulary")
        return cls(terms, idf, weight, bias)


def new_vectorizer() -> Any:
    """An unfitted vectorizer with the options that serving assumes."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(max_features=MAX_FEATURES, **_OPTIONS)
