"""Which words of annotated texts probably have a wrong tag: answers of the baseline's linear model, trained without the
text, that contradict the annotation with confidence.

The shell around `data.label_errors`, for words as `suspects` is for rows. A text is reported once, by the word with the
largest margin. Beginning and inside of one type are no contradiction.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
from sklearn.linear_model import SGDClassifier

from finetune.data.label_errors import not_searched, suspected_label_errors
from finetune.data.labelled import LabelledRows
from finetune.data.records import row_finding
from finetune.evaluation.calibration import fit_temperature
from finetune.evaluation.tagged import encode_spans, gold_tags
from finetune.jobs.link import Link, tell
from finetune.training.methods.baseline import quiet_solvers
from modeling.heads import softmax
from modeling.inputs.words import find_words
from modeling.linear_tokens import word_features
from modeling.weights import FloatArray, IntArray

FOLDS = 5
MOST_WORDS = 200_000
MOST_ANSWERS = 8_000_000  # words times tags
REPORTED = 100
OUTSIDE = "(none)"
_AROUND = 60  # characters on either side of the word
_SHOWN = 3
_PASSES, _STEPS = (3, 30), 200_000


def find_entity_suspects(rows: LabelledRows, link: Link, *, seed: int, side: str) -> list[dict[str, Any]]:
    """At most 100 texts with the word, its given and its suggested type, the most suspect first; tells of them by an
    event. Too many words are not searched, which is told. `side` is the extra that names each row's side."""
    names = sorted(rows.names())
    places = [find_words(text) for text in rows.examples]
    counts = [len(own) for own in places]
    if sum(counts) > MOST_WORDS or sum(counts) * (1 + 2 * len(names)) > MOST_ANSWERS:
        tell(link, [not_searched(rows, len(names), most_rows=MOST_WORDS)])
        return []
    if len(rows) < 2 * FOLDS or not names:
        return []
    tags = np.concatenate([gold_tags(*pair) for pair in zip(places, encode_spans(rows.labels, names), strict=True)])
    row_of = np.repeat(np.arange(len(rows)), counts)
    digests = np.frombuffer(b"".join(map(rows.modality.digest, rows.examples)), "S16")
    fold_of = np.unique(digests, return_inverse=True)[1] % FOLDS  # equal texts share one
    types = (tags + 1) // 2
    probabilities = _by_type(_out_of_fold(rows, places, tags, fold_of[row_of], link, seed))
    found = suspected_label_errors(probabilities, types)
    known = [OUTSIDE, *names]
    seen: set[int] = set()
    suspects = []
    for word, given, suggested, margin in zip(found.rows, found.given, found.suggested, found.margins, strict=True):
        row = int(row_of[word])
        if row in seen:
            continue
        seen.add(row)
        at = int(word) - int(np.searchsorted(row_of, row))
        suspects.append(
            {
                "row": int(rows.row_numbers[row]),
                "side": rows.extras[side][row] if side in rows.extras else "train",
                "given": known[given],
                "suggested": known[suggested],
                "margin": round(float(margin), 4),
                "text": _marked(rows.examples[row], *places[row][at].tolist()),
            }
        )
    if suspects:
        tell(link, [_finding(suspects, len(rows))])
    return suspects[:REPORTED]


def _out_of_fold(rows: LabelledRows, places: Any, tags: IntArray, folds: IntArray, link: Link, seed: int) -> FloatArray:
    """Calibrated probabilities float32[words, tags] by models that did not see the text, nor a copy of it."""
    features = word_features(rows.examples, places)
    scores = np.zeros((len(tags), int(tags.max()) + 1), np.float32)
    passes = min(max(_STEPS // max(1, len(tags)), _PASSES[0]), _PASSES[1])
    for fold in range(FOLDS):
        link.check_cancelled()
        held = folds == fold
        if not held.any() or len(np.unique(tags[~held])) < 2:
            continue
        model = SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=passes, tol=None, average=True, random_state=seed)
        with warnings.catch_warnings():
            quiet_solvers()
            model.fit(features[~held], tags[~held])
        decided = np.asarray(model.decision_function(features[held]), np.float32)
        decided = np.stack([-decided, decided], 1) / np.float32(2) if decided.ndim == 1 else decided
        own = np.full((len(decided), scores.shape[1]), decided.min(initial=0.0) - 1, np.float32)
        own[:, model.classes_] = decided
        scores[held] = own
    return softmax(scores / np.float32(fit_temperature(scores, tags)))


def _by_type(probabilities: FloatArray) -> FloatArray:
    """float32[words, types + 1]: outside first, then beginning and inside of each type together."""
    missing = (probabilities.shape[1] - 1) % 2  # the last type may have no inside
    whole = np.pad(probabilities, ((0, 0), (0, missing)))
    return np.concatenate([whole[:, :1], whole[:, 1::2] + whole[:, 2::2]], axis=1).astype(np.float32)


def _marked(text: str, start: int, end: int) -> str:
    """The word between brackets, with what is around it."""
    return f"{text[max(0, start - _AROUND) : start]}[{text[start:end]}]{text[end : end + _AROUND]}"


def _finding(suspects: list[dict[str, Any]], texts: int) -> Any:
    first = "; ".join(
        f"row {one['row']}: {json.dumps(one['text'], ensure_ascii=False)} is {one['given']}, rather {one['suggested']}"
        for one in suspects[:_SHOWN]
    )
    return row_finding(
        code="suspected_label_error",
        severity="warning" if len(suspects) > 0.02 * texts else "info",
        message=f"{len(suspects):,} texts may have a word with a wrong tag ({first})",
        rows=[one["row"] for one in suspects],
        fix="look at these texts, the most suspect first; correct those that are wrong, or name them in exclude_rows",
    )
