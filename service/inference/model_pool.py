"""Which models are in memory. Loads, warms, swaps and drains them; requests only take leases.

The pool's tables change on the event loop alone. A version is loaded beside the one that serves and
takes over when it has reproduced its golden rows; if it cannot, the old one goes on serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from model_registry.engine_reports import EngineMeasurement
from model_registry.errors import ArtifactError, ModelNotFound, RegistryError
from model_registry.manifest import backbone_prefix
from model_registry.refs import ModelRef
from model_registry.registry import ModelVersion, RegistrySnapshot
from model_registry.store import ArtifactStore, load_manifest
from modeling.adapters import Adapter
from modeling.assemble import VersionParts, check_golden, compare_golden, read_adapter, read_version
from modeling.backbone import Backbone
from modeling.engines.build import REFERENCE, EngineSpec
from modeling.engines.protocol import Engine, EngineBatch
from modeling.errors import EngineFailed, GoldenRowsDiffer, ModelingError
from modeling.preprocess import TextInput
from modeling.tasks import DEFAULT_MODALITY, FeatureExtraction
from modeling.weights import FloatArray
from service.garbage import reconsider
from service.inference.batch_log import BatchLog
from service.inference.batching import BatchLimits
from service.inference.engine_selection import EngineSelector
from service.inference.errors import InferenceError, MemoryBudgetExceeded, ModelNotReady
from service.inference.lanes import BackboneLane, Lane, LinearLane
from service.inference.served import ServedModel
from service.metrics import ServingMetrics

_log = logging.getLogger("service.model_pool")
_RETRY_FAILED_S = 60.0  # what keeps a version from loading is seldom gone sooner
_YIELD = 2.0  # while requests come, a load leaves them so many times as long as it takes of the engine
_BACKBONE_TASK = FeatureExtraction(DEFAULT_MODALITY)

Key = tuple[str, str, int]
AliasKey = tuple[str, str, str]


class ModelPool:
    def __init__(
        self,
        store: ArtifactStore,
        selector: EngineSelector,
        limits: BatchLimits,
        metrics: ServingMetrics,
        *,
        memory_budget_bytes: int,
        batch_log: BatchLog | None = None,
    ) -> None:
        self._store, self._selector, self._limits, self._metrics = store, selector, limits, metrics
        self._memory_budget_bytes = memory_budget_bytes
        self._batch_log = batch_log
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="model-loader")
        self._loading = asyncio.Lock()
        self._lanes: dict[str, BackboneLane] = {}  # by digest
        self._linear: LinearLane | None = None
        self._backbones: dict[str, ServedModel] = {}
        self._served: dict[Key, ServedModel] = {}
        self._aliases: dict[AliasKey, int] = {}
        self._failed: dict[Key, tuple[str, float]] = {}  # why, and when it is worth another try
        self._snapshot = RegistrySnapshot(epoch=-1, aliases={}, versions={})
        self._background: set[asyncio.Task[Any]] = set()
        self.is_started = False  # backbones and the registry's aliased versions are in place
        self.has_failed = False

    # Life

    async def add_backbone(self, name: str, backbone: Backbone) -> None:
        """Loads and warms a backbone, which then answers embeddings. Raises `ModelingError`."""
        lane = await self._lane_of(backbone)
        model = self._backbones[name] = ServedModel(
            tenant="",
            name=name,
            version=None,
            task=_BACKBONE_TASK,
            labels=(),
            lane=lane,
            normalize_embedding=backbone.info.normalize,
            owns_weights=True,
        )
        self._metrics.start_model(name, "", _BACKBONE_TASK.name, backbone=name, engine=lane.engine_name)
        self._metrics.set_model_state(name, "", _BACKBONE_TASK.name, state="ready")
        self._metrics.model_memory_bytes.labels(name, "", _BACKBONE_TASK.name).set(model.own_bytes)

    async def stop(self) -> None:
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        lanes: list[Lane] = [*self._lanes.values(), *([self._linear] if self._linear else [])]
        await asyncio.gather(*(lane.batcher.stop() for lane in lanes))
        await asyncio.to_thread(self._loader.shutdown, wait=True, cancel_futures=True)

    # For requests

    @contextlib.contextmanager
    def lease(self, tenant: str, ref: ModelRef) -> Iterator[ServedModel]:
        """The model that `ref` means now, held until the block ends. Raises `ModelNotFound`, `ModelNotReady`."""
        model = self._find(tenant, ref)
        model.acquire()
        try:
            yield model
        finally:
            model.release()

    def labels_of(self, tenant: str, ref: ModelRef) -> tuple[str, str, str]:
        """Metric labels of what `ref` means now; empty for what is not loaded, so that callers cannot invent series."""
        if ref.alias == "champion" and ref.name in self._backbones:
            return self._backbones[ref.name].metric_labels
        version = ref.version
        if version is None:
            version = self._aliases.get((tenant, ref.name, ref.alias or ""))
        model = None if version is None else self._served.get((tenant, ref.name, version))
        return ("", "", "") if model is None else model.metric_labels

    def _find(self, tenant: str, ref: ModelRef) -> ServedModel:
        if ref.alias == "champion" and ref.name in self._backbones:
            return self._backbones[ref.name]
        version = ref.version
        if version is None:
            assert ref.alias is not None
            alias_key = (tenant, ref.name, ref.alias)
            version = self._aliases.get(alias_key, self._snapshot.aliases.get(alias_key))
        if version is None or (tenant, ref.name, version) not in self._snapshot.versions:
            raise ModelNotFound(f"there is no model {str(ref)!r}")
        key = (tenant, ref.name, version)
        if key in self._served:
            return self._served[key]
        reason, pause_s = self._failure(key)
        if pause_s > 0:
            raise ModelNotReady(f"{ref.name}:{version} could not be loaded: {reason}", retry_after_s=pause_s)
        self._in_background(self._load_quietly(key))
        raise ModelNotReady(f"{ref.name}:{version} is being loaded", retry_after_s=1.0)

    def _failure(self, key: Key) -> tuple[str, float]:
        """Why a version did not load, and in how many seconds it is worth another try; 0 or less: now."""
        reason, retry_at = self._failed.get(key, ("", 0.0))
        return reason, retry_at - time.monotonic()

    # For operators

    def backbones(self) -> dict[str, ServedModel]:
        return dict(self._backbones)

    def state_of(self, tenant: str, name: str, version: int) -> tuple[str, str | None]:
        """State of a version here and, where it failed, the reason; `unloaded` if nobody asked for it."""
        key = (tenant, name, version)
        if key in self._served:
            return self._served[key].state, None
        if key in self._failed:
            return "failed", self._failed[key][0]
        return "unloaded", None

    def engine_of(self, tenant: str, name: str, version: int) -> str | None:
        model = self._served.get((tenant, name, version))
        return None if model is None else model.lane.engine_name

    def measurements(self, digest: str) -> list[EngineMeasurement]:
        """What engines measured for these weights, on every device that shares the database; blocking."""
        return self._selector.measurements([digest])

    def lanes(self) -> list[Lane]:
        return [*self._lanes.values(), *([self._linear] if self._linear else [])]

    # Following the registry

    async def apply(self, snapshot: RegistrySnapshot) -> None:
        """Makes the aliased versions of `snapshot` serve: load, warm, swap each, then drain what nobody points at."""
        self._snapshot = snapshot
        for alias_key, version in snapshot.aliases.items():
            key = (alias_key[0], alias_key[1], version)
            if key not in self._served and not await self._load_quietly(key):
                continue  # the alias stays where it was
            self._aliases[alias_key] = version
        for gone in set(self._aliases) - set(snapshot.aliases):
            del self._aliases[gone]
        self._release_unused()

    async def ensure(self, tenant: str, name: str, version: ModelVersion) -> None:
        """Loads a version ahead of an alias that will point at it. Raises what keeps it from loading."""
        key = (tenant, name, version.version)
        if key not in self._served:
            await self._load(key, version)

    def _release_unused(self) -> None:
        """Over the memory budget, unloads what no alias needs, the least recently used first."""
        pinned = self._pinned()
        total = sum(model.own_bytes for model in self._served.values())
        idle = sorted((m for m in self._served.values() if m.key not in pinned), key=lambda model: model.used_at)
        for model in idle:
            if total <= self._memory_budget_bytes:
                return
            total -= model.own_bytes
            self._metrics.adapter_evictions_total.inc()
            self._in_background(self._unload(model))

    async def _unload(self, model: ServedModel) -> None:
        assert model.version is not None
        self._served.pop((model.tenant, model.name, model.version), None)
        model.state = "draining"
        self._metrics.set_model_state(*model.metric_labels, state="draining")
        await model.drained()
        model.state = "unloading"
        if isinstance(model.lane, BackboneLane):
            if model.adapter_key is not None:
                async with self._loading:  # not while its lane changes engines
                    model.lane.engine.unload_adapter(model.adapter_key)
            if model.parts is not None and model.parts.backbone is not None:
                await self._close_lane(model.lane)
        self._metrics.stop_model(*model.metric_labels)

    async def _close_lane(self, lane: BackboneLane) -> None:
        digest = lane.backbone.info.digest
        if not any(other.lane is lane for other in [*self._served.values(), *self._backbones.values()]):
            self._lanes.pop(digest, None)
            await lane.batcher.stop()
            reconsider()

    # Loading

    async def _load_quietly(self, key: Key) -> bool:
        version = self._snapshot.versions.get(key)
        if key in self._served:
            return True
        if version is None or self._failure(key)[1] > 0:
            return False
        try:
            await self._load(key, version)
        except (RegistryError, ModelingError, InferenceError) as error:
            _log.warning(f"{key[1]}:{key[2]} could not be loaded: {error}", extra={"action": "load_failed"})
            return False
        return True

    async def _load(self, key: Key, version: ModelVersion) -> None:
        async with self._loading:
            if key in self._served:
                return
            labels = (key[1], str(key[2]), version.task)
            started = time.monotonic()
            self._metrics.start_model(*labels)
            self._metrics.set_model_state(*labels, state="loading")
            try:
                model = await self._assemble(key, version)
            except Exception as error:
                reason = (
                    str(error)
                    if isinstance(error, RegistryError | ModelingError | InferenceError)
                    else type(error).__name__
                )
                # An engine that is out of order says itself how soon to come back.
                pause_s = (error.retry_after_s if isinstance(error, ModelNotReady) else None) or _RETRY_FAILED_S
                self._failed[key] = (reason[:500], time.monotonic() + pause_s)
                self._metrics.set_model_state(*labels, state="failed")
                if isinstance(error, RegistryError | ModelingError | InferenceError):
                    raise
                _log.exception("loading failed", extra={"action": "load_failed"})
                raise ArtifactError(f"{key[1]}:{key[2]} could not be loaded ({reason})") from error
            self._failed.pop(key, None)
            self._served[key] = model
            backbone = model.lane.batcher.name[0]
            self._metrics.start_model(*labels, backbone=backbone, engine=model.lane.engine_name)
            self._metrics.set_model_state(*labels, state="ready")
            self._metrics.model_memory_bytes.labels(*labels).set(model.own_bytes)
            self._metrics.adapter_loads_total.inc()
            if isinstance(model.lane, BackboneLane):
                self._metrics.adapter_slots_bytes.labels(backbone).set(model.lane.engine.memory().slots)
            self._metrics.adapter_load_duration_seconds.observe(time.monotonic() - started)
            self._release_unused()

    async def _assemble(self, key: Key, version: ModelVersion) -> ServedModel:
        tenant, name, number = key
        loop = asyncio.get_running_loop()

        def read() -> VersionParts:
            manifest = load_manifest(
                self._store, tenant=tenant, name=name, version=number, sha256=version.manifest_sha256
            )
            parts = read_version(self._store, manifest)
            self._check_room(parts)
            return parts

        parts = await loop.run_in_executor(self._loader, read)
        lane = await self._lane_for(parts)
        model = ServedModel(
            tenant=tenant,
            name=name,
            version=number,
            task=parts.task,
            labels=parts.manifest.labels,
            lane=lane,
            # The engine keeps the adapter's weights; a second copy here would only cost memory.
            parts=replace(parts, adapter=None),
            calibration=parts.calibration,
            max_length=parts.max_length,
            state="warming",
            adapter_key=f"{tenant}/{name}/{number}" if parts.adapter else None,
            owns_weights=parts.backbone is not None,
        )
        try:
            await self._warm_or_reopen(model, parts.adapter)
        except BaseException:
            await self._discard(model)
            raise
        model.state = "ready"
        return model

    def _check_room(self, parts: VersionParts) -> None:
        """Raises `MemoryBudgetExceeded` where a version would not fit even with all others gone that may go."""
        manifest = parts.manifest
        weights = (entry for entry in manifest.files if entry.path.startswith("full/"))
        needed = parts.own_bytes + sum(entry.size for entry in weights)
        pinned = self._pinned()
        held = sum(model.own_bytes for model in list(self._served.values()) if model.key in pinned)
        if held + needed > self._memory_budget_bytes:
            raise MemoryBudgetExceeded(
                f"{manifest.name}:{manifest.version} needs {needed} bytes, versions with an alias hold {held} of the "
                f"{self._memory_budget_bytes} allowed; remove an alias or raise memory_budget_bytes"
            )

    def _pinned(self) -> set[tuple[str, str, int | None]]:
        """Versions that an alias points at."""
        return {(tenant, name, version) for (tenant, name, _), version in self._aliases.items()}

    async def _warm_or_reopen(self, model: ServedModel, adapter: Adapter | None) -> None:
        """A version's own weights may begin on an engine that was only measured for their like: where that one gives
        other answers, the reference serves."""
        lane = model.lane
        try:
            await self._warm(model, adapter)
        except GoldenRowsDiffer as error:
            if not (model.owns_weights and isinstance(lane, BackboneLane)) or lane.engine_name == str(REFERENCE):
                raise
            _log.warning(f"{model.name}:{model.version}: {error}", extra={"action": "engine_fallback"})
            self._metrics.count_engine_fallback(
                lane.batcher.name[0], lane.engine_name, to_engine=str(REFERENCE), reason=type(error).__name__
            )
            open_reference = functools.partial(self._selector.open, REFERENCE, lane.backbone)
            engine = await asyncio.get_running_loop().run_in_executor(self._loader, open_reference)
            await lane.switch(engine, {})
            await self._warm(model, adapter)

    async def _warm(self, model: ServedModel, adapter: Adapter | None) -> None:
        """Runs the golden rows as requests would run, on the engine's own thread."""
        parts, lane = model.parts, model.lane
        assert parts is not None
        if isinstance(lane, LinearLane):
            linear = parts.linear
            assert linear is not None
            await lane.batcher.call(lambda: check_golden(parts, lambda texts: linear.margins([str(t) for t in texts])))
            return
        assert isinstance(lane, BackboneLane) and parts.head is not None
        if parts.head.input_size != lane.backbone.info.hidden_size:
            raise ArtifactError(
                f"the head takes {parts.head.input_size} values, the backbone gives {lane.backbone.info.hidden_size}"
            )
        engine = lane.engine
        if adapter is not None and model.adapter_key is not None:
            load = functools.partial(engine.load_adapter, model.adapter_key, adapter)
            await asyncio.get_running_loop().run_in_executor(self._loader, load)
        logits = []
        for row in parts.golden:  # one at a time: requests wait for no more than one row of it
            started = time.monotonic()
            logits.append(await lane.batcher.call(functools.partial(_golden_logits, model, engine, [row.text])))
            if lane.batcher.is_in_demand:
                await asyncio.sleep(_YIELD * (time.monotonic() - started))
        compare_golden(parts, np.concatenate(logits or [np.zeros((0, 0), np.float32)]), precision=engine.precision)

    async def _discard(self, model: ServedModel) -> None:
        if isinstance(model.lane, BackboneLane):
            if model.adapter_key is not None:
                model.lane.engine.unload_adapter(model.adapter_key)
            await self._close_lane(model.lane)

    async def _lane_for(self, parts: VersionParts) -> Lane:
        if parts.linear is not None:
            if self._linear is None:
                self._linear = LinearLane(self._metrics, self._limits, record=self._batch_log)
                self._linear.batcher.start()
            return self._linear
        if parts.backbone is not None:
            # Weights of its own: a label of its own, or closing it would remove the shared backbone's series.
            info = parts.backbone.info
            return await self._lane_of(parts.backbone, label=f"{info.name}-{info.digest[:8]}")
        base = parts.manifest.base
        if base is None:
            raise ArtifactError("the manifest names no backbone")
        if base.digest in self._lanes:
            return self._lanes[base.digest]
        return await self._lane_of(Backbone.open(self._store.local_path(backbone_prefix(base.digest))))

    async def _lane_of(self, backbone: Backbone, *, label: str | None = None) -> BackboneLane:
        digest = backbone.info.digest
        if digest not in self._lanes:
            loop = asyncio.get_running_loop()
            like = self._same_shape(backbone)
            engine, is_final = await loop.run_in_executor(
                self._loader, functools.partial(self._selector.open_first, backbone, like=like)
            )
            lane = BackboneLane(
                backbone,
                engine,
                self._metrics,
                self._limits,
                label=label or backbone.info.name,
                record=self._batch_log,
            )
            lane.batcher.start()
            lane.batcher.supervisor.on_engine_failed = lambda reason: self._in_background(self._fall_back(lane, reason))
            await lane.measure()
            self._lanes[digest] = lane
            self._show_engine(lane)
            if not is_final:
                self._in_background(self._improve(lane, like=like))
        return self._lanes[digest]

    def _same_shape(self, backbone: Backbone) -> Backbone | None:
        """A configured backbone whose measurements hold for these weights too: speed depends on the shape alone."""
        for model in self._backbones.values():
            assert isinstance(model.lane, BackboneLane)
            other = model.lane.backbone
            if backbone.info.runs_like(other.info):
                return other
        return None

    async def _improve(self, lane: BackboneLane, *, like: Backbone | None) -> None:
        """Measures what else could run this backbone and changes to it. The first engine serves meanwhile."""
        label = lane.batcher.name[0]
        try:
            choice = await self._selector.select(lane.backbone, like=like)
            _log.info(f"{choice.engine} is chosen; {choice.refused}", extra={"action": "engine_chosen"})
            if choice.engine != lane.engine_name:
                await self._change_engine(lane, EngineSpec.parse(choice.engine))
            self._show_engine(lane)
            if self._selector.policy.engine not in {"auto", lane.engine.name}:
                raise EngineFailed("; ".join(f"{name}: {why}" for name, why in choice.refused.items()))
        except Exception as error:
            _log.warning(f"{label} stays on {lane.engine_name}: {error}", extra={"action": "engine_fallback"})
            self._metrics.count_engine_fallback(
                label, self._selector.policy.engine, to_engine=lane.engine_name, reason=type(error).__name__
            )

    async def _fall_back(self, lane: BackboneLane, reason: str) -> None:
        """The reference takes over from an engine that fails while it serves. From the reference there is no way on:
        its check is repeated until it passes."""
        label, before = lane.batcher.name[0], lane.engine_name
        if before == str(REFERENCE):
            return
        self._metrics.count_engine_fallback(label, before, to_engine=str(REFERENCE), reason="EngineFailed")
        try:
            await self._change_engine(lane, REFERENCE)
        except Exception as error:
            _log.exception(
                f"{label} cannot fall back from {before} ({reason}): {error}", extra={"action": "engine_fallback"}
            )
            return
        self._show_engine(lane)
        _log.warning(f"{label} fell back from {before}: {reason}", extra={"action": "engine_fallback"})

    async def _change_engine(self, lane: BackboneLane, spec: EngineSpec) -> None:
        label, before = lane.batcher.name[0], lane.engine_name
        engine = await asyncio.get_running_loop().run_in_executor(
            self._loader, self._selector.open, spec, lane.backbone
        )
        async with self._loading:
            users = [model for model in (*self._served.values(), *self._backbones.values()) if model.lane is lane]
            adapters = await asyncio.get_running_loop().run_in_executor(self._loader, self._adapters_of, users)
            await lane.switch(engine, adapters)
            for model in users:
                self._metrics.start_model(*model.metric_labels, backbone=label, engine=lane.engine_name)
                self._metrics.model_memory_bytes.labels(*model.metric_labels).set(model.own_bytes)
        reconsider()
        await lane.measure()
        _log.info(f"{spec} serves instead of {before}", extra={"action": "engine_switched", "backbone": label})

    def _show_engine(self, lane: BackboneLane) -> None:
        """What was measured, and what the slots take."""
        label, metrics = lane.batcher.name[0], self._metrics
        metrics.adapter_slots_bytes.labels(label).set(lane.engine.memory().slots)
        measurement = self._selector.measured_here(lane.backbone.info.digest)
        for row in [] if measurement is None else measurement.engines:
            metrics.set_engine_report(
                label,
                row["engine"],
                is_serving=row["engine"] == lane.engine_name,
                texts_per_s=row["texts_per_s"],
                flips=row["flips"],
                min_cosine=row["min_cosine"],
                max_abs_dp=row["max_abs_dp"],
            )

    def _adapters_of(self, models: Sequence[ServedModel]) -> dict[str, Adapter]:
        """Read anew: the engine in use holds them in its own precision."""
        return {
            model.adapter_key: read_adapter(self._store, model.parts.manifest)
            for model in models
            if model.adapter_key is not None and model.parts is not None
        }

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _golden_logits(model: ServedModel, engine: Engine, texts: Sequence[TextInput]) -> FloatArray:
    assert model.parts is not None and model.parts.head is not None
    work = model.lane.preprocess(texts, truncate=True, max_length=model.max_length)
    keys = [model.adapter_key] * len(work) if model.adapter_key else None
    return model.parts.head.logits(engine.run(EngineBatch(work, keys)))
