"""A lane without an engine: texts are counted in words, answers are zeros, and rows may be told to fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modeling.errors import EngineFailed, InputTooLong
from modeling.inputs import MODALITIES
from modeling.tasks import NO_CALIBRATION, TASKS
from service.inference.capacity import CostEstimate
from service.inference.engine_worker import BatchLimits, EngineWorker, Outputs, Runtime
from service.inference.queue import QueueEntry, Ticket
from service.metrics import ServingMetrics

POISON, NOT_A_NUMBER = "poison", "nan"


@dataclass(frozen=True)
class Words:
    text: str
    extra: ClassVar[dict[str, Any]] = {}

    @property
    def cost(self) -> int:
        return len(self.text.split())


def words_of(entry: QueueEntry) -> str:
    assert isinstance(entry.work, Words)
    return entry.work.text


class WordLane:
    """`compute` may be replaced; the batches that it saw are in `seen`."""

    engine_name = "fake/fp32"

    def __init__(self, limits: BatchLimits, *, runtime: Runtime | None = None, max_length: int = 512, **options: Any):
        self.max_length = max_length
        self.cost_estimate = CostEstimate(MODALITIES["text"].size, 2.0)
        self.metrics = ServingMetrics()
        self.seen: list[list[str]] = []
        self.is_broken = False
        if runtime is not None:
            options["runtime"] = runtime
        self.worker = EngineWorker(("tiny", self.engine_name), self, self.metrics, limits, **options)

    def estimate(self, inputs: Sequence[str], max_length: int, *, in_windows: bool) -> int:
        return self.cost_estimate.cost(inputs, max_length)

    def preprocess(
        self, inputs: Sequence[str], *, truncate: bool, max_length: int | None, in_windows: bool = False
    ) -> list[list[Words]]:
        limit = max_length or self.max_length
        words = [item.split() for item in inputs]
        for index, item in enumerate(words):
            if len(item) > limit and not truncate:
                raise InputTooLong(f"input {index} has {len(item)} tokens", index=index)
        return [[Words(" ".join(item[:limit]))] for item in words]

    def compute(self, entries: Sequence[QueueEntry]) -> Outputs:
        texts = [words_of(entry) for entry in entries]
        self.seen.append(texts)
        if self.is_broken or any(POISON in text for text in texts):
            raise EngineFailed("a poisoned row")
        vectors = np.asarray([[len(text)] for text in texts], dtype=np.float32)
        scores = [np.asarray([0.25, 0.75], dtype=np.float32)] * len(texts)
        return Outputs(vectors, scores, [NOT_A_NUMBER not in text for text in texts])

    def check(self) -> None:
        if self.is_broken:
            raise EngineFailed("still broken")


class WordModel:
    """As much of a `ServedModel` as the path of a request needs."""

    name, version, task = "m", 1, TASKS["text-classification"]
    labels = ("a", "b")
    calibration = NO_CALIBRATION
    metric_labels = ("m", "1", "text-classification", "default")
    normalize_embedding = False
    has_embedding = True
    adapter_key: str | None = None
    head = margins = None

    def __init__(self, lane: WordLane, *, max_length: int | None = None) -> None:
        self.lane, self.max_length = lane, max_length
        self.leases = 0

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        self.leases += 1
        try:
            yield
        finally:
            self.leases -= 1


def ticket_for(
    model: WordModel, texts: Sequence[str], *, deadline: float, max_length: int = 512, **rest: Any
) -> Ticket:
    """As the predictor makes it."""
    future = asyncio.get_running_loop().create_future()
    series = model.lane.metrics.of_model(model.metric_labels)
    return Ticket(model, series, list(texts), deadline, future, max_length, **rest)
