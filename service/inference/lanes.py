"""Lanes: an engine with its queue. Heads and adapters of one backbone share a lane; linear models share one too."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from modeling.adapters import Adapter
from modeling.backbone import Backbone
from modeling.engines.build import EngineSpec
from modeling.engines.protocol import Engine, EngineBatch
from modeling.preprocess import TextInput, TextPreprocessor
from modeling.weights import FloatArray
from service.inference.batching import DynamicBatcher, QueueEntry
from service.metrics import ServingMetrics

WARM_UP_TEXT = "warm up"


@dataclass(frozen=True, slots=True)
class BatchLimits:
    max_tokens: int
    max_rows: int
    max_delay_s: float


class Lane(Protocol):
    """What a served model needs of the engine under it."""

    batcher: DynamicBatcher

    @property
    def engine_name(self) -> str: ...

    def preprocess(self, inputs: Sequence[TextInput], *, truncate: bool, max_length: int | None) -> list[Any]:
        """Inputs to work for the queue; called on a tokeniser thread."""


class BackboneLane:
    """One backbone's engine and tokenizer. Another engine may take over between two batches."""

    def __init__(
        self, backbone: Backbone, engine: Engine, metrics: ServingMetrics, limits: BatchLimits, *, label: str
    ) -> None:
        self.backbone = backbone
        self.engine = engine
        self._preprocessor = TextPreprocessor(backbone.folder / "tokenizer.json", max_length=backbone.info.max_length)
        self.batcher = DynamicBatcher(
            (label, self.engine_name), self._compute, metrics, max_tokens=limits.max_tokens,
            max_rows=limits.max_rows, max_delay_s=limits.max_delay_s,
        )  # fmt: skip

    @property
    def engine_name(self) -> str:
        """`runtime/precision`."""
        return str(EngineSpec(self.engine.name, self.engine.precision))

    def preprocess(self, inputs: Sequence[TextInput], *, truncate: bool, max_length: int | None) -> list[Any]:
        return list(self._preprocessor.encode(inputs, truncate=truncate, max_length=max_length))

    async def switch(self, engine: Engine, adapters: Mapping[str, Adapter]) -> None:
        """`engine` takes over with these adapters and a first run behind it. Raises `ModelingError`; then nothing
        has changed. No adapter may be loaded or unloaded meanwhile."""

        def prepare() -> None:
            for key, adapter in adapters.items():
                engine.load_adapter(key, adapter)
            work = self.preprocess([WARM_UP_TEXT], truncate=True, max_length=None)
            engine.run(EngineBatch(work))
            if adapters:
                engine.run(EngineBatch(work, [next(iter(adapters))]))

        await asyncio.to_thread(prepare)
        await self.batcher.call(lambda: setattr(self, "engine", engine))

    def _compute(self, batch: Sequence[QueueEntry]) -> tuple[FloatArray, list[FloatArray | None], list[str]]:
        """One run for rows of all models and adapters; heads follow, grouped by model."""
        engine = self.engine
        adapters = [entry.model.adapter_key for entry in batch]
        vectors = engine.run(EngineBatch([entry.work for entry in batch], adapters if any(adapters) else None))
        return vectors, apply_heads(batch, vectors), [self.engine_name] * len(batch)


@dataclass(frozen=True, slots=True)
class RawText:
    """A text for a model that needs no tokenizer; its cost is estimated from its size."""

    text: str

    @property
    def length(self) -> int:
        return 1 + len(self.text) // 16  # tf-idf costs a small part of what an encoder does


class LinearLane:
    """All tf-idf baselines: no backbone, so one queue and thread serve them."""

    engine_name = "linear"

    def __init__(self, metrics: ServingMetrics, limits: BatchLimits) -> None:
        self.batcher = DynamicBatcher(
            ("linear", "linear"), self._compute, metrics, max_tokens=limits.max_tokens, max_rows=limits.max_rows,
            max_delay_s=limits.max_delay_s,
        )  # fmt: skip

    def preprocess(self, inputs: Sequence[TextInput], *, truncate: bool, max_length: int | None) -> list[Any]:
        return [RawText(item if isinstance(item, str) else " ".join(item)) for item in inputs]

    def _compute(self, batch: Sequence[QueueEntry]) -> tuple[FloatArray, list[FloatArray | None], list[str]]:
        logits: list[FloatArray | None] = [None] * len(batch)
        for model, rows in rows_by_model(batch):
            margins = model.linear.margins([batch[row].work.text for row in rows])
            for row, values in zip(rows, margins, strict=True):
                logits[row] = values
        return np.zeros((len(batch), 1), dtype=np.float32), logits, ["linear"] * len(batch)


def apply_heads(batch: Sequence[QueueEntry], vectors: FloatArray) -> list[FloatArray | None]:
    """Each model's head on its rows: one small product per distinct model, whatever the label sets."""
    logits: list[FloatArray | None] = [None] * len(batch)
    for model, rows in rows_by_model(batch):
        if model.head is not None:
            for row, values in zip(rows, model.head.logits(vectors[rows]), strict=True):
                logits[row] = values
    return logits


def rows_by_model(batch: Sequence[QueueEntry]) -> list[tuple[Any, list[int]]]:
    groups: dict[int, tuple[Any, list[int]]] = {}
    for row, entry in enumerate(batch):
        groups.setdefault(id(entry.model), (entry.model, []))[1].append(row)
    return list(groups.values())
