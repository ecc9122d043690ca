"""Lanes: an engine with its queue. Heads and adapters of one backbone share a lane; linear models share one too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from modeling.backbone import Backbone
from modeling.engines.protocol import Engine, EngineBatch
from modeling.preprocess import TextInput, TextPreprocessor
from modeling.weights import FloatArray
from service.inference.batching import DynamicBatcher, QueueEntry
from service.metrics import ServingMetrics

_log = logging.getLogger("service.lanes")


@dataclass(frozen=True, slots=True)
class BatchLimits:
    max_tokens: int
    max_rows: int
    max_delay_s: float


class Lane(Protocol):
    """What a served model needs of the engine under it."""

    batcher: DynamicBatcher
    engine_name: str

    def preprocess(self, inputs: Sequence[TextInput], *, truncate: bool, max_length: int | None) -> list[Any]:
        """Inputs to work for the queue; called on a tokeniser thread."""


class BackboneLane:
    """One backbone's engine and tokenizer. A second engine may take over the rows without adapters later."""

    def __init__(
        self, backbone: Backbone, engine: Engine, metrics: ServingMetrics, limits: BatchLimits, *, label: str
    ) -> None:
        self.backbone = backbone
        self.adapter_engine = engine
        self.fast_engine: Engine | None = None
        self.engine_name = engine.name
        self._preprocessor = TextPreprocessor(backbone.folder / "tokenizer.json", max_length=backbone.info.max_length)
        self.batcher = DynamicBatcher(
            (label, engine.name), self._compute, metrics, max_tokens=limits.max_tokens,
            max_rows=limits.max_rows, max_delay_s=limits.max_delay_s,
        )  # fmt: skip

    def preprocess(self, inputs: Sequence[TextInput], *, truncate: bool, max_length: int | None) -> list[Any]:
        return list(self._preprocessor.encode(inputs, truncate=truncate, max_length=max_length))

    def engine_for(self, adapter: str | None) -> Engine:
        if adapter is None and self.fast_engine is not None:
            return self.fast_engine
        return self.adapter_engine

    def memory_bytes(self) -> int:
        fast = 0 if self.fast_engine is None else self.fast_engine.memory_bytes()
        return self.adapter_engine.memory_bytes() + fast

    def _compute(self, batch: Sequence[QueueEntry]) -> tuple[FloatArray, list[FloatArray | None], list[str]]:
        """Rows with an adapter and rows without may run on different engines; heads follow, grouped by model."""
        adapters = [entry.model.adapter_key for entry in batch]
        vectors = np.zeros((len(batch), self.backbone.info.hidden_size), dtype=np.float32)
        engines = [""] * len(batch)
        for engine, rows in self._by_engine(adapters):
            keys = [adapters[row] for row in rows]
            vectors[rows] = engine.run(EngineBatch([batch[row].work for row in rows], keys if any(keys) else None))
            for row in rows:
                engines[row] = engine.name
        return vectors, apply_heads(batch, vectors), engines

    def _by_engine(self, adapters: Sequence[str | None]) -> list[tuple[Engine, list[int]]]:
        if self.fast_engine is None or self.adapter_engine is self.fast_engine:
            return [(self.adapter_engine, list(range(len(adapters))))]
        bare = [row for row, key in enumerate(adapters) if key is None]
        adapted = [row for row, key in enumerate(adapters) if key is not None]
        split = ((self.fast_engine, bare), (self.adapter_engine, adapted))
        return [(engine, rows) for engine, rows in split if rows]


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


PARITY_TEXTS = (
    "a short text",
    "The company said it expects to report a profit for the third quarter, against a loss a year ago.",
    "An effective film that holds the attention to the end; its actors are better than their lines. " * 6,
    "wheat, corn & soybeans: 12.5 mln tonnes (up 3 %)",
)
MIN_COSINE = 0.999


def build_onnx(lane: BackboneLane, target_folder: Path, *, device: str, threads: int) -> tuple[Engine, float]:
    """Exports the lane's backbone (once, cached) and proves the result equal. Returns engine and largest difference.

    Blocking; runs on a background thread. Raises `EngineFailed` where parity does not hold.
    """
    from modeling.engines.onnx import OnnxEngine
    from modeling.engines.torch import TorchEngine
    from modeling.errors import EngineFailed
    from modeling.export import cache_name, export_onnx, measure_parity

    model_file = export_onnx(lane.backbone, target_folder / cache_name(lane.backbone))
    engine = OnnxEngine(lane.backbone, model_file, device=device, threads=threads)
    encoded = lane.preprocess(PARITY_TEXTS, truncate=True, max_length=None)
    # A reference of its own: the serving engine belongs to its thread.
    parity = measure_parity(TorchEngine(lane.backbone, device=device), engine, encoded)
    if not parity.min_cosine >= MIN_COSINE:
        raise EngineFailed(f"onnx differs from torch: cosine {parity.min_cosine:.6f}")
    return engine, parity.max_abs_diff
