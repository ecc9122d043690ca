"""What every method works with: the rows, the plan, the backbone and its cached features."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.records import Finding
from finetune.evaluation.tasks import rules_of
from finetune.evaluation.tasks.rules import Scale, Targets, TaskRules
from finetune.jobs.failures import Cancelled, Stopped
from finetune.jobs.link import Link
from finetune.jobs.plan import MethodPlan, TrainingPlan
from finetune.jobs.records import EventType, JobPhase
from finetune.training.embedding import FrozenVectors, OnBatch, length_batches, run_all
from finetune.training.pace import Pace
from modeling.backbone import Backbone
from modeling.engines.build import REFERENCE
from modeling.engines.protocol import Engine
from modeling.heads import TaskHead
from modeling.inputs import MODALITIES, Example, Modality, Preprocessor, open_preprocessor, single
from modeling.tasks import TASKS
from modeling.weights import FloatArray, IntArray

if TYPE_CHECKING:
    from finetune.training.batches import FeatureRows
    from finetune.training.parallel import Ranks

__all__ = ["Rows", "Run", "embed", "joined", "length_batches"]


@dataclass(frozen=True, slots=True)
class Rows:
    """One side of a split: `labels` as the task's rules encode them (`labels[i]` indexes `Run.labels` for one label a
    row); `numbers` are the rows' numbers in their file.

    `extras` holds metadata columns by name, a value or None for each row.
    """

    examples: list[Example]
    labels: Targets
    numbers: IntArray
    extras: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


def joined(first: Rows, second: Rows) -> Rows:
    """The rows of both, without their metadata."""
    return Rows(
        [*first.examples, *second.examples],
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.numbers, second.numbers]),
    )


@dataclass
class Run:
    """A run in progress. `features` of the frozen backbone are computed once and shared by all methods.

    `on_evaluation` hears of each evaluation's number (from 1) and value, and may raise to end the training. Where the
    run does not hold out the validation rows, as in a refit, they are among the training rows and nothing is evaluated.
    `suspects` are the rows whose label is probably wrong, and `failed_methods` those that came to no model, as
    the evaluation lists them.
    `ranks` are the other processes that train with this one. Those have `orders` instead, the factor on the learning
    rates of each step to take, and `tokens` for their rows.
    `left_out` are the methods of the plan that were not trained, and why. A run that `is_finishing` has its models, and
    goes to its end unless nothing of it is to be kept. One that `is_rerun` trains what the job before trained.
    `foreign_texts` is what was found of texts that the backbone was not made for.
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
    holds_out: bool = True
    vectors: FrozenVectors | None = None
    suspects: list[dict[str, Any]] = field(default_factory=list)
    failed_methods: list[dict[str, str]] = field(default_factory=list)
    on_evaluation: Callable[[int, float], None] | None = None
    ranks: Ranks | None = None
    orders: Iterator[float] | None = None
    tokens: FeatureRows | None = None
    pace: Pace = field(default_factory=Pace)
    left_out: list[dict[str, str]] = field(default_factory=list)
    is_finishing: bool = False
    is_rerun: bool = False
    foreign_texts: list[Finding] = field(default_factory=list)
    _features: dict[str, FloatArray] = field(default_factory=dict)
    _embedded: tuple[int, int] | None = None  # rows of other sides before these, and of all

    @property
    def modality(self) -> Modality:
        return MODALITIES[self.backbone.info.modality]

    @cached_property
    def preprocessor(self) -> Preprocessor:
        return open_preprocessor(self.backbone, limit=self.plan.max_length)

    @cached_property
    def reference(self) -> FrozenVectors:
        """The frozen backbone's vectors by torch in fp32, which golden rows are computed on."""
        opens = partial(self.link.phase, JobPhase.LOADING_BACKBONE)
        return replace(self._frozen(), engine_name=str(REFERENCE), graphs=None, on_open=opens)

    @property
    def rules(self) -> TaskRules:
        return rules_of(self.plan.task)

    @property
    def kind(self) -> str:
        """The kind of the plan's task, by which methods choose their models and losses."""
        return TASKS[self.plan.task].kind

    @property
    def outputs(self) -> int:
        """How many values a head gives for a row."""
        return TASKS[self.plan.task].outputs(self.labels)

    @cached_property
    def scale(self) -> Scale:
        return self.rules.scale(self.train.labels)

    def row_hashes(self, rows: Rows) -> list[str]:
        """What `data/fingerprint.json` knows rows by: enough to find them again, not to read them."""
        return [self.modality.digest(example).hex()[:16] for example in rows.examples]

    def score(self, outputs: FloatArray) -> float:
        """The job's metric of outputs for the validation rows."""
        return self.rules.score(self.plan.metric, outputs, self.validation.labels)

    def plan_of(self, method: str) -> MethodPlan:
        return next(plan for plan in self.plan.methods if plan.method == method)

    def features(self, side: str) -> FloatArray:
        """Pooled vectors float32[rows, hidden] of `train`, `validation` or `test` by the frozen backbone."""
        if side not in self._features:
            self.link.phase(JobPhase.EMBEDDING)
            rows = {"train": self.train, "validation": self.validation, "test": self.test}[side]
            before = sum(map(len, self._features.values()))
            self._embedded = (before, max(before + len(rows), len(self.train) + len(self.validation)))
            self._features[side] = self.embed(rows.examples)
            self._embedded = None
        return self._features[side]

    def has_features(self, side: str) -> bool:
        """Whether `features` of this side are computed already."""
        return side in self._features

    def embed(self, examples: Sequence[Example]) -> FloatArray:
        """Pooled vectors float32[examples, hidden] by the frozen backbone, on the engine that it is served on."""
        return self._frozen().of(examples, max_length=self.plan.max_length, on_batch=self._report_embedding)

    @property
    def frozen_engine(self) -> Engine:
        """The engine that the frozen backbone is served on."""
        return self._frozen().engine

    @property
    def engine_name(self) -> str:
        """The engine of the frozen backbone's vectors, written `runtime/precision`."""
        return self._frozen().engine_name

    @property
    def cached_vectors(self) -> int:
        """How many of those vectors an earlier job has computed."""
        return self._frozen().cached

    def seconds_left(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.monotonic()

    def _frozen(self) -> FrozenVectors:
        if self.vectors is None:
            self.vectors = FrozenVectors(self.backbone, device=self.plan.device)
        return self.vectors

    def _report_embedding(self, done: int, total: int) -> None:
        self.heed()
        before, of_all = self._embedded or (0, total)
        self.report(min(of_all, before + done), of_all)

    def report(self, done: int, total: int, **details: Any) -> None:
        """Steps or rows behind the run, of all that its current stage has."""
        self.link.progress(**self.pace.at(done, total, **details))

    def heed(self) -> None:
        """Raise what the run was asked for, `Cancelled` or `Stopped`, unless it ends anyway and keeps the best."""
        try:
            self.link.check_cancelled()
        except Cancelled as request:
            if not request.keep_best or not (self.is_finishing or self.is_winding_down):
                raise
            self.is_winding_down = True
        except Stopped:
            if not (self.is_finishing or self.is_winding_down):
                raise

    def leave_out(self, method: str, reason: str, message: str) -> None:
        """Note that a method of the plan is not trained. `reason` is a code."""
        self.left_out.append({"method": method, "reason": reason, "message": message})
        self.pace.leave_out(method)
        kind: EventType = "data_warning" if reason == "budget" else "early_stopped"
        level = "warn" if reason == "budget" else "info"
        self.link.event(kind, message, {"code": reason, "method": method}, level=level)


def embed(
    engine: Engine,
    preprocessor: Preprocessor,
    examples: Sequence[Example],
    *,
    on_batch: OnBatch | None = None,
    adapter: str | None = None,
) -> FloatArray:
    """Pooled vectors in the order of `examples`, computed in batches of similar length."""
    rows = single(preprocessor.encode(examples)) if examples else []
    return run_all(engine, rows, adapter=adapter, on_batch=on_batch)
