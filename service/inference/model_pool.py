"""Which models are in memory. Loads, warms, swaps and drains them; requests only take leases.

The pool's tables change on the event loop alone. A version is loaded beside the one that serves and
takes over when it has reproduced its golden rows; if it cannot, the old one goes on serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_registry.errors import ArtifactError, ModelNotFound, RegistryError
from model_registry.manifest import backbone_prefix
from model_registry.refs import ModelRef
from model_registry.registry import ModelVersion, RegistrySnapshot
from model_registry.store import ArtifactStore, load_manifest
from modeling.assemble import VersionParts, check_golden, read_version
from modeling.backbone import Backbone
from modeling.engines.protocol import Engine, EngineBatch
from modeling.errors import ModelingError
from modeling.preprocess import TextInput
from modeling.weights import FloatArray
from service.inference.errors import ModelNotReady
from service.inference.lanes import BackboneLane, BatchLimits, Lane, LinearLane, build_onnx
from service.inference.served import ServedModel
from service.metrics import ServingMetrics

_log = logging.getLogger("service.model_pool")
_RETRY_FAILED_S = 60.0
_BACKBONE_TASK = "feature-extraction"

Key = tuple[str, str, int]
AliasKey = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    """How engines are built: `engine` names the runtime that shared backbones should end on."""

    engine: str
    device: str
    threads: int
    onnx_folder: Path
    memory_budget_bytes: int
    make_engine: Callable[[Backbone], Engine]


class ModelPool:
    def __init__(
        self, store: ArtifactStore, policy: EnginePolicy, limits: BatchLimits, metrics: ServingMetrics
    ) -> None:
        self._store, self._policy, self._limits, self._metrics = store, policy, limits, metrics
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="model-loader")
        self._loading = asyncio.Lock()
        self._lanes: dict[str, BackboneLane] = {}  # by digest
        self._linear: LinearLane | None = None
        self._backbones: dict[str, ServedModel] = {}
        self._served: dict[Key, ServedModel] = {}
        self._aliases: dict[AliasKey, int] = {}
        self._failed: dict[Key, tuple[str, float]] = {}
        self._snapshot = RegistrySnapshot(epoch=-1, aliases={}, versions={})
        self._background: set[asyncio.Task[Any]] = set()
        self.is_started = False  # backbones and the registry's aliased versions are in place
        self.has_failed = False

    # Life

    async def add_backbone(self, name: str, backbone: Backbone) -> None:
        """Loads and warms a backbone, which then answers embeddings. Raises `ModelingError`."""
        lane = await self._lane_of(backbone)
        self._backbones[name] = ServedModel(
            tenant="", name=name, version=None, task=_BACKBONE_TASK, labels=(), lane=lane,
            normalize_embedding=backbone.info.normalize, own_bytes=lane.memory_bytes(),
        )  # fmt: skip
        self._metrics.start_model(name, "", _BACKBONE_TASK, backbone=name, engine=lane.engine_name)
        self._metrics.set_model_state(name, "", _BACKBONE_TASK, state="ready")
        self._metrics.model_memory_bytes.labels(name, "", _BACKBONE_TASK).set(lane.memory_bytes())
        if self._policy.engine == "onnx":
            self._in_background(self._switch_to_onnx(lane))

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
        failure = self._failed.get(key)
        if failure is not None and time.monotonic() - failure[1] < _RETRY_FAILED_S:
            raise ModelNotReady(
                f"{ref.name}:{version} could not be loaded: {failure[0]}", retry_after_s=_RETRY_FAILED_S
            )
        self._in_background(self._load_quietly(key))
        raise ModelNotReady(f"{ref.name}:{version} is being loaded", retry_after_s=1.0)

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
        """Over the memory budget, what no alias needs goes, the least recently used first."""
        pinned = {(tenant, name, version) for (tenant, name, _), version in self._aliases.items()}
        total = sum(model.own_bytes for model in self._served.values())
        idle = sorted((m for m in self._served.values() if m.key not in pinned), key=lambda model: model.used_at)
        for model in idle:
            if total <= self._policy.memory_budget_bytes:
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
                lane, adapter_key = model.lane, model.adapter_key
                await lane.batcher.call(lambda: lane.adapter_engine.unload_adapter(adapter_key))
            if model.parts is not None and model.parts.backbone is not None:
                await self._close_lane(model.lane)
        self._metrics.stop_model(*model.metric_labels)

    async def _close_lane(self, lane: BackboneLane) -> None:
        digest = lane.backbone.info.digest
        if not any(other.lane is lane for other in [*self._served.values(), *self._backbones.values()]):
            self._lanes.pop(digest, None)
            await lane.batcher.stop()

    # Loading

    async def _load_quietly(self, key: Key) -> bool:
        version = self._snapshot.versions.get(key)
        if key in self._served:
            return True
        failure = self._failed.get(key)
        if version is None or (failure is not None and time.monotonic() - failure[1] < _RETRY_FAILED_S):
            return False
        try:
            await self._load(key, version)
        except (RegistryError, ModelingError) as error:
            _log.warning(f"{key[1]}:{key[2]} could not be loaded: {error}", extra={"action": "load_failed"})
            return False
        return True

    async def _load(self, key: Key, version: ModelVersion) -> None:
        async with self._loading:
            if key in self._served:
                return
            labels = (key[1], str(key[2]), "text-classification")
            started = time.monotonic()
            self._metrics.start_model(*labels)
            self._metrics.set_model_state(*labels, state="loading")
            try:
                model = await self._assemble(key, version)
            except Exception as error:
                reason = str(error) if isinstance(error, RegistryError | ModelingError) else type(error).__name__
                self._failed[key] = (reason[:500], time.monotonic())
                self._metrics.set_model_state(*labels, state="failed")
                if isinstance(error, RegistryError | ModelingError):
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
            self._metrics.adapter_load_duration_seconds.observe(time.monotonic() - started)
            self._release_unused()

    async def _assemble(self, key: Key, version: ModelVersion) -> ServedModel:
        tenant, name, number = key
        loop = asyncio.get_running_loop()

        def read() -> VersionParts:
            manifest = load_manifest(
                self._store, tenant=tenant, name=name, version=number, sha256=version.manifest_sha256
            )
            return read_version(self._store, manifest)

        parts = await loop.run_in_executor(self._loader, read)
        lane = await self._lane_for(parts)
        own_bytes = parts.own_bytes
        if parts.backbone is not None and isinstance(lane, BackboneLane):
            own_bytes += lane.memory_bytes()
        model = ServedModel(
            tenant=tenant, name=name, version=number, task=parts.manifest.task, labels=parts.manifest.labels, lane=lane,
            parts=parts, max_length=parts.max_length, own_bytes=own_bytes, state="warming",
            adapter_key=f"{tenant}/{name}/{number}" if parts.adapter else None,
        )  # fmt: skip
        try:
            await self._warm(model)
        except BaseException:
            await self._discard(model)
            raise
        model.state = "ready"
        return model

    async def _warm(self, model: ServedModel) -> None:
        """Runs the golden rows as requests would run, on the engine's own thread."""
        parts, lane = model.parts, model.lane
        assert parts is not None
        if isinstance(lane, LinearLane):
            linear = parts.linear
            assert linear is not None
            await lane.batcher.call(lambda: check_golden(parts, lambda texts: linear.margins([str(t) for t in texts])))
            return
        assert isinstance(lane, BackboneLane) and parts.head is not None
        head, backbone_lane = parts.head, lane
        if head.input_size != lane.backbone.info.hidden_size:
            raise ArtifactError(
                f"the head takes {head.input_size} values, the backbone gives {lane.backbone.info.hidden_size}"
            )

        def run() -> None:
            if parts.adapter is not None and model.adapter_key is not None:
                backbone_lane.adapter_engine.load_adapter(model.adapter_key, parts.adapter)
            engine = backbone_lane.engine_for(model.adapter_key)

            def logits(texts: Sequence[TextInput]) -> FloatArray:
                work = backbone_lane.preprocess(texts, truncate=True, max_length=model.max_length)
                keys = [model.adapter_key] * len(work) if model.adapter_key else None
                return head.logits(engine.run(EngineBatch(work, keys)))

            check_golden(parts, logits, precision=engine.precision)

        await lane.batcher.call(run)

    async def _discard(self, model: ServedModel) -> None:
        lane = model.lane
        if isinstance(lane, BackboneLane):
            if model.adapter_key is not None:
                adapter_key = model.adapter_key
                await lane.batcher.call(lambda: lane.adapter_engine.unload_adapter(adapter_key))
            await self._close_lane(lane)

    async def _lane_for(self, parts: VersionParts) -> Lane:
        if parts.linear is not None:
            if self._linear is None:
                self._linear = LinearLane(self._metrics, self._limits)
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
            engine = await loop.run_in_executor(self._loader, self._policy.make_engine, backbone)
            lane = BackboneLane(backbone, engine, self._metrics, self._limits, label=label or backbone.info.name)
            lane.batcher.start()
            work = await loop.run_in_executor(
                self._loader, lambda: lane.preprocess(["warm up"], truncate=True, max_length=None)
            )
            await lane.batcher.call(lambda: engine.run(EngineBatch(work)))
            self._lanes[digest] = lane
        return self._lanes[digest]

    async def _switch_to_onnx(self, lane: BackboneLane) -> None:
        """Torch serves meanwhile; a failure is said and leaves it serving."""
        loop, policy, name = asyncio.get_running_loop(), self._policy, lane.backbone.info.name
        try:
            engine, difference = await loop.run_in_executor(
                self._loader,
                lambda: build_onnx(lane, policy.onnx_folder, device=policy.device, threads=policy.threads),
            )
        except Exception as error:
            _log.warning(f"onnx is not used: {error}", extra={"action": "engine_fallback", "backbone": name})
            self._metrics.count_engine_fallback(name, "onnx", to_engine="torch", reason=type(error).__name__)
            return
        await lane.batcher.call(lambda: setattr(lane, "fast_engine", engine))
        lane.engine_name = engine.name
        self._metrics.engine_parity_max_abs_diff.labels(name, engine.name).set(difference)
        _log.info("onnx serves", extra={"action": "engine_switched", "backbone": name})

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
