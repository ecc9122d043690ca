"""Whether the backbone's tokenizer knows the words of the training texts, or takes them apart like a foreign language.

A tokenizer has most words of what its model was trained on whole. Measured on texts of 22 sentences: that of MiniLM
cuts English into 1.1 to 1.3 pieces a word, French and Spanish into 1.7 to 1.8, German into 2.1, Russian into 5.4, and
knows a quarter of Chinese characters. A multilingual one (Gemma's) needs 1.1 to 1.5 for all of these, 1.9 for Polish.
Words of a language or a field may be long: only pieces that are short as well are foreign.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finetune.data.findings import foreign_to_backbone
from finetune.data.labelled import LabelledRows
from finetune.data.records import Finding
from finetune.training.embedding import FrozenVectors
from finetune.training.feature_cache import content_key, counts_space
from modeling.inputs.text import TextInput, TextPreprocessor, as_one
from modeling.weights import FloatArray

_SAMPLE, _READ_CHARACTERS = 500, 1000
_LEAST_TEXTS, _LEAST_WORDS = 8, 2
_PIECES_PER_WORD, _CHARACTERS_PER_PIECE, _UNKNOWN = 1.5, 2.8, 0.1
_FOREIGN_TEXTS = 1 / 3  # 4 % of R8's texts are foreign to MiniLM by these limits, 68 % of French ones
# Scripts without blanks between words, of which each character counts as a word: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^ {_UNSPACED}]+")
# Signs of extinct scripts: a tokenizer reads them as its unknown token, or as bytes that differ at the end.
_EXTINCT = ("\U00012000", "\U00013001", "\U00010a82")


def foreign_texts(rows: LabelledRows, vectors: FrozenVectors) -> list[Finding]:
    """Look at 500 texts from all over `rows`; a finding if a third of them is foreign to the backbone. What was counted
    is kept where vectors are."""
    if vectors.modality.name != "text":
        return []
    places = np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).astype(np.int64)
    counts = _counts([rows.examples[place] for place in places.tolist()], vectors)
    has_words = counts[:, 0] >= _LEAST_WORDS
    places, counts = places[has_words], counts[has_words]
    is_foreign = _are_foreign(counts)
    if len(places) < _LEAST_TEXTS or is_foreign.sum() < _FOREIGN_TEXTS * len(places):
        return []
    words, _, pieces, unknown = counts[is_foreign].sum(0).tolist()
    return [
        foreign_to_backbone(
            rows.take(places[is_foreign]),
            of=len(places),
            pieces_per_word=pieces / words,
            unknown_share=unknown / max(1, pieces),
        )
    ]


def _are_foreign(counts: FloatArray) -> npt.NDArray[np.bool_]:
    words, characters, pieces, unknown = counts.T
    is_cut_fine = (pieces >= _PIECES_PER_WORD * words) & (characters < _CHARACTERS_PER_PIECE * pieces)
    return np.asarray(is_cut_fine | (unknown > _UNKNOWN * pieces), np.bool_)


def _counts(texts: Sequence[TextInput], vectors: FrozenVectors) -> FloatArray:
    """Of each text the words, the characters in them, the pieces that the tokenizer makes of them, and how many of
    these are its unknown token: float32[texts, 4]."""
    found = np.zeros((len(texts), 4), np.float32)
    keys = [content_key(vectors.modality.content(text)) for text in texts]
    space = counts_space("words", vectors.backbone.info.digest, vectors.modality.libraries)
    is_known = np.zeros(len(texts), np.bool_) if vectors.cache is None else vectors.cache.fill(space, keys, found)
    missing = np.flatnonzero(~is_known)
    if not len(missing):
        return found
    assert isinstance(vectors.preprocessor, TextPreprocessor)
    unknown = _unknown_token(vectors.preprocessor)
    for place in missing.tolist():
        found[place] = _count(as_one(texts[place]), vectors.preprocessor, unknown)
    if vectors.cache is not None:
        vectors.cache.add(space, [keys[place] for place in missing], found[missing])
    return found


def _count(text: str, preprocessor: TextPreprocessor, unknown: int | None) -> tuple[int, ...]:
    letters = _letters(unicodedata.normalize("NFC", text[:_READ_CHARACTERS]))
    words, tokens = _WORD.findall(letters), preprocessor.tokens(letters)
    return len(words), sum(map(len, words)), len(tokens), sum(token == unknown for token in tokens)


def _letters(text: str) -> str:
    """Its letters and the marks on them, separated by one blank each."""
    kept = (one if one.isalpha() or unicodedata.category(one).startswith("M") else " " for one in text)
    return " ".join("".join(kept).split())


def _unknown_token(preprocessor: TextPreprocessor) -> int | None:
    """Return the tokenizer's unknown token, or None if it has none."""
    last = {tokens[-1] if (tokens := preprocessor.tokens(sign)) else None for sign in _EXTINCT}
    return last.pop() if len(last) == 1 else None
