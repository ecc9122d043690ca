"""The words of texts as features of linear models that look for wrong labels, and for what more rows would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfVectorizer

from finetune.data.hash_sets import batches
from finetune.data.text_shingles import word_hashes
from modeling.inputs.text import TextInput, as_one
from modeling.linear_text import new_character_vectorizer
from modeling.weights import FloatArray, IntArray

_FEATURE_BITS = 17
_FEATURES = 1 << _FEATURE_BITS
_READ_CHARACTERS = 600


def weighted_words(train: Sequence[TextInput], others: Sequence[TextInput]) -> tuple[Any, Any]:
    """Tf-idf of words alone, counted once: the baseline's own vectorizer takes longer than several fits. Where no text
    has a word, of runs of characters."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
    analyze = vectorizer.build_analyzer()
    if not any(analyze(as_one(text)) for text in train):
        vectorizer = new_character_vectorizer()
    return vectorizer.fit_transform(map(as_one, train)), vectorizer.transform(map(as_one, others))


def word_features(texts: Sequence[TextInput]) -> csr_array:
    """Tf-idf float32[rows, 2^17] of hashed words and pairs of words in the beginning of each text, rows of length 1."""
    starts = [as_one(text)[:_READ_CHARACTERS] for text in texts]
    lengths = np.fromiter(map(len, starts), np.int64, len(starts)) + 1
    parts = [_counts(starts[start:end]) for start, end in batches(lengths)]
    found_in = np.zeros(_FEATURES, np.int64)
    for _, columns, _ in parts:
        found_in += np.bincount(columns, minlength=_FEATURES)
    idf = (np.log((1 + len(texts)) / (1 + found_in)) + 1).astype(np.float32)
    values = np.concatenate([_weighted(counts, idf[columns], sizes) for counts, columns, sizes in parts])
    columns = np.concatenate([columns for _, columns, _ in parts])
    ends = np.cumsum(np.concatenate([sizes for *_, sizes in parts]))
    # 32-bit places: scikit-learn refuses wider ones
    return csr_array((values, columns, np.append(0, ends).astype(np.int32)), shape=(len(texts), _FEATURES))


def _weighted(counts: FloatArray, idf: FloatArray, sizes: IntArray) -> FloatArray:
    values = (1 + np.log(counts)) * idf
    owners = np.repeat(np.arange(len(sizes)), sizes)
    norms = np.sqrt(np.bincount(owners, weights=values**2, minlength=len(sizes))).astype(np.float32)
    return np.asarray(values / norms[owners], np.float32)


def _counts(texts: Sequence[TextInput]) -> tuple[FloatArray, npt.NDArray[np.int32], IntArray]:
    """How often each feature occurs in each text: counts and columns, text by text, and how many each text has."""
    rows, words = word_hashes(texts)
    is_pair = rows[1:] == rows[:-1]
    pairs = words[:-1] * np.uint64(0x9E3779B97F4A7C15) + words[1:]
    hashes = np.concatenate([words, pairs[is_pair]])
    columns = (hashes >> np.uint64(64 - _FEATURE_BITS)).astype(np.int64)
    keys, counts = np.unique(np.concatenate([rows, rows[1:][is_pair]]) * _FEATURES + columns, return_counts=True)
    sizes = np.bincount(keys // _FEATURES, minlength=len(texts))
    return counts.astype(np.float32), (keys % _FEATURES).astype(np.int32), sizes
