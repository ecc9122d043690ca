"""Builds the serving process from its settings: the one place that names concrete classes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path

from finetune.data.store import DatasetStore
from finetune.jobs.store import JobStore
from model_registry.db import Database
from model_registry.engine_reports import EngineReports
from model_registry.errors import DatabaseUnavailable
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest, locate, why_retrain
from modeling.engines.build import REFERENCE, EngineOptions, EngineSpec
from service.api.deps import Services
from service.api.guard import DrainState
from service.dataset_intake import DatasetIntake
from service.inference.batch_log import BatchLog
from service.inference.capacity import AdmissionController
from service.inference.engine_selection import EngineSelector, SelectionPolicy
from service.inference.engine_worker import BatchLimits
from service.inference.model_pool import ModelPool
from service.inference.predictor import Predictor
from service.inference.registry_watcher import RegistryWatcher
from service.metrics import ServingMetrics
from service.settings import ServingSettings

_log = logging.getLogger("service.wiring")
_JOB_COUNTS_EVERY_S = 2.0


@asynccontextmanager
async def build(settings: ServingSettings, drain: DrainState, metrics: ServingMetrics) -> AsyncIterator[Services]:
    """Opens everything; backbones load in the background, so that the probes answer meanwhile."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.resolved_database_url, busy_timeout_s=settings.database_timeout_s)
    await _migrate_when_there(database)
    store = FileStore(settings.data_dir / "store")
    registry, jobs, datasets = Registry(database), JobStore(database), DatasetStore(database)
    backbones: dict[str, Backbone] = {}
    async with AsyncExitStack() as stack:
        stack.callback(database.dispose)
        pool = ModelPool(
            store,
            _selector(settings, database, metrics),
            BatchLimits(
                settings.max_batch_tokens,
                settings.max_batch_rows,
                settings.max_batch_delay_ms / 1000,
                settings.engine_timeout_s,
            ),
            metrics,
            memory_budget_bytes=settings.memory_budget_bytes,
            backbones=settings.backbones,
            batch_log=None
            if settings.batch_log is None
            else stack.enter_context(closing(BatchLog(settings.batch_log))),
        )
        stack.push_async_callback(pool.stop)
        admission = AdmissionController(
            max_inputs=settings.max_concurrent_requests, max_queue_delay_s=settings.max_queue_delay_ms / 1000
        )
        predictor = Predictor(
            admission,
            metrics,
            max_inputs=settings.max_client_batch_size,
            preprocessor_threads=settings.tokenizer_threads,
        )
        stack.callback(predictor.close)
        intake = DatasetIntake(
            datasets,
            settings.data_dir / "datasets",
            timeout_s=settings.dataset_check_timeout_s,
            memory_bytes=settings.dataset_check_memory_bytes,
        )
        stack.push_async_callback(intake.stop)
        watcher = RegistryWatcher(registry, pool, poll_s=settings.registry_poll_s)
        pool.look_again = watcher.look
        services = Services(
            settings=settings,
            pool=pool,
            predictor=predictor,
            watcher=watcher,
            registry=registry,
            jobs=jobs,
            datasets=datasets,
            intake=intake,
            store=store,
            metrics=metrics,
            drain=drain,
            backbones=backbones,
        )
        stack.push_async_callback(
            _cancelled,
            [
                asyncio.create_task(_load(settings, store, pool, watcher, registry, backbones), name="load"),
                asyncio.create_task(intake.sweep(), name="dataset-sweep"),
                asyncio.create_task(_count_jobs(jobs, metrics), name="job-counts"),
            ],
        )
        yield services


def _selector(settings: ServingSettings, database: Database, metrics: ServingMetrics) -> EngineSelector:
    device = _resolve_device(settings.device)
    options = EngineOptions(
        device=device,
        threads=settings.threads or len(os.sched_getaffinity(0)),
        adapter_slots=settings.adapter_slots,
        slots_budget_bytes=settings.adapter_slots_bytes,
    )
    policy = SelectionPolicy(
        engine=settings.engine,
        precision=settings.precision,
        allow_int8=settings.allow_int8,
        allow_compile=settings.allow_compile,
        allow_cuda_graphs=settings.allow_cuda_graphs,
        allow_tensorrt=settings.allow_tensorrt,
        stall_s=settings.engine_trial_stall_s,
    )

    def count(backbone: str, engine: EngineSpec, error: Exception) -> None:
        metrics.count_engine_fallback(backbone, str(engine), to_engine=str(REFERENCE), reason=type(error).__name__)

    cache = settings.data_dir / "cache" / "graphs"
    return EngineSelector(policy, options, cache, EngineReports(database), on_fallback=count)


def _resolve_device(device: str) -> str:
    if device != "auto":
        return device
    if not Path("/dev/nvidiactl").exists():
        return "cpu"  # torch takes seconds to import and may never be needed
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


async def _migrate_when_there(database: Database) -> None:
    """A database that starts together with us may need a moment."""
    for attempt in range(60):
        try:
            return await asyncio.to_thread(migrate, database)
        except DatabaseUnavailable:
            if attempt == 59:
                raise
            await asyncio.sleep(1)


async def _read_when_there(watcher: RegistryWatcher) -> None:
    while True:
        try:
            return await watcher.refresh()
        except DatabaseUnavailable:
            await asyncio.sleep(1)


async def _load(
    settings: ServingSettings,
    store: FileStore,
    pool: ModelPool,
    watcher: RegistryWatcher,
    registry: Registry,
    backbones: dict[str, Backbone],
) -> None:
    """Brings the backbones up, then follows the registry. A backbone that cannot load keeps the process unready."""
    try:
        await _read_when_there(watcher)  # from here on the names of models are known
        for name, source in settings.backbones.items():
            folder = await asyncio.to_thread(locate, source, offline=settings.is_offline)
            backbones[name] = await asyncio.to_thread(ingest, store, folder, name=name, source=source)
            await pool.add_backbone(name, backbones[name])
        await asyncio.to_thread(_name_outdated, registry, store, backbones)
        await pool.settled()
        # Full collections stop every thread; those to come need not look at all that was imported. What loading left in
        # cycles, an engine's weights among it, must go before.
        gc.collect()
        gc.freeze()
        pool.is_started = True
    except Exception:
        _log.exception("start-up failed; the process stays unready", extra={"action": "startup_failed"})
        pool.has_failed = True
        return
    await watcher.follow()


def _name_outdated(registry: Registry, store: FileStore, backbones: Mapping[str, Backbone]) -> None:
    """Log which versions were trained on another backbone than the one that its name means now, and why it is."""
    outdated: dict[str, list[str]] = {}
    for (tenant, name, number), version in registry.snapshot().versions.items():
        now = backbones.get(version.backbone or "")
        if now is not None and version.backbone_digest is not None:
            reason = why_retrain(store, version.backbone_digest, now)
            if reason is not None:
                outdated.setdefault(reason, []).append(f"{tenant}/{name}:{number}")
    for reason, versions in outdated.items():
        _log.warning(f"{', '.join(sorted(versions))}: {reason}", extra={"action": "retrain"})


async def _count_jobs(jobs: JobStore, metrics: ServingMetrics) -> None:
    while True:
        with suppress(DatabaseUnavailable):
            metrics.set_finetune_jobs(await asyncio.to_thread(jobs.counts))
        await asyncio.sleep(_JOB_COUNTS_EVERY_S)


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
