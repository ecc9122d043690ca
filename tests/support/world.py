"""A registry, a store and a tiny backbone, with a method that publishes head versions as a worker would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from model_registry.manifest import MANIFEST_NAME, BackboneRef, ModelManifest, VersionKind
from model_registry.registry import ModelVersion, Promotion, Registry
from model_registry.store import FileStore, put_tree
from modeling.adapters import Adapter
from modeling.assemble import GoldenRow, write_version_files
from modeling.backbone import Backbone
from modeling.engines.build import EngineOptions, EngineSpec
from modeling.engines.graphs import GraphFiles
from modeling.engines.protocol import Engine, EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.export import export_graphs
from modeling.heads import DenseLayer, TaskHead
from modeling.linear_text import LinearText
from modeling.linear_tokens import LinearTokens
from modeling.tasks import DEFAULT_TASK, TASKS
from modeling.tasks.single_label import OneLabel
from modeling.weights import FloatArray
from service.inference.engine_selection import EngineSelector, SelectionPolicy
from service.inference.engine_worker import BatchLimits, Runtime
from service.inference.model_pool import ModelPool
from service.inference.predictor import PredictResult
from service.metrics import ServingMetrics
from tests.support.adapters import write_adapter
from tests.support.rows import encoded_texts

Result = TypeVar("Result")

GOLDEN = ("a good film", "dull plot", "wheat and oil")


@dataclass
class World:
    registry: Registry
    store: FileStore
    backbone: Backbone
    folder: Path
    make_engine: Callable[[Backbone], Engine] = TorchEngine
    export: Callable[..., GraphFiles] = export_graphs

    def publish(
        self,
        name: str,
        labels: tuple[str, ...] = ("a", "b"),
        *,
        seed: int = 0,
        promote: bool = False,
        adapter: Adapter | None = None,
        spoil: Callable[[Path], None] | None = None,
        task: str = DEFAULT_TASK,
        thresholds: Sequence[float] | None = None,
    ) -> ModelVersion:
        """A linear head with random weights, over the backbone or an `adapter` of it. `spoil` may damage the staged
        files, or add to them, before they are hashed."""
        random = np.random.default_rng(seed)
        labels = () if TASKS[task].kind == "regression" else labels
        outputs = TASKS[task].outputs(labels)
        weight = random.normal(size=(outputs, self.backbone.info.hidden_size)).astype(np.float32)
        head = TaskHead((DenseLayer(weight, np.zeros(outputs, np.float32)),))
        encoded = encoded_texts(self.backbone.folder, GOLDEN, limit=32)
        engine = self.make_engine(self.backbone)
        kind: VersionKind = "head" if adapter is None else "lora"
        method = "linear_probe" if adapter is None else "lora"
        if adapter is not None:
            engine.load_adapter("adapter", adapter)
        keys, by_position = None if adapter is None else ["adapter"] * len(encoded), TASKS[task].needs == "states"
        computed = engine.run(EngineBatch(encoded, keys, range(len(encoded)) if by_position else ()))
        values = [computed.states[row] if by_position else computed.pooled[row] for row in range(len(encoded))]
        logits = [head.logits(own) for own in values]

        def write(staged: Path) -> None:
            write_version_files(
                staged,
                head=head,
                labels=labels,
                max_length=32,
                temperature=1.0,
                golden=_golden(logits),
                task=task,
                thresholds=thresholds,
            )
            if adapter is not None:
                write_adapter(staged / "adapter", adapter)
            if spoil is not None:
                spoil(staged)

        base = BackboneRef(name="tiny", digest=self.backbone.info.digest, source="file:tiny")
        return self._register(name, labels, write, kind=kind, method=method, base=base, promote=promote, task=task)

    def publish_baseline(
        self,
        name: str,
        labels: tuple[str, ...] = ("a", "b"),
        *,
        seed: int = 0,
        promote: bool = False,
        spoil: Callable[[Path], None] | None = None,
        task: str = DEFAULT_TASK,
        thresholds: Sequence[float] | None = None,
    ) -> ModelVersion:
        """A linear model over a few words, with random weights. It needs no backbone."""
        labels = () if TASKS[task].kind == "regression" else labels
        outputs = TASKS[task].outputs(labels)
        terms = tuple(sorted({word for text in GOLDEN for word in text.split() if len(word) > 1}))
        weight = np.random.default_rng(seed).normal(size=(outputs, len(terms))).astype(np.float32)
        linear = LinearText(terms, np.ones(len(terms), np.float32), weight, np.zeros(outputs, np.float32))
        return self.publish_linear(name, labels, linear, promote=promote, spoil=spoil, task=task, thresholds=thresholds)

    def publish_linear(
        self,
        name: str,
        labels: tuple[str, ...],
        linear: LinearText | LinearTokens,
        *,
        promote: bool = False,
        spoil: Callable[[Path], None] | None = None,
        task: str = DEFAULT_TASK,
        thresholds: Sequence[float] | None = None,
    ) -> ModelVersion:
        """A linear model as it is."""
        golden = _golden(linear.margins(GOLDEN))

        def write(staged: Path) -> None:
            write_version_files(
                staged,
                linear=linear,
                labels=labels,
                max_length=None,
                temperature=1.0,
                golden=golden,
                task=task,
                thresholds=thresholds,
            )
            if spoil is not None:
                spoil(staged)

        return self._register(name, labels, write, kind="baseline", method="baseline", promote=promote, task=task)

    def _register(
        self,
        name: str,
        labels: tuple[str, ...],
        write: Callable[[Path], None],
        *,
        kind: VersionKind,
        method: str,
        base: BackboneRef | None = None,
        promote: bool = False,
        task: str = DEFAULT_TASK,
    ) -> ModelVersion:
        with self.registry.transaction() as connection:
            version = self.registry.reserve(
                connection, tenant="default", name=name, task=task, kind=kind, method=method, job_id=None
            )
        staged = self.folder / f"staged-{name}-{version}"
        write(staged)
        manifest = ModelManifest(
            tenant="default",
            name=name,
            version=version,
            kind=kind,
            task=task,
            method=method,
            labels=labels,
            base=base,
            created_at=time.time(),
            files=(),
        )
        manifest = manifest.model_copy(update={"files": put_tree(self.store, manifest.prefix, staged)})
        self.store.put_bytes(f"{manifest.prefix}/{MANIFEST_NAME}", manifest.to_bytes(), create_only=True)
        champion = self.registry.champion("default", name)
        promotion = (
            Promotion(is_wanted=True, over=champion.version if champion else None, reason="a test") if promote else None
        )
        with self.registry.transaction() as connection:
            self.registry.publish(connection, manifest, actor="test", promotion=promotion)
        return self.registry.snapshot().versions[("default", name, version)]

    @asynccontextmanager
    async def pool(self, **options: Any) -> AsyncIterator[ModelPool]:
        """With its backbone."""
        async with self.bare_pool(backbones=("tiny",), **options) as pool:
            await pool.add_backbone("tiny", self.backbone)
            yield pool

    @asynccontextmanager
    async def bare_pool(
        self,
        *,
        backbones: Sequence[str] = (),
        memory_budget_bytes: int = 1 << 30,
        metrics: ServingMetrics | None = None,
        runtime: Runtime = Runtime(),
    ) -> AsyncIterator[ModelPool]:
        selector = _FixedEngine(self)
        pool = ModelPool(
            self.store,
            selector,
            BatchLimits(1024, 32, 0.0),
            metrics or ServingMetrics(),
            memory_budget_bytes=memory_budget_bytes,
            backbones=backbones,
            runtime=runtime,
        )
        try:
            yield pool
        finally:
            await pool.stop()


class _FixedEngine(EngineSelector):
    """Whatever the world makes serves, and nothing is measured."""

    def __init__(self, world: World) -> None:
        super().__init__(SelectionPolicy(engine="torch"), EngineOptions(threads=1), world.folder / "graphs", None)
        self._world = world

    def open(self, spec: EngineSpec, backbone: Backbone) -> Engine:
        return self._world.make_engine(backbone)


def _golden(logits: Sequence[FloatArray] | FloatArray) -> list[GoldenRow]:
    return [GoldenRow(text, row.tolist()) for text, row in zip(GOLDEN, logits, strict=True)]


def one_labels(result: PredictResult) -> list[OneLabel]:
    """The answers, each of them checked to be a classifier's."""
    assert all(isinstance(answer, OneLabel) for answer in result.answers)
    return cast("list[OneLabel]", result.answers)


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(coroutine)
