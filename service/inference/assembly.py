"""Makes a model that serves of a version's files: reads and checks them, opens its lane, loads its adapter, and has it
reproduce its golden rows on the engine's own thread, beside the requests of others."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
from dataclasses import replace
from pathlib import Path

from model_registry.errors import ArtifactError
from model_registry.manifest import backbone_prefix
from model_registry.registry import ModelVersion
from model_registry.store import ArtifactStore, load_manifest
from modeling.assemble import VersionParts, check_golden, compare_golden, read_version
from modeling.backbone import Backbone
from modeling.engines.build import REFERENCE
from modeling.engines.protocol import EngineBatch
from modeling.errors import GoldenRowsDiffer
from modeling.heads import TaskHead
from modeling.inputs import Example
from modeling.tasks import FeatureExtraction
from modeling.weights import FloatArray
from service.inference.aliases import Key
from service.inference.engine_director import EngineDirector
from service.inference.lanes import BackboneLane, Lane, ServedModel, taken
from service.inference.residency import Residency
from service.metrics import ServingMetrics

_log = logging.getLogger("service.assembly")
_YIELD = 2.0  # under traffic, a pause of twice each golden row's time leaves requests two thirds of the engine


class Assembler:
    """One load at a time."""

    def __init__(
        self,
        store: ArtifactStore,
        engines: EngineDirector,
        residency: Residency,
        metrics: ServingMetrics,
    ) -> None:
        self._store, self._engines, self._residency, self._metrics = store, engines, residency, metrics
        self._load_ids = itertools.count(1)

    async def load(self, key: Key, version: ModelVersion) -> None:
        """The version is in memory and ready. Raises what is wrong with it or its engine, and then leaves nothing."""
        async with self._engines.steady:
            labels, started = (key[1], str(key[2]), version.task, key[0]), time.monotonic()
            self._metrics.start_model(*labels)
            self._metrics.set_model_state(*labels, state="loading")
            try:
                model = await self._assemble(key, version)
            except Exception:
                self._metrics.set_model_state(*labels, state="failed")
                raise
            self._residency.add(key, model)
            self._show(model)
            self._metrics.adapter_load_duration_seconds.observe(time.monotonic() - started)

    async def load_backbone(self, name: str, backbone: Backbone) -> ServedModel:
        """A configured backbone, which answers embeddings. Raises `ModelingError`."""
        lane = await self._engines.configured(backbone)
        model = ServedModel(
            tenant="",
            name=name,
            version=None,
            task=FeatureExtraction("feature-extraction", backbone.info.modality),
            labels=(),
            lane=lane,
            normalize_embedding=backbone.info.normalize,
            prompts=backbone.prompts,
            owns_weights=True,
        )
        self._engines.attach(model)
        self._metrics.start_model(*model.metric_labels, backbone=name, engine=lane.engine_name)
        self._metrics.set_model_state(*model.metric_labels, state="ready")
        self._metrics.model_memory_bytes.labels(*model.metric_labels).set(model.own_bytes)
        return model

    def _show(self, model: ServedModel) -> None:
        labels, backbone = model.metric_labels, model.lane.worker.name[0]
        self._metrics.start_model(*labels, backbone=backbone, engine=model.lane.engine_name)
        self._metrics.set_model_state(*labels, state="ready")
        self._metrics.model_memory_bytes.labels(*labels).set(model.own_bytes)
        self._metrics.adapter_loads_total.inc()
        if isinstance(model.lane, BackboneLane):
            self._metrics.adapter_slots_bytes.labels(backbone).set(model.lane.engine.memory().slots)

    async def _assemble(self, key: Key, version: ModelVersion) -> ServedModel:
        tenant, name, number = key
        check_room = functools.partial(self._residency.check_room, what=f"{name}:{number}")
        parts = await self._engines.run(functools.partial(self._read, key, version))
        folder = self._folder_to_open(parts)
        check_room(
            parts.own_bytes + (0 if folder is None else await self._engines.run(functools.partial(_weights, folder)))
        )
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
            prompts=lane.backbone.prompts if isinstance(lane, BackboneLane) else {},
            state="warming",
            # Another one each time: the version may come back while its last load still drains.
            adapter_key=f"{tenant}/{name}/{number}#{next(self._load_ids)}" if parts.adapter else None,
            owns_weights=parts.backbone is not None,
        )
        self._engines.attach(model)
        try:
            await self._warm_or_reopen(model, parts)
            check_room(model.own_bytes)
        except BaseException:
            await self._engines.detach_steadily(model)
            raise
        model.state = "ready"
        return model

    def _read(self, key: Key, version: ModelVersion) -> VersionParts:
        tenant, name, number = key
        sha256 = version.manifest_sha256
        manifest = load_manifest(self._store, tenant=tenant, name=name, version=number, sha256=sha256)
        return read_version(self._store, manifest)

    def _folder_to_open(self, parts: VersionParts) -> Path | None:
        """Of the backbone that this version needs and no lane runs yet."""
        if parts.backbone is not None:
            return parts.backbone.folder
        base = parts.manifest.base
        if parts.linear is not None or base is None or self._engines.opened.get(base.digest) is not None:
            return None
        return self._store.local_path(backbone_prefix(base.digest))

    async def _lane_for(self, parts: VersionParts) -> Lane:
        if parts.linear is not None:
            return self._engines.linear()
        if parts.backbone is not None:
            return await self._engines.lane_of(parts.backbone)
        base = parts.manifest.base
        if base is None:
            raise ArtifactError("the manifest names no backbone")
        opened = self._engines.opened.get(base.digest)
        if opened is not None:
            return opened
        return await self._engines.lane_of(Backbone.open(self._store.local_path(backbone_prefix(base.digest))))

    async def _warm_or_reopen(self, model: ServedModel, parts: VersionParts) -> None:
        """A version's own weights may begin on an engine that was only measured for their like: where that one gives
        other answers, the reference serves."""
        lane = model.lane
        try:
            await self._warm(model, parts)
        except GoldenRowsDiffer as error:
            if not (model.owns_weights and isinstance(lane, BackboneLane)) or lane.engine_name == str(REFERENCE):
                raise
            _log.warning(f"{model.name}:{model.version}: {error}", extra={"action": "engine_fallback"})
            await self._engines.use_reference(lane, error)
            await self._warm(model, parts)

    async def _warm(self, model: ServedModel, parts: VersionParts) -> None:
        """Runs the golden rows as requests would run. Raises `GoldenRowsDiffer`."""
        lane, head = model.lane, parts.head
        if parts.linear is not None:
            await lane.worker.call(functools.partial(check_golden, parts, parts.linear.margins))
            return
        assert isinstance(lane, BackboneLane) and head is not None
        if model.task.needs == "pooled" and head.input_size != lane.backbone.info.hidden_size:
            raise ArtifactError(
                f"the head takes {head.input_size} values, the backbone gives {lane.backbone.info.hidden_size}"
            )
        engine = lane.engine
        if parts.adapter is not None and model.adapter_key is not None:
            await self._engines.run(functools.partial(engine.load_adapter, model.adapter_key, parts.adapter))
        if model.task.needs == "states":
            await self._engines.run(functools.partial(lane.open_states, model.adapter_key))
        logits = []
        for row in parts.golden:  # one at a time: requests wait for no more than one row of it
            started = time.monotonic()
            logits.append(await lane.worker.call(functools.partial(_golden_logits, model, lane, head, row.example)))
            if self._engines.is_in_demand:
                await asyncio.sleep(_YIELD * (time.monotonic() - started))
        compare_golden(parts, logits, precision=engine.precision)


def _weights(folder: Path) -> int:
    """Bytes of a backbone's weights, by its files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _golden_logits(model: ServedModel, lane: BackboneLane, head: TaskHead, example: Example) -> FloatArray:
    ((work, *_),) = lane.preprocess(
        [example], truncate=True, max_length=model.max_length, in_windows=model.task.reads_windows
    )
    keys = [model.adapter_key] if model.adapter_key else None
    outputs = lane.engine.run(EngineBatch([work], keys, [0] if model.task.needs == "states" else ()))
    return head.logits(taken(outputs, [0], model.task.needs)[0])
