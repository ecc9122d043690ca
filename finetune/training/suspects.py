"""Which training rows probably have a wrong label: out-of-fold answers of a linear model over words.

The shell around `datasets.label_errors`: features, folds and models. The recipe calls it before training.
"""

from __future__ import annotations

import warnings
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import SGDClassifier

from finetune.data.label_errors import not_searched, suspect_finding, suspected_label_errors
from finetune.data.labelled import LabelledRows
from finetune.data.shingles import batches, word_hashes
from finetune.data.text_identity import text_digest
from finetune.evaluation.calibration import fit_temperature
from finetune.jobs.link import Link, tell
from finetune.training.feature_cache import KEY_BYTES, FeatureCache, text_key
from modeling.heads import softmax
from modeling.weights import FloatArray, IntArray

FOLDS = 5
MOST_ROWS = 200_000
MOST_ANSWERS = 4_000_000  # rows × classes: what the models cost grows with it
REPORTED = 100
_FEATURE_BITS = 17
_FEATURES = 1 << _FEATURE_BITS
_READ_CHARACTERS = 600
_LONG_ROWS = 20_000  # below, the search ends within seconds
_SCHEMA = 1  # raised when the same rows give other answers
_PASSES, _STEPS = (3, 100), 40_000  # over the rows, so that few rows are seen as often as it takes


def find_suspects(
    train: LabelledRows, link: Link, *, seed: int, cache: FeatureCache | None = None
) -> list[dict[str, Any]]:
    """At most 100 rows with given and suggested label, the most suspect first; tells of them by an event.

    By number and without their texts, since more people may read an evaluation than the data.
    Costs some 0.2 ms a row of a hundred words and ten classes, once where there is a `cache`. Too large a dataset is
    not searched, which is told.
    """
    names = sorted(set(train.labels))
    if len(train) > MOST_ROWS or len(train) * len(names) > MOST_ANSWERS:
        tell(link, [not_searched(train, len(names), most_rows=MOST_ROWS)])
        return []
    if len(train) < 2 * FOLDS or len(names) < 2:
        return []
    index = {label: number for number, label in enumerate(names)}
    labels = np.fromiter((index[label] for label in train.labels), np.int64, len(train))
    found = suspected_label_errors(_answers(train.texts, labels, link, seed=seed, cache=cache), labels)
    if len(found):
        tell(link, [suspect_finding(train, found, names)])
    return [
        {
            "row": int(train.row_numbers[row]),
            "given": names[given],
            "suggested": names[suggested],
            "margin": round(float(margin), 4),
        }
        for row, given, suggested, margin in zip(
            found.rows[:REPORTED], found.given, found.suggested, found.margins, strict=False
        )
    ]


def _answers(texts: list[str], labels: IntArray, link: Link, *, seed: int, cache: FeatureCache | None) -> FloatArray:
    """What `out_of_fold` gives, or gave for the same rows in the same order."""
    if cache is None:
        return out_of_fold(texts, labels, link, seed=seed)
    space, keys = _space(texts, labels, seed), [row.to_bytes(KEY_BYTES, "little") for row in range(len(texts))]
    answers = np.zeros((len(texts), int(labels.max()) + 1), np.float32)
    if not cache.fill(space, keys, answers).all():
        answers = out_of_fold(texts, labels, link, seed=seed)
        cache.add(space, keys, answers)
    return answers


def _space(texts: list[str], labels: IntArray, seed: int) -> str:
    digest = blake2b(f"{_SCHEMA} {seed} {sklearn.__version__}".encode() + labels.tobytes(), digest_size=16)
    for text in texts:
        digest.update(text_key(text))
    return digest.hexdigest()


def out_of_fold(texts: list[str], labels: IntArray, link: Link, *, seed: int) -> FloatArray:
    """Calibrated probabilities float32[rows, classes] by models that did not see the row, nor a copy of it."""
    features = word_features(texts)
    folds = stratified_folds(texts, labels)
    scores = np.zeros((len(texts), int(labels.max()) + 1), np.float32)
    for fold in range(FOLDS):
        if len(texts) > _LONG_ROWS:
            link.check_cancelled()
        held = folds == fold
        if held.any() and len(np.unique(labels[~held])) > 1:
            scores[held] = _scores(features[~held], labels[~held], features[held], scores.shape[1], seed)
    return softmax(scores / np.float32(fit_temperature(scores, labels)))


def word_features(texts: list[str]) -> csr_array:
    """Tf-idf float32[rows, 2^17] of hashed words and pairs of words in the beginning of each text, rows of length 1."""
    starts = [text[:_READ_CHARACTERS] for text in texts]
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


def _counts(texts: list[str]) -> tuple[FloatArray, npt.NDArray[np.int32], IntArray]:
    """How often each feature stands in each text: counts and columns, text by text, and how many each text has."""
    rows, words = word_hashes(texts)
    is_pair = rows[1:] == rows[:-1]
    pairs = words[:-1] * np.uint64(0x9E3779B97F4A7C15) + words[1:]
    hashes = np.concatenate([words, pairs[is_pair]])
    columns = (hashes >> np.uint64(64 - _FEATURE_BITS)).astype(np.int64)
    keys, counts = np.unique(np.concatenate([rows, rows[1:][is_pair]]) * _FEATURES + columns, return_counts=True)
    sizes = np.bincount(keys // _FEATURES, minlength=len(texts))
    return counts.astype(np.float32), (keys % _FEATURES).astype(np.int32), sizes


def stratified_folds(texts: list[str], labels: IntArray) -> npt.NDArray[np.int64]:
    """A fold for every row: equal texts share one, and each class is spread evenly, whatever the row order."""
    digests = np.frombuffer(b"".join(map(text_digest, texts)), "S16")
    order = np.lexsort((digests, labels))
    is_new = np.ones(len(order), bool)
    is_new[1:] = digests[order][1:] != digests[order][:-1]
    place = np.zeros(len(order), np.int64)
    place[order] = np.cumsum(is_new) - 1
    first = dict(zip(digests[order][::-1].tolist(), place[order][::-1].tolist(), strict=True))
    return np.fromiter((first[digest] % FOLDS for digest in digests.tolist()), np.int64, len(texts))


def _scores(features: csr_array, labels: IntArray, held: csr_array, classes: int, seed: int) -> FloatArray:
    # On R8 as right as a support vector machine (0.966 out of fold) in a fifth of its time.
    passes = min(max(_STEPS // len(labels), _PASSES[0]), _PASSES[1])
    model = SGDClassifier(loss="modified_huber", alpha=1e-4, max_iter=passes, tol=None, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    decided = np.asarray(model.decision_function(held), np.float32)
    if decided.ndim == 1:
        decided = np.stack([-decided, decided], 1) / np.float32(2)
    scores = np.full((held.shape[0], classes), decided.min(initial=0.0) - 1, np.float32)
    scores[:, model.classes_] = decided
    return scores
