"""What every method works with: the rows, the plan, the backbone and its cached features."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from finetune.events import Link
from finetune.jobs.records import JobPhase
from finetune.plan import MethodPlan, TrainingPlan
from modeling.backbone import Backbone
from modeling.engines.graphs import GraphEngine
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.heads import TaskHead
from modeling.preprocess import Encoded, TextPreprocessor
from modeling.weights import FloatArray, IntArray

_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Rows:
    """One side of a split: `labels[i]` indexes `Run.labels`; `numbers` are the rows' numbers in their file.

    `extras` holds metadata columns by name, a value or None for each row.
    """

    texts: list[str]
    labels: IntArray
    numbers: IntArray
    extras: Mapping[str, Sequence[str | None]] = field(default_factory=dict)


@dataclass
class Run:
    """A run in progress. `features` of the frozen backbone are computed once and shared by all methods.

    `on_evaluation` hears of each evaluation's number (from 1) and value, and may raise to end the training.
    """

    train: Rows
    validation: Rows
    test: Rows
    labels: tuple[str, ...]
    plan: TrainingPlan
    backbone: Backbone
    link: Link
    work_dir: Path
    earlier_work_dirs: tuple[Path, ...] = ()
    deadline: float | None = None
    probe_head: TaskHead | None = None
    is_winding_down: bool = False
    on_evaluation: Callable[[int, float], None] | None = None
    _features: dict[str, FloatArray] = field(default_factory=dict)

    @cached_property
    def preprocessor(self) -> TextPreprocessor:
        return TextPreprocessor(self.backbone.folder / "tokenizer.json", max_length=self.plan.max_length)

    @cached_property
    def engine(self) -> TorchEngine:
        self.link.phase(JobPhase.LOADING_BACKBONE)
        return TorchEngine(self.backbone, device=self.plan.device)

    def plan_of(self, method: str) -> MethodPlan:
        return next(plan for plan in self.plan.methods if plan.method == method)

    def features(self, side: str) -> FloatArray:
        """Pooled vectors float32[rows, hidden] of `train`, `validation` or `test` by the frozen backbone."""
        if side not in self._features:
            texts = {"train": self.train, "validation": self.validation, "test": self.test}[side].texts
            self._features[side] = self.embed(texts, report=True)
        return self._features[side]

    def has_features(self, side: str) -> bool:
        """Whether `features` of this side are computed already."""
        return side in self._features

    def embed(self, texts: Sequence[str], *, report: bool = False) -> FloatArray:
        engine = self.engine
        if report:
            self.link.phase(JobPhase.EMBEDDING)
        return embed(engine, self.preprocessor, texts, on_batch=self._report_embedding if report else None)

    def seconds_left(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.monotonic()

    def _report_embedding(self, done: int, total: int) -> None:
        if not self.is_winding_down:
            self.link.check_cancelled()
        self.link.progress(percent=round(100 * done / max(1, total), 1), step=done, total_steps=total)


def embed(
    engine: TorchEngine | GraphEngine, preprocessor: TextPreprocessor, texts: Sequence[str], *,
    on_batch: Callable[[int, int], None] | None = None,
    adapter: str | None = None,
) -> FloatArray:  # fmt: skip
    """Pooled vectors in the order of `texts`, computed in batches of similar length."""
    encoded = preprocessor.encode(texts) if texts else []
    pooled = np.zeros((len(encoded), 0), dtype=np.float32)
    done = 0
    for indices in length_batches(encoded, tokens=_TOKENS_PER_BATCH):
        rows = [encoded[index] for index in indices]
        vectors = engine.run(EngineBatch(rows, [adapter] * len(rows) if adapter else None))
        if pooled.shape[1] == 0:
            pooled = np.zeros((len(encoded), vectors.shape[1]), dtype=np.float32)
        pooled[indices] = vectors
        done += len(indices)
        if on_batch is not None:
            on_batch(done, len(encoded))
    return pooled


def length_batches(encoded: Sequence[Encoded], *, tokens: int) -> list[IntArray]:
    """Row indices in batches of similar length, each within the token budget, the longest first.

    Longest first, so that a batch too large for the memory fails at once and not at the end.
    """
    order = np.argsort([-item.length for item in encoded], kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens // encoded[order[start]].length)
        batches.append(order[start : start + size].astype(np.int64))
        start += size
    return batches
