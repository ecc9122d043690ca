"""Tf-idf of words, of runs of characters or of both, and a linear model: trained first, so that no deep net that it
beats is deployed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import hstack
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC

from finetune.evaluation.tasks.class_weights import class_weights, positive_weights
from finetune.evaluation.tasks.rules import Side, Targets
from finetune.training.methods.candidate import Candidate, Servable
from finetune.training.run_context import Run
from modeling.inputs.text import TextInput, as_one
from modeling.linear_text import MOST_READ, LinearText, new_character_vectorizer, new_vectorizer
from modeling.tasks import Calibration
from modeling.weights import FloatArray, IntArray

_HALF_A_ROW = 0.5
_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # inverse regularisation C, tried from strong to weak
_WORDS, _CHARACTERS, _BOTH = "words", "characters", "words and characters"
_KINDS: dict[str, tuple[str, ...]] = {
    _WORDS: (_WORDS,),
    _CHARACTERS: (_CHARACTERS,),
    _BOTH: (_WORDS, _CHARACTERS),
}
_CHARACTERS_IN_ALL = 20_000_000  # of the training rows, whose runs take some 25 bytes each
_LEAST_READ = 50  # characters of a text, if the rows are many
_MOST_WORK = 2_000_000_000  # entries × outputs of a fit on characters that is tried beside one on words
_LOOKED_AT = 1_500  # training rows by which it is seen whether characters help
_VOCABULARY_ROWS = 20_000  # whose runs of characters are counted
_BY_CHANCE = 0.05


def train(run: Run) -> Candidate:
    """The linear model of the kind of task: of entities, or of whole texts."""
    if run.rules.by_position:
        from finetune.training.methods import token_baseline

        return token_baseline.train(run)
    return _train_on_texts(run)


def _train_on_texts(run: Run) -> Candidate:
    """Words along a path of strengths. Characters beside them are tried if a look at some rows shows that they help,
    at the strength that suited words best. Without any word in the texts characters walk the path."""
    started = time.monotonic()
    space = _Space.of(run.train.examples)
    tried: list[tuple[float, str, float, FloatArray]] = []

    def attempt(kind: str, strength: float) -> None:
        logits = space.outputs(run, kind, run.train.labels, strength)
        tried.append((run.score(logits), kind, strength, logits))

    first = _WORDS if _WORDS in space.features else _CHARACTERS
    for strength in _STRENGTHS:
        attempt(first, strength)
    best = tried[run.plan.deciding.best([value for value, *_ in tried])]
    if first == _WORDS and _characters_help(run, best[2]):
        space.add(_CHARACTERS, run.train.examples)
        attempt(_CHARACTERS, best[2])
        attempt(_BOTH, best[2])
        best = tried[run.plan.deciding.best([value for value, *_ in tried])]
    _, kind, strength, logits = best

    def finish() -> Servable:
        labels = np.concatenate([run.train.labels, run.validation.labels])
        whole = _Space.of([*run.train.examples, *run.validation.examples], _KINDS[kind])
        model = whole.model(kind, *_solved(run, whole.of_kind(kind), labels, strength))
        return Servable(logits=model.margins, linear=model)

    return Candidate(
        method="baseline",
        kind="baseline",
        validation_logits=logits,
        finish=finish,
        seconds=time.monotonic() - started,
        details={"c": strength, "features": kind},
    )


def _characters_help(run: Run, strength: float) -> bool:
    """Whether words and characters are better on validation than words, beyond chance, after training on some rows."""
    texts = run.train.examples
    read = sum(min(len(as_one(text)), _read(len(texts))) for text in texts)
    if read > _CHARACTERS_IN_ALL or 3 * read * run.outputs > _MOST_WORK:
        return False
    some = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), _LOOKED_AT)).astype(np.int64))
    targets = run.train.labels[some]
    if run.kind == "single_label" and len(np.unique(targets)) < 2:
        return False
    space = _Space.of([texts[row] for row in some.tolist()], (_WORDS, _CHARACTERS))
    if _WORDS not in space.features:
        return True
    words, both = (space.outputs(run, kind, targets, strength) for kind in (_WORDS, _BOTH))
    rows, plan = run.validation, run.plan
    side = Side(both, rows.labels, run.labels, {}, Calibration(), plan.deciding, plan.seed)
    figures = run.rules.compare(side, words)
    return bool(figures["gain"] > 0 and figures["p_value"] <= _BY_CHANCE)


def _read(rows: int) -> int:
    """How many characters of each text are made runs of, by the number of texts."""
    return min(MOST_READ, max(_LEAST_READ, _CHARACTERS_IN_ALL // max(1, rows)))


@dataclass(frozen=True, slots=True)
class _Space:
    """The weighted words and runs of characters of some texts: sparse `features` [texts, terms] by part, a part only if
    it has a term. Of characters the first `read` of a text count."""

    vectorizers: dict[str, Any]
    features: dict[str, Any]
    read: int

    @classmethod
    def of(cls, texts: Sequence[TextInput], parts: Sequence[str] = (_WORDS,)) -> _Space:
        """These parts; of texts without a word their characters."""
        space = cls({}, {}, _read(len(texts)))
        for part in parts:
            space.add(part, texts)
        if not space.features:
            space.add(_CHARACTERS, texts)
        return space

    def add(self, part: str, texts: Sequence[TextInput]) -> None:
        if part == _WORDS:
            self._add_words(texts)
        else:
            self._add_characters(texts)

    def outputs(self, run: Run, kind: str, targets: Targets, strength: float) -> FloatArray:
        """Of the validation rows, after training on these texts."""
        run.link.check_cancelled()
        weight, bias = _solved(run, self.of_kind(kind), targets, strength)
        held_out = _stacked([self.transformed(part, run.validation.examples) for part in _KINDS[kind]])
        return np.asarray(held_out @ weight.T + bias, np.float32)

    def _add_words(self, texts: Sequence[TextInput]) -> None:
        vectorizer = new_vectorizer()
        analyze = vectorizer.build_analyzer()
        if any(analyze(as_one(text)) for text in texts):  # it refuses texts without a word
            self.features[_WORDS] = vectorizer.fit_transform(map(as_one, texts))
            self.vectorizers[_WORDS] = vectorizer

    def _add_characters(self, texts: Sequence[TextInput]) -> None:
        """The vocabulary is that of evenly spread rows: of all there may be tens of millions of runs."""
        cut = [as_one(text)[: self.read] for text in texts]
        vectorizer = new_character_vectorizer()
        if len(cut) > _VOCABULARY_ROWS:
            counted = vectorizer.fit(cut[:: -(-len(cut) // _VOCABULARY_ROWS)])
            vectorizer = new_character_vectorizer(counted.get_feature_names_out().tolist())
        self.features[_CHARACTERS] = vectorizer.fit_transform(cut)
        self.vectorizers[_CHARACTERS] = vectorizer

    def transformed(self, part: str, texts: Sequence[TextInput]) -> Any:
        read = None if part == _WORDS else self.read
        return self.vectorizers[part].transform(as_one(text)[:read] for text in texts)

    def of_kind(self, kind: str) -> Any:
        return _stacked([self.features[part] for part in _KINDS[kind]])

    def model(self, kind: str, weight: FloatArray, bias: FloatArray) -> LinearText:
        terms = {part: tuple(self.vectorizers[part].get_feature_names_out().tolist()) for part in _KINDS[kind]}
        idf = np.concatenate([self.vectorizers[part].idf_ for part in _KINDS[kind]]).astype(np.float32)
        return LinearText(terms.get(_WORDS, ()), idf, weight, bias, terms.get(_CHARACTERS, ()), self.read)


def _stacked(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else hstack(parts, format="csr", dtype=np.float32)


def _solved(run: Run, features: Any, targets: Targets, strength: float) -> tuple[FloatArray, FloatArray]:
    with warnings.catch_warnings():
        quiet_solvers()
        return _MODELS[run.kind](run, features, targets, strength)


def quiet_solvers() -> None:
    """Inside `warnings.catch_warnings`: the last iterate is good enough to compare, and classes may be many."""
    warnings.simplefilter("ignore", ConvergenceWarning)
    warnings.filterwarnings("ignore", "The number of unique classes is greater", UserWarning)


def _of_classes(run: Run, features: Any, labels: IntArray, strength: float) -> tuple[FloatArray, FloatArray]:
    classifier = LinearSVC(C=strength, class_weight=by_index(run, labels), random_state=run.plan.seed)
    classifier.fit(features, labels)
    return of_all_classes(classifier, features, len(run.labels))


def _of_labels(run: Run, features: Any, targets: FloatArray, strength: float) -> tuple[FloatArray, FloatArray]:
    """One against its absence for each label; one that no row or every row has gets its frequency alone."""
    positive = positive_weights(run.plan.class_weights, targets, run.labels)
    weight = np.zeros((targets.shape[1], features.shape[1]), np.float32)
    bias = constant_bias(targets)
    for label, due in enumerate(targets.T > 0):
        if due.all() or not due.any():
            continue
        run.link.check_cancelled()
        own = None if positive is None else {0: 1.0, 1: float(positive[label])}
        classifier = LinearSVC(C=strength, class_weight=own, random_state=run.plan.seed)
        classifier.fit(features, due.astype(np.int64))
        weight[label], bias[label] = classifier.coef_[0], classifier.intercept_[0]
    return weight, bias


def _of_numbers(run: Run, features: Any, targets: FloatArray, strength: float) -> tuple[FloatArray, FloatArray]:
    """Ridge regression of standardised targets, given back in their own units."""
    scale = run.scale
    model = Ridge(alpha=1 / strength, solver="sparse_cg", random_state=run.plan.seed)
    model.fit(features.astype(np.float64), scale.standard(targets).astype(np.float64))
    weight, bias = np.atleast_2d(model.coef_) * scale.deviation, np.atleast_1d(model.intercept_) * scale.deviation
    return weight.astype(np.float32), (bias + scale.mean).astype(np.float32)


_MODELS: dict[str, Callable[[Run, Any, Targets, float], tuple[FloatArray, FloatArray]]] = {
    "single_label": _of_classes,
    "multi_label": _of_labels,
    "regression": _of_numbers,
}


def by_index(run: Run, labels: IntArray) -> dict[int, float] | None:
    """Weights of classes as scikit-learn takes them."""
    # A method that is solved has no epochs, so weights take the place of repeated rows.
    weights = class_weights("balanced" if run.plan.oversample else run.plan.class_weights, labels, run.labels)
    return None if weights is None else dict(enumerate(weights.tolist()))


def of_all_classes(model: Any, features: Any, classes: int) -> tuple[FloatArray, FloatArray]:
    """Weights [classes, features] and biases [classes] of a model fitted on `features` [rows, features]. A class
    without a row has a margin below all others, and not so far below that it would rule the temperature."""
    weight, bias = both_sides(model.coef_, model.intercept_)
    if len(model.classes_) == classes:
        return weight, bias
    lowest = np.float32(min((features @ weight.T + bias).min(), bias.min()) - 1)
    every_weight = np.zeros((classes, weight.shape[1]), np.float32)
    every_bias = np.full(classes, lowest, np.float32)
    every_weight[model.classes_], every_bias[model.classes_] = weight, bias
    return every_weight, every_bias


def both_sides(coefficients: Any, intercepts: Any) -> tuple[FloatArray, FloatArray]:
    """scikit-learn gives two classes one row of weights; here each class has its own, half on either side."""
    weight, bias = np.asarray(coefficients, np.float32), np.asarray(intercepts, np.float32)
    if len(weight) == 1:
        half = np.float32(0.5)
        return np.concatenate([-weight, weight]) * half, np.concatenate([-bias, bias]) * half
    return weight, bias


def constant_bias(targets: FloatArray) -> FloatArray:
    """Log odds float32[labels] of each label's frequency, as if half a row more had it and half a row lacked it."""
    due = targets.sum(0, dtype=np.float64)
    return np.asarray(np.log((due + _HALF_A_ROW) / (len(targets) - due + _HALF_A_ROW)), np.float32)
