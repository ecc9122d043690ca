"""Which rows probably have a wrong label: out-of-fold answers of a linear model over words, for the rows of every side.

The shell around `data.label_errors`: features, folds and models. The recipe calls it before training. Rows of a
modality without cheap features are not searched.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sklearn
from scipy.sparse import csr_array
from sklearn.linear_model import SGDClassifier

from finetune.data.label_errors import not_searched, suspect_finding, suspected_label_errors
from finetune.data.labelled import LabelledRows
from finetune.evaluation.calibration import fit_temperature
from finetune.jobs.link import Link, tell
from finetune.training.entity_suspects import find_entity_suspects
from finetune.training.feature_cache import KEY_BYTES, FeatureCache, content_key
from finetune.training.methods.baseline import quiet_solvers
from finetune.training.words import word_features
from modeling.heads import softmax
from modeling.inputs import Example
from modeling.weights import FloatArray, IntArray

FOLDS = 5
MOST_ROWS = 200_000
MOST_ANSWERS = 4_000_000  # rows × classes: what the models cost grows with it
REPORTED = 100
FEATURES: Final[dict[str, Callable[[Sequence[Example]], csr_array]]] = {"text": word_features}
_LONG_ROWS = 20_000  # below, the search ends within seconds
SIDE = "side"
_LEAST_INPUTS = 3
_SHOWN_CHARACTERS = 200
_SCHEMA = 1  # raised when the same rows give other answers
_PASSES, _STEPS = (3, 100), 40_000  # over the rows, so that few rows are seen as often as it takes


def all_rows(train: LabelledRows, validation: LabelledRows, test: LabelledRows) -> LabelledRows:
    """The rows of all sides, with the name of each one's side as the extra `SIDE`."""
    known = set(map(id, train.examples))  # which serve as validation rows if nothing could be held out
    parts = {"train": train, "validation": validation, "test": test}
    given = {side: rows for side, rows in parts.items() if side == "train" or known.isdisjoint(map(id, rows.examples))}
    return LabelledRows(
        np.concatenate([rows.row_numbers for rows in given.values()]),
        [example for rows in given.values() for example in rows.examples],
        [label for rows in given.values() for label in rows.labels],
        {SIDE: [side for side, rows in given.items() for _ in range(len(rows))]},
        train.target,
    )


def find_suspects(
    rows: LabelledRows, link: Link, *, seed: int, cache: FeatureCache | None = None
) -> list[dict[str, Any]]:
    """At most 100 rows with their text, given and suggested label, the most suspect first; tells of them by an event.

    Costs some 0.2 ms a row of a hundred words and ten classes, once where there is a `cache`. Too large a dataset is
    not searched, which is told. Classes with too few inputs to be learnt without one of them are left alone.
    """
    if rows.target.names_words:
        return find_entity_suspects(rows, link, seed=seed, side=SIDE)
    rows = rows.take(np.flatnonzero(_may_be_learnt(rows)))
    names = sorted(set(rows.labels))
    if len(rows) > MOST_ROWS or len(rows) * len(names) > MOST_ANSWERS:
        tell(link, [not_searched(rows, len(names), most_rows=MOST_ROWS)])
        return []
    if len(rows) < 2 * FOLDS or len(names) < 2 or rows.modality.name not in FEATURES:
        return []
    index = {label: number for number, label in enumerate(names)}
    labels = np.fromiter((index[label] for label in rows.labels), np.int64, len(rows))
    found = suspected_label_errors(_answers(rows, labels, link, seed=seed, cache=cache), labels)
    if len(found):
        tell(link, [suspect_finding(rows, found, names)])
    return [
        {
            "row": int(rows.row_numbers[row]),
            "side": rows.extras[SIDE][row] if SIDE in rows.extras else "train",
            "given": names[given],
            "suggested": names[suggested],
            "margin": round(float(margin), 4),
            "text": _shown(rows.modality.to_json(rows.examples[row])),
        }
        for row, given, suggested, margin in zip(
            found.rows[:REPORTED], found.given, found.suggested, found.margins, strict=False
        )
    ]


def _shown(content: Any) -> str:
    """The beginning of an example's content, or of each of its parts."""
    parts = content if isinstance(content, list) else [content]
    return " | ".join(str(part)[:_SHOWN_CHARACTERS] for part in parts)


def _may_be_learnt(rows: LabelledRows) -> npt.NDArray[np.bool_]:
    """Which rows are of a class with enough different inputs that others of it are left when one is held out."""
    inputs: defaultdict[str, set[bytes]] = defaultdict(set)
    for label, example in zip(rows.labels, rows.examples, strict=True):
        if len(inputs[label]) < _LEAST_INPUTS:
            inputs[label].add(rows.modality.digest(example))
    return np.fromiter((len(inputs[label]) >= _LEAST_INPUTS for label in rows.labels), bool, len(rows))


def _answers(rows: LabelledRows, labels: IntArray, link: Link, *, seed: int, cache: FeatureCache | None) -> FloatArray:
    """What `out_of_fold` gives, or gave for the same rows in the same order."""
    if cache is None:
        return out_of_fold(rows, labels, link, seed=seed)
    space, keys = _space(rows, labels, seed), [row.to_bytes(KEY_BYTES, "little") for row in range(len(rows))]
    answers = np.zeros((len(rows), int(labels.max()) + 1), np.float32)
    if not cache.fill(space, keys, answers).all():
        answers = out_of_fold(rows, labels, link, seed=seed)
        cache.add(space, keys, answers)
    return answers


def _space(rows: LabelledRows, labels: IntArray, seed: int) -> str:
    digest = blake2b(f"{_SCHEMA} {seed} {sklearn.__version__}".encode() + labels.tobytes(), digest_size=16)
    for example in rows.examples:
        digest.update(content_key(rows.modality.content(example)))
    return digest.hexdigest()


def out_of_fold(rows: LabelledRows, labels: IntArray, link: Link, *, seed: int) -> FloatArray:
    """Calibrated probabilities float32[rows, classes] by models that did not see the row, nor a copy of it."""
    features = FEATURES[rows.modality.name](rows.examples)
    folds = stratified_folds(list(map(rows.modality.digest, rows.examples)), labels)
    scores = np.zeros((len(rows), int(labels.max()) + 1), np.float32)
    for fold in range(FOLDS):
        if len(rows) > _LONG_ROWS:
            link.check_cancelled()
        held = folds == fold
        if held.any() and len(np.unique(labels[~held])) > 1:
            scores[held] = _scores(features[~held], labels[~held], features[held], scores.shape[1], seed)
    return softmax(scores / np.float32(fit_temperature(scores, labels)))


def stratified_folds(digests: Sequence[bytes], labels: IntArray) -> npt.NDArray[np.int64]:
    """A fold for every row: equal inputs share one, and each class is spread evenly, whatever the row order."""
    keys = np.frombuffer(b"".join(digests), "S16")
    order = np.lexsort((keys, labels))
    is_new = np.ones(len(order), bool)
    is_new[1:] = keys[order][1:] != keys[order][:-1]
    place = np.zeros(len(order), np.int64)
    place[order] = np.cumsum(is_new) - 1
    first = dict(zip(keys[order][::-1].tolist(), place[order][::-1].tolist(), strict=True))
    return np.fromiter((first[key] % FOLDS for key in keys.tolist()), np.int64, len(keys))


def _scores(features: csr_array, labels: IntArray, held: csr_array, classes: int, seed: int) -> FloatArray:
    # On R8 as right as a support vector machine (0.966 out of fold) in a fifth of its time.
    passes = min(max(_STEPS // len(labels), _PASSES[0]), _PASSES[1])
    model = SGDClassifier(loss="modified_huber", alpha=1e-4, max_iter=passes, tol=None, random_state=seed)
    with warnings.catch_warnings():
        quiet_solvers()
        model.fit(features, labels)
    decided = np.asarray(model.decision_function(held), np.float32)
    if decided.ndim == 1:
        decided = np.stack([-decided, decided], 1) / np.float32(2)
    scores = np.full((held.shape[0], classes), decided.min(initial=0.0) - 1, np.float32)
    scores[:, model.classes_] = decided
    return scores
