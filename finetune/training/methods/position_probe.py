"""Softmax regression on the frozen states of words: what `linear_probe` is for tasks that label words.

States are as many times more than pooled vectors as texts have words. They are kept in float16, in files below the
run's folder, and read one after the other; what exceeds the budget is computed again in each pass. Three strengths of
regularisation are fitted at once, on the same batches, and validation chooses.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from finetune.evaluation.tagged import Ragged, Tagged, gold_tags, ragged
from finetune.jobs.records import JobPhase
from finetune.training.methods.candidate import OUT_OF_TIME, Candidate, Servable
from finetune.training.run_context import Run
from finetune.training.windows import position_logits, tagged_by, word_states
from modeling.engines.protocol import Engine
from modeling.heads import DenseLayer, TaskHead, softmax
from modeling.inputs import Example
from modeling.inputs.words import Offsets
from modeling.weights import FloatArray, IntArray

HalfArray = npt.NDArray[np.float16]

STRENGTHS = (0.3, 0.03, 0.003)  # decay of the weights, times the rate
BUDGET_BYTES = 4 << 30
_WORDS_PER_BATCH, _SMALL_BATCH = 1024, 128
_STEPS, _MOST_PASSES, _LEAST_PASSES = 3_000, 60, 6
_RATE, _BETAS, _EPSILON = 3e-3, (0.9, 0.999), 1e-8
_EVALUATIONS = 10
_EXAMPLES_PER_SHARD = 1024


class StateShards:
    """The states of the words of some texts with their tags, shard by shard: kept within the budget, else computed."""

    def __init__(
        self, run: Run, engine: Engine, examples: Sequence[Example], targets: Ragged, folder: Path, budget_bytes: int
    ) -> None:
        self._run, self._engine, self._examples, self._targets = run, engine, examples, targets
        self._folder, self._left_bytes = folder, budget_bytes
        self._starts = range(0, len(examples), _EXAMPLES_PER_SHARD)
        self._kept: dict[int, tuple[Path, IntArray]] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def shard(self, number: int) -> tuple[HalfArray, IntArray]:
        """float16[words, hidden] and int64[words]."""
        if number in self._kept:
            path, tags = self._kept[number]
            return _mapped(path, len(tags)), tags
        states, tags = self._computed(number)
        if states.nbytes <= self._left_bytes:
            path = self._folder / f"{number}.states"
            states.tofile(path)
            self._left_bytes -= states.nbytes
            self._kept[number] = path, tags
        return states, tags

    def _computed(self, number: int) -> tuple[HalfArray, IntArray]:
        start = self._starts[number]
        examples = self._examples[start : start + _EXAMPLES_PER_SHARD]
        targets = self._targets[start : start + _EXAMPLES_PER_SHARD]
        states: list[HalfArray] = []
        tags: list[IntArray] = []
        done = 0
        for windows, found in word_states(self._engine, self._run.preprocessor, examples):
            own = targets[done : done + int(windows.example_of[-1]) + 1]
            done += len(own)
            for window, values in enumerate(found):
                states.append(values.astype(np.float16))
                tags.append(gold_tags(windows.located(window).words, own[windows.example_of[window]]))
            self._run.heed()
        return np.concatenate(states), np.concatenate(tags)


def _mapped(path: Path, words: int) -> HalfArray:
    """float16[words, hidden] of a file, read as it is needed."""
    if not words:
        return np.zeros((0, 1), np.float16)
    return np.memmap(path, np.float16, mode="r").reshape(words, -1)


class Softmax:
    """Several softmax regressions on the same standardised values, by Adam with decoupled decay (Loshchilov and Hutter,
    ICLR 2019): weights float32[models, outputs, hidden + 1], the last column the biases."""

    def __init__(self, mean: FloatArray, scale: FloatArray, outputs: int, strengths: Sequence[float]) -> None:
        self._mean, self._scale = mean, scale
        self._decay = np.asarray(strengths, np.float32)[:, None, None]
        self.weights: FloatArray = np.zeros((len(strengths), outputs, len(mean) + 1), np.float32)
        self._first, self._second = np.zeros_like(self.weights), np.zeros_like(self.weights)
        self._steps = 0

    def step(self, values: FloatArray | HalfArray, tags: IntArray, *, rate: float) -> None:
        """One step on float32 or float16[rows, hidden] and int64[rows]."""
        standard = np.ones((len(values), len(self._mean) + 1), np.float32)
        standard[:, :-1] = (values.astype(np.float32) - self._mean) / self._scale
        models, outputs, width = self.weights.shape
        logits = (standard @ self.weights.reshape(-1, width).T).reshape(len(values), models, outputs)
        slopes = softmax(logits)
        slopes[np.arange(len(values)), :, tags] -= 1
        gradient = (slopes.reshape(len(values), -1).T @ standard / len(values)).reshape(self.weights.shape)
        self._steps += 1
        self._first += (1 - _BETAS[0]) * (gradient - self._first)
        self._second += (1 - _BETAS[1]) * (gradient**2 - self._second)
        first = self._first / (1 - _BETAS[0] ** self._steps)
        second = self._second / (1 - _BETAS[1] ** self._steps)
        self.weights[..., :-1] -= rate * self._decay * self.weights[..., :-1]
        self.weights -= np.float32(rate) * first / (np.sqrt(second) + np.float32(_EPSILON))

    def head(self, model: int) -> TaskHead:
        """One of them on values as they come."""
        weight, bias = self.weights[model, :, :-1], self.weights[model, :, -1]
        folded = (weight / self._scale).astype(np.float32)
        return TaskHead((DenseLayer(folded, (bias - folded @ self._mean).astype(np.float32)),))


def train(run: Run) -> Candidate:
    started = time.monotonic()
    run.link.phase(JobPhase.EMBEDDING)
    engine = run.frozen_engine
    with contextlib.ExitStack() as limits:
        name = limits.enter_context(tempfile.TemporaryDirectory(prefix="states-", dir=run.work_dir))
        shards = StateShards(run, engine, run.train.examples, run.train.labels, Path(name), BUDGET_BYTES)
        run.link.phase(JobPhase.TRAINING)
        # Products this small lose a lot where others want the core.
        limits.enter_context(threadpool_limits(1, user_api="blas"))
        model, words = _prepared(run, shards, STRENGTHS)
        held_out = _HeldOut.of(run, engine, Path(name))
        passes = _passes(words)
        best: tuple[float, float, int, int, TaskHead] | None = None
        taken = 0
        for taken in _steps(run, shards, model, words, passes):
            for number in range(len(STRENGTHS)):
                head = model.head(number)
                outputs = held_out.outputs(head)
                judged = run.plan.deciding.gain(run.score(outputs)), -run.rules.loss(outputs, run.validation.labels)
                if best is None or judged > best[:2]:
                    best = (*judged, number, taken, head)
        assert best is not None
        *_, number, done, head = best
        outputs = held_out.outputs(head)
    run.probe_head = head
    stopped = {} if taken == passes else {"stopped": OUT_OF_TIME}

    def finish() -> Servable:
        left = run.seconds_left()
        has_time = not run.is_winding_down and (left is None or left > 0)
        final = _refitted(run, engine, STRENGTHS[number], done) if has_time else head

        return Servable(
            logits=lambda examples: tagged_by(engine, final, run.preprocessor, examples),
            head=final,
            golden_logits=lambda examples: position_logits(run.reference.engine, final, run.preprocessor, examples),
        )

    return Candidate(
        method="linear_probe",
        kind="head",
        validation_logits=outputs,
        finish=finish,
        seconds=time.monotonic() - started,
        details={"decay": STRENGTHS[number], "passes": done, "words": words, **stopped},
    )


def _refitted(run: Run, engine: Engine, strength: float, passes: int) -> TaskHead:
    """The same on training and validation rows, for as many passes."""
    examples = [*run.train.examples, *run.validation.examples]
    targets = np.concatenate([run.train.labels, run.validation.labels])
    with tempfile.TemporaryDirectory(prefix="states-", dir=run.work_dir) as name, threadpool_limits(1, user_api="blas"):
        shards = StateShards(run, engine, examples, targets, Path(name), BUDGET_BYTES)
        model, words = _prepared(run, shards, (strength,))
        for _ in _steps(run, shards, model, words, passes, ends_in_time=False):
            pass
    return model.head(0)


def _prepared(run: Run, shards: StateShards, strengths: Sequence[float]) -> tuple[Softmax, int]:
    """A model with the standardisation of the states, which are computed for it, and how many words there are."""
    words, total, squares = 0, np.zeros(1), np.zeros(1)
    for number in range(len(shards)):
        states, _ = shards.shard(number)
        wide = states.astype(np.float64)
        words += len(wide)
        total, squares = total + wide.sum(0), squares + (wide**2).sum(0)
        run.report(number + 1, 2 * len(shards))
    mean = total / max(1, words)
    spread = np.sqrt(np.maximum(squares / max(1, words) - mean**2, 1e-12))
    scale = np.maximum(spread, max(0.01 * float(np.median(spread)), 1e-6))
    return Softmax(mean.astype(np.float32), scale.astype(np.float32), run.outputs, strengths), words


def _passes(words: int) -> int:
    """As many as give some 3,000 steps."""
    return min(_MOST_PASSES, max(_LEAST_PASSES, _STEPS * _batch(words) // max(1, words)))


def _batch(words: int) -> int:
    return _WORDS_PER_BATCH if words > 100 * _SMALL_BATCH else _SMALL_BATCH


def _steps(
    run: Run, shards: StateShards, model: Softmax, words: int, passes: int, *, ends_in_time: bool = True
) -> Iterator[int]:
    """Take all steps; give the passes behind it now and then, and at the end. Stops if the budget of time is over."""
    random, batch = np.random.default_rng(run.plan.seed), _batch(words)
    total = max(1, passes * -(-words // batch))
    every, taken = max(1, passes // _EVALUATIONS), 0
    for number in range(1, passes + 1):
        for shard in random.permutation(len(shards)).tolist():
            states, tags = shards.shard(shard)
            order = random.permutation(len(tags))
            values = np.asarray(states)
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                model.step(values[rows], tags[rows], rate=_RATE * max(0.02, 1 - taken / total))
                taken += 1
            run.heed()
        run.report(passes + number, 2 * passes)
        left = run.seconds_left()
        is_over = number == passes or (ends_in_time and left is not None and left <= 0)
        if is_over or number % every == 0:
            yield number
        if is_over:
            return


class _HeldOut:
    """The states of the validation rows' words, which every evaluation looks at, in files."""

    def __init__(self, parts: list[tuple[list[Offsets], Path]]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, run: Run, engine: Engine, folder: Path) -> _HeldOut:
        parts: list[tuple[list[Offsets], Path]] = []
        for windows, found in word_states(engine, run.preprocessor, run.validation.examples):
            texts = windows.gathered(found, int(windows.example_of[-1]) + 1)
            path = folder / f"held-out-{len(parts)}.states"
            np.concatenate([one.logits for one in texts]).astype(np.float16).tofile(path)
            parts.append(([one.words for one in texts], path))
            run.heed()
        return cls(parts)

    def outputs(self, head: TaskHead) -> Ragged:
        found: list[Tagged] = []
        for words, path in self._parts:
            counts = [len(places) for places in words]
            logits = head.logits(_mapped(path, sum(counts)).astype(np.float32))
            own = np.split(logits, np.cumsum(counts)[:-1])
            found += [Tagged(places, values) for places, values in zip(words, own, strict=True)]
        return ragged(found)
