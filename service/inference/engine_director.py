"""Opens lanes, improves the engine under each, falls back from one that fails, and closes what no model runs on.

`EngineSelector` knows engines; here is which lane runs on which, and how one takes over from another under traffic.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any

from model_registry.errors import ArtifactError
from model_registry.spare_time import beside_requests
from model_registry.store import ArtifactStore
from modeling.adapters import Adapter
from modeling.assemble import read_adapter
from modeling.backbone import Backbone
from modeling.engines.build import REFERENCE, EngineSpec
from modeling.errors import EngineFailed, ModelingError
from service.inference.batch_log import BatchLog
from service.inference.engine_selection import EngineSelector
from service.inference.engine_worker import BatchLimits, Runtime
from service.inference.lanes import BackboneLane, Lane, LinearLane, ServedModel
from service.metrics import ServingMetrics

_log = logging.getLogger("service.engine_director")


class EngineDirector:
    """One per process. While `steady` is held no lane changes its engine, and no lane, model or adapter comes or goes:
    loads hold it."""

    def __init__(
        self,
        selector: EngineSelector,
        store: ArtifactStore,
        limits: BatchLimits,
        metrics: ServingMetrics,
        *,
        executor: Executor,
        batch_log: BatchLog | None,
        runtime: Runtime,
    ) -> None:
        self.selector, self._store, self._limits, self._metrics = selector, store, limits, metrics
        self._executor, self._batch_log, self._runtime = executor, batch_log, runtime
        self.opened: dict[str, BackboneLane] = {}  # by digest
        self._configured: set[Lane] = set()
        self._users: dict[Lane, set[ServedModel]] = {}
        self._linear: LinearLane | None = None
        self._background: set[asyncio.Task[None]] = set()
        self.reasons: dict[str, str] = {}
        """Why weights, by digest, stay on another engine than the settings ask for."""
        self.steady = asyncio.Lock()

    def lanes(self) -> list[Lane]:
        return [*self.opened.values(), *([self._linear] if self._linear else [])]

    @property
    def is_in_demand(self) -> bool:
        """Whether any lane has lately computed a batch: all share the processor."""
        return any(lane.worker.is_in_demand for lane in self.lanes())

    async def stop(self) -> None:
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(lane.worker.stop() for lane in self.lanes()))

    async def idle(self) -> None:
        """Returns once no lane is about to change its engine."""
        while self._background:
            await asyncio.wait(list(self._background))

    # Opening and closing

    async def configured(self, backbone: Backbone) -> BackboneLane:
        """The lane of a configured backbone, which is never closed. Raises `ModelingError`."""
        async with self.steady:
            lane = await self._open(backbone, label=backbone.info.name)
        self._configured.add(lane)
        return lane

    def is_configured(self, lane: Lane) -> bool:
        return lane in self._configured

    def linear(self) -> LinearLane:
        """The lane of all baselines."""
        if self._linear is None:
            self._linear = LinearLane(self._metrics, self._limits, record=self._batch_log, runtime=self._runtime)
            self._linear.worker.start()
        return self._linear

    async def lane_of(self, backbone: Backbone) -> BackboneLane:
        """The lane of these weights, opened and measured unless it is there. Needs `steady`. Raises `ModelingError`."""
        # Not the backbone's name alone: closing the lane would remove the series of a configured one of that name.
        return await self._open(backbone, label=f"{backbone.info.name}-{backbone.info.digest[:8]}")

    async def _open(self, backbone: Backbone, *, label: str) -> BackboneLane:
        digest = backbone.info.digest
        if digest in self.opened:
            return self.opened[digest]
        like_lane = self._same_shape(backbone)
        like = None if like_lane is None else like_lane.backbone
        engine, is_final = await self.run(functools.partial(self.selector.open_first, backbone, like=like))
        lane = BackboneLane(
            backbone,
            engine,
            self._metrics,
            self._limits,
            label=label,
            record=self._batch_log,
            runtime=self._runtime,
        )
        lane.worker.start()
        lane.worker.supervisor.on_engine_failed = lambda reason: self._in_background(self._fall_back(lane, reason))
        try:
            if like_lane is None or not lane.costs_as(like_lane):
                await lane.measure()
        except BaseException:
            await lane.close()
            raise
        self.opened[digest] = lane
        self._show(lane)
        if not is_final:
            self._in_background(self._improve(lane, like=like))
        return lane

    def attach(self, model: ServedModel) -> None:
        """The model runs on its lane, which stays open as long."""
        self._users.setdefault(model.lane, set()).add(model)

    async def detach(self, model: ServedModel) -> None:
        """No request uses the model any more: its adapter goes, and with the last model its lane."""
        async with self.steady:
            await self.detach_steadily(model)

    async def detach_steadily(self, model: ServedModel) -> None:
        """As `detach`, for who holds `steady`."""
        lane = model.lane
        self._users[lane].discard(model)
        if not isinstance(lane, BackboneLane):
            return
        if model.adapter_key is not None:
            lane.engine.unload_adapter(model.adapter_key)
        if not self.is_configured(lane) and not self._users[lane]:
            del self._users[lane], self.opened[lane.backbone.info.digest]
            self.reasons.pop(lane.backbone.info.digest, None)
            await lane.close()

    def _same_shape(self, backbone: Backbone) -> BackboneLane | None:
        """A configured lane whose measurements hold for these weights too: speed depends on the shape alone."""
        configured = (lane for lane in self.opened.values() if self.is_configured(lane))
        return next((lane for lane in configured if backbone.info.runs_like(lane.backbone.info)), None)

    # Changing engines

    async def use_reference(self, lane: BackboneLane, reason: Exception) -> None:
        """The reference takes over on a lane that holds no adapters yet. Needs `steady`. Raises `ModelingError`."""
        self._count_fallback(lane, lane.engine_name, type(reason).__name__, to_engine=str(REFERENCE))
        await lane.switch(await self.run(functools.partial(self.selector.open, REFERENCE, lane.backbone)), {})

    async def _improve(self, lane: BackboneLane, *, like: Backbone | None) -> None:
        """Measures what else could run this backbone and changes to it. The first engine serves meanwhile."""
        label, policy = lane.worker.name[0], self.selector.policy
        try:
            choice = await self.selector.select(lane.backbone, like=like, in_demand=lambda: self.is_in_demand)
            _log.info(f"{choice.engine} is chosen; {choice.refused}", extra={"action": "engine_chosen"})
            if choice.engine != lane.engine_name:
                await self._change(lane, EngineSpec.parse(choice.engine))
            self._show(lane)
            if policy.engine not in {"auto", lane.engine.name}:
                refused = "; ".join(f"{name}: {why}" for name, why in choice.refused.items())
                raise EngineFailed(refused or f"no engine of {policy.engine} is installed for {policy.precision}")
        except Exception as error:
            self._explain(lane, error)
            _log.warning(f"{label} stays on {lane.engine_name}: {error}", extra={"action": "engine_fallback"})
            self._count_fallback(lane, policy.engine, type(error).__name__, to_engine=lane.engine_name)

    async def _fall_back(self, lane: BackboneLane, reason: str) -> None:
        """The reference takes over from an engine that fails while it serves. From the reference there is no way on:
        its check is repeated until it passes."""
        label, before = lane.worker.name[0], lane.engine_name
        if before == str(REFERENCE):
            return
        self._explain(lane, EngineFailed(f"{before} failed while it served: {reason}"))
        self._count_fallback(lane, before, "EngineFailed", to_engine=str(REFERENCE))
        try:
            await self._change(lane, REFERENCE)
        except Exception as error:
            message = f"{label} cannot fall back from {before} ({reason}): {error}"
            _log.exception(message, extra={"action": "engine_fallback"})
            return
        self._show(lane)
        _log.warning(f"{label} fell back from {before}: {reason}", extra={"action": "engine_fallback"})

    async def _change(self, lane: BackboneLane, spec: EngineSpec) -> None:
        label, before = lane.worker.name[0], lane.engine_name
        engine = await self.run(functools.partial(self.selector.open, spec, lane.backbone))
        async with self.steady:
            if self.opened.get(lane.backbone.info.digest) is not lane:
                raise EngineFailed("its last model has been unloaded")
            users = list(self._users[lane])
            await lane.switch(engine, await self.run(functools.partial(self._adapters_of, users)))
            for model in users:
                self._metrics.start_model(*model.metric_labels, backbone=label, engine=lane.engine_name)
                self._metrics.model_memory_bytes.labels(*model.metric_labels).set(model.own_bytes)
        await lane.measure()
        _log.info(f"{spec} serves instead of {before}", extra={"action": "engine_switched", "backbone": label})

    def _explain(self, lane: BackboneLane, error: Exception) -> None:
        """Keep why; what is no error of this project's may have a text with paths of this host."""
        known = isinstance(error, ModelingError | ArtifactError)
        self.reasons[lane.backbone.info.digest] = str(error)[:1000] if known else type(error).__name__

    def _adapters_of(self, models: Sequence[ServedModel]) -> dict[str, Adapter]:
        """Read anew: the engine in use holds them in its own precision."""
        return {
            model.adapter_key: read_adapter(self._store, model.parts.manifest)
            for model in models
            if model.adapter_key is not None and model.parts is not None
        }

    # Metrics

    def _show(self, lane: BackboneLane) -> None:
        """What was measured, and what the slots take."""
        label, metrics = lane.worker.name[0], self._metrics
        metrics.adapter_slots_bytes.labels(label).set(lane.engine.memory().slots)
        measurement = self.selector.known.get(lane.backbone.info.digest)
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

    def _count_fallback(self, lane: BackboneLane, from_engine: str, reason: str, *, to_engine: str) -> None:
        self._metrics.count_engine_fallback(lane.worker.name[0], from_engine, to_engine=to_engine, reason=reason)

    async def run(self, function: Callable[[], Any]) -> Any:
        """Runs it on the loader's thread; while requests are computed, its long computations in spare time."""
        work = functools.partial(beside_requests, function, are_waiting=self.is_in_demand)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
