"""The frozen backbone's vectors for a run: which engine computes them, and when none has to."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from finetune.training.feature_cache import FeatureCache, content_key, counts_space, space_name
from modeling.backbone import Backbone
from modeling.engines.build import REFERENCE, EngineOptions, EngineSpec, build_engine
from modeling.engines.device import DeviceFingerprint
from modeling.engines.graphs import GraphFiles
from modeling.engines.protocol import Engine, EngineBatch
from modeling.errors import ModelingError
from modeling.inputs import MODALITIES, Example, Features, Modality, Preprocessor, open_preprocessor, single
from modeling.weights import FloatArray, IntArray

_TOKENS_PER_BATCH = 4096
_BATCHES_PER_RELEASE = 8  # each batch has other sizes, and what they leave free between them adds up
_ROWS_PER_PART = 16384
_EXAMPLES_PER_PART = 1024  # all encodings at once would take more memory than the examples
# Engines that open in about a second; others wait for a compiler first.
_RUNTIMES = frozenset({"torch", "onnx", "openvino"})

OnBatch = Callable[[int, int], None]


def choose_engine(
    measured: Sequence[Mapping[str, Any]], device: DeviceFingerprint, *, has_graphs: bool, has_bf16: bool
) -> str:
    """`runtime/precision` for embedding: what a server chose on the same kind of device, so that a probe is fitted
    to the vectors that it will be served with; where none has measured yet, torch.

    `measured` are rows with `device` and `chosen`, the newest first. Pure.
    """
    same = json.dumps(asdict(device), sort_keys=True)
    for row in measured:
        if json.dumps(row["device"], sort_keys=True) == same:
            spec = EngineSpec.parse(row["chosen"])
            if spec.runtime in _RUNTIMES and (has_graphs or not spec.needs_graphs):
                return str(spec)
    return str(EngineSpec("torch", "bf16") if has_bf16 else REFERENCE)


@dataclass
class FrozenVectors:
    """Pooled vectors of one backbone by one engine. The engine is opened for the first row that is not known, and the
    preprocessor for the first example; `on_open` hears of the former."""

    backbone: Backbone
    engine_name: str = str(REFERENCE)
    graphs: Path | None = None
    cache: FeatureCache | None = None
    device: str = "cpu"
    threads: int = 0
    on_open: Callable[[], None] | None = None
    cached: int = field(default=0, init=False)  # vectors that were known already

    @property
    def modality(self) -> Modality:
        return MODALITIES[self.backbone.info.modality]

    @cached_property
    def preprocessor(self) -> Preprocessor:
        return open_preprocessor(self.backbone)

    @cached_property
    def engine(self) -> Engine:
        if self.on_open is not None:
            self.on_open()
        spec = EngineSpec.parse(self.engine_name)
        files = None if self.graphs is None else GraphFiles(self.graphs)
        try:
            return build_engine(spec, self.backbone, files, EngineOptions(self.device, self.threads))
        except ModelingError:  # the export may have been deleted since it was chosen
            if spec == REFERENCE:
                raise
            self.engine_name = str(REFERENCE)
            return build_engine(REFERENCE, self.backbone, None, EngineOptions(self.device, self.threads))

    def lengths(self, examples: Sequence[Example]) -> IntArray:
        """What each example costs int64[examples], one more than the backbone's limit where it is cut there."""
        found = np.zeros((len(examples), 1), dtype=np.float32)
        space = counts_space("lengths", self.backbone.info.digest, self.modality.libraries)
        keys = [content_key(self.modality.content(example)) for example in examples]
        is_known = np.zeros(len(examples), dtype=np.bool_)
        if self.cache is not None and len(examples):
            is_known = self.cache.fill(space, keys, found)
        missing = np.flatnonzero(~is_known)
        for start in range(0, len(missing), _EXAMPLES_PER_PART):
            part = missing[start : start + _EXAMPLES_PER_PART]
            found[part, 0] = [item.cost + item.is_truncated for item in self._encoded(examples, part)]
        if self.cache is not None and len(missing):
            self.cache.add(space, [keys[row] for row in missing], found[missing])
        return found[:, 0].astype(np.int64)

    def of(self, examples: Sequence[Example], *, max_length: int, on_batch: OnBatch | None = None) -> FloatArray:
        """float32[examples, hidden] of each example cut to `max_length` units; what the cache lacks is computed."""
        vectors = np.zeros((len(examples), self.backbone.info.hidden_size), dtype=np.float32)
        keys: list[bytes] = []
        is_known = np.zeros(len(examples), dtype=np.bool_)
        if self.cache is not None and len(examples):
            keys = self._keys(examples, max_length)
            is_known = self.cache.fill(self._space(), keys, vectors)
            self.cached += int(is_known.sum())
        missing = np.flatnonzero(~is_known)
        # In parts, so that a run that is stopped on the way finds most of them when it goes on.
        for start in range(0, len(missing), _ROWS_PER_PART):
            part = missing[start : start + _ROWS_PER_PART]
            report = None if on_batch is None else partial(_shifted, on_batch, start, len(missing))
            vectors[part] = run_all(self.engine, self._encoded(examples, part, max_length), on_batch=report)
            if self.cache is not None:
                self.cache.add(self._space(), [keys[row] for row in part], vectors[part])
        return vectors

    def _keys(self, examples: Sequence[Example], max_length: int) -> list[bytes]:
        """An example cut at different lengths has different vectors, one that fits has the same at every length."""
        return [
            content_key(self.modality.content(example), cut_at=max_length if length > max_length else None)
            for example, length in zip(examples, self.lengths(examples).tolist(), strict=True)
        ]

    def _encoded(self, examples: Sequence[Example], rows: IntArray, max_length: int | None = None) -> list[Features]:
        return single(self.preprocessor.encode([examples[row] for row in rows], limit=max_length))

    def _space(self) -> str:
        return space_name(self.backbone.info.digest, self.engine_name, self.modality.libraries)


def _shifted(on_batch: OnBatch, start: int, total: int, done: int, _: int) -> None:
    on_batch(start + done, total)


def run_all(
    engine: Engine, rows: Sequence[Features], *, adapter: str | None = None, on_batch: OnBatch | None = None
) -> FloatArray:
    """Pooled vectors float32[rows, hidden] in the order of `rows`, computed in batches of similar length."""
    pooled = np.zeros((len(rows), 0), dtype=np.float32)
    done = 0
    for number, indices in enumerate(length_batches(rows, tokens=_TOKENS_PER_BATCH)):
        if number % _BATCHES_PER_RELEASE == _BATCHES_PER_RELEASE - 1:
            release_free_memory()
        batch = [rows[index] for index in indices]
        vectors = engine.run(EngineBatch(batch, [adapter] * len(batch) if adapter else None)).pooled
        if pooled.shape[1] == 0:
            pooled = np.zeros((len(rows), vectors.shape[1]), dtype=np.float32)
        pooled[indices] = vectors
        done += len(indices)
        if on_batch is not None:
            on_batch(done, len(rows))
    return pooled


def length_batches(encoded: Sequence[Features], *, tokens: int) -> list[IntArray]:
    """Row indices in batches of similar length, each within the token budget, the longest first.

    Longest first, so that a batch too large for the memory fails at once and not at the end.
    """
    order = np.argsort([-item.cost for item in encoded], kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens // encoded[order[start]].cost)
        batches.append(order[start : start + size].astype(np.int64))
        start += size
    return batches


def release_free_memory() -> None:
    """Give memory that was freed back to the system: it would stay beside the training's own until the end.

    The preparation of 50,000 rows of 130 words leaves 35 MB in glibc's arenas and 100 MB in Arrow's pool.
    """
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
