"""A linear model on words, their shapes and neighbours, trained before all others: what `baseline` is for entities."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import SGDClassifier

from finetune.evaluation.tagged import Ragged, Tagged, gold_tags, ragged
from finetune.jobs.failures import RunError
from finetune.training.methods.baseline import quiet_solvers
from finetune.training.methods.candidate import Candidate, Servable
from finetune.training.run_context import Run
from modeling.inputs import Example
from modeling.inputs.words import find_words
from modeling.linear_tokens import FEATURES, LinearTokens, word_features
from modeling.weights import IntArray

_STRENGTHS = (1e-5, 1e-6)  # alpha, tried from strong to weak
_MOST_WORDS = 400_000  # that are trained on, from evenly spread texts: their features take some 400 bytes each
_STEPS, _PASSES = 400_000, (4, 40)
_MOST_OUTPUTS = 513  # 256 types: 270 MB
_ABSENT = np.float32(-10.0)


def train(run: Run) -> Candidate:
    started = time.monotonic()
    if run.outputs > _MOST_OUTPUTS:
        raise RunError(
            "invalid_hyperparameters",
            f"the baseline of entities has {FEATURES:,} weights a tag, for {_MOST_OUTPUTS} tags at most; there are "
            f"{run.outputs:,}",
            hint="use linear_probe, lora or full, or merge rare types",
        )
    features, tags, read = _features(run.train.examples, run.train.labels)
    best: tuple[float, float, LinearTokens, Ragged] | None = None
    for alpha in _STRENGTHS:
        run.link.check_cancelled()
        model = _fitted(run, features, tags, alpha)
        outputs = tagged(model, run.validation.examples)
        score = run.plan.deciding.gain(run.score(outputs))
        if best is None or score > best[0]:
            best = (score, alpha, model, outputs)
    assert best is not None
    _, alpha, _, outputs = best

    def finish() -> Servable:
        targets = np.concatenate([run.train.labels, run.validation.labels])
        everything, all_tags, _ = _features([*run.train.examples, *run.validation.examples], targets)
        final = _fitted(run, everything, all_tags, alpha)
        return Servable(logits=lambda examples: tagged(final, examples), linear=final, golden_logits=final.margins)

    details = {"alpha": alpha, "texts": read}
    return Candidate("baseline", "baseline", outputs, finish, time.monotonic() - started, details)


def tagged(model: LinearTokens, examples: Sequence[Example]) -> Ragged:
    """`Tagged` for each text."""
    return (
        ragged(Tagged(find_words(text), logits) for text, logits in zip(examples, model.margins(examples), strict=True))
        if examples
        else ragged([])
    )


def _features(examples: Sequence[Example], targets: Ragged) -> tuple[object, IntArray, int]:
    """The features and tags of the words of as many texts as may be, and how many that is."""
    places = [find_words(text) for text in examples]
    words = sum(map(len, places))
    count = len(examples) if words <= _MOST_WORDS else max(1, int(len(examples) * _MOST_WORDS / words))
    chosen = np.unique(np.linspace(0, len(examples) - 1, count).astype(np.int64)).tolist()
    own = [places[row] for row in chosen]
    tags = [gold_tags(where, targets[row]) for where, row in zip(own, chosen, strict=True)]
    return word_features([examples[row] for row in chosen], own), np.concatenate(tags), len(chosen)


def _fitted(run: Run, features: object, tags: IntArray, alpha: float) -> LinearTokens:
    """One against the rest for each tag that there is; the others are far below all."""
    weight = np.zeros((run.outputs, FEATURES), np.float32)
    bias = np.full(run.outputs, _ABSENT, np.float32)
    known = np.unique(tags)
    if len(known) == 1:
        bias[known] = 0.0
        return LinearTokens.of(weight, bias)
    passes = min(max(_STEPS // max(1, len(tags)), _PASSES[0]), _PASSES[1])
    for tag in known.tolist():
        run.heed()
        model = SGDClassifier(
            loss="log_loss", alpha=alpha, max_iter=passes, tol=None, average=True, random_state=run.plan.seed
        )
        with warnings.catch_warnings():
            quiet_solvers()
            model.fit(features, tags == tag)
        weight[tag], bias[tag] = model.coef_[0], model.intercept_[0]
    return LinearTokens.of(weight, bias)
