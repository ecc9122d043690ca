"""Builds the serving process from its settings: the one place that names concrete classes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

from finetune.data.store import DatasetStore
from finetune.jobs.store import JobStore
from model_registry.data_folder import DataFolder
from model_registry.db import Database
from model_registry.engine_reports import EngineReports
from model_registry.errors import DatabaseUnavailable, StoreUnavailable
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.removal import Keep, Removal
from model_registry.store import FileStore
from modeling.backbone import Backbone, why_retrain
from modeling.engines.build import REFERENCE, EngineOptions, EngineSpec
from modeling.intake import IntakeLimits, ingest
from service.api.deps import Services, Workers
from service.api.event_streams import EventStreams
from service.api.guard import DrainState
from service.dataset_intake import DatasetIntake
from service.folder_watch import FolderWatch
from service.housekeeping import Housekeeping, Retention
from service.inference.batch_log import BatchLog
from service.inference.capacity import AdmissionController
from service.inference.engine_selection import EngineSelector, SelectionPolicy
from service.inference.engine_worker import BatchLimits
from service.inference.model_pool import ModelPool
from service.inference.predictor import Predictor
from service.inference.registry_watcher import RegistryWatcher
from service.metrics import ServingMetrics
from service.model_import import ModelImports
from service.settings import ServingSettings
from service.threads import on_database, on_process

_log = logging.getLogger("service.wiring")
_JOB_COUNTS_EVERY_S = 2.0


@asynccontextmanager
async def build(settings: ServingSettings, drain: DrainState, metrics: ServingMetrics) -> AsyncIterator[Services]:
    """Opens everything; backbones load in the background, so that the probes answer meanwhile."""
    if settings.database_url is None:
        settings.data_dir.mkdir(parents=True, exist_ok=True)  # its file is in there
    database = Database(settings.resolved_database_url, busy_timeout_s=settings.database_timeout_s)
    await _migrate_when_there(database)
    folder = await asyncio.to_thread(_open_folder, settings, database)
    watch = FolderWatch(folder)
    store = FileStore(settings.data_dir / "store", is_there=True)
    memory = settings.memory
    registry, jobs, datasets = Registry(database), JobStore(database), DatasetStore(database)
    removal = Removal(database, registry, store)
    housekeeping = Housekeeping(removal, jobs, folder, _retention(settings), is_dry=settings.retention_dry_run)
    backbones: dict[str, Backbone] = {}
    stopping = threading.Event()  # for the threads that wait for a process
    async with AsyncExitStack() as stack:
        stack.callback(database.dispose)
        stack.callback(watch.close)
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
            memory_budget_bytes=memory.budget_bytes,
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
            memory_bytes=memory.check_bytes,
        )
        stack.push_async_callback(intake.stop)
        watcher = RegistryWatcher(registry, pool, poll_s=settings.registry_poll_s)
        pool.look_again = watcher.look
        events = EventStreams(jobs, drain, metrics, per_key=settings.max_event_streams)
        services = Services(
            settings=settings,
            pool=pool,
            predictor=predictor,
            watcher=watcher,
            registry=registry,
            removal=removal,
            jobs=jobs,
            datasets=datasets,
            intake=intake,
            imports=_imports(settings, registry, store, stopping),
            store=store,
            metrics=metrics,
            drain=drain,
            events=events,
            backbones=backbones,
            folder=watch,
        )
        stack.push_async_callback(
            _cancelled,
            [
                asyncio.create_task(_load(settings, store, pool, watcher, registry, backbones, stopping), name="load"),
                asyncio.create_task(intake.sweep(), name="dataset-sweep"),
                asyncio.create_task(_watch_jobs(jobs, metrics, services.workers), name="job-watch"),
                asyncio.create_task(housekeeping.run(), name="housekeeping"),
                asyncio.create_task(watch.run(), name="data-folder"),
                asyncio.create_task(events.run(), name="event-streams"),
            ],
        )
        stack.callback(stopping.set)
        yield services


def _imports(
    settings: ServingSettings, registry: Registry, store: FileStore, stopping: threading.Event
) -> ModelImports:
    return ModelImports(
        registry,
        store,
        import_root=settings.import_root,
        is_offline=settings.is_offline,
        limits=_intake_limits(settings),
        stop=stopping,
    )


def _intake_limits(settings: ServingSettings) -> IntakeLimits:
    return IntakeLimits(settings.import_memory_bytes, settings.import_timeout_s)


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


def _open_folder(settings: ServingSettings, database: Database) -> DataFolder:
    """From here on neither the directory nor the database's file is made anew."""
    try:
        folder = DataFolder.open(settings.data_dir.absolute(), database)
    except StoreUnavailable as error:
        _log.error(str(error), extra={"action": "data_folder_refused"})
        raise
    database.is_made = True
    return folder


def _retention(settings: ServingSettings) -> Retention:
    by_model = {name: Keep(rule.keep_versions, rule.keep_days) for name, rule in settings.retention.items()}
    return Retention(Keep(settings.keep_versions, settings.keep_days), by_model)


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
    stopping: threading.Event,
) -> None:
    """Brings the backbones up, then follows the registry. A backbone that cannot load keeps the process unready."""
    try:
        await _read_when_there(watcher)  # from here on the names of models are known
        for name, source in settings.backbones.items():
            backbones[name] = await on_process(
                ingest,
                store,
                source,
                name=name,
                offline=settings.is_offline,
                limits=_intake_limits(settings),
                stop=stopping,
            )
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


async def _watch_jobs(jobs: JobStore, metrics: ServingMetrics, workers: Workers) -> None:
    """Until cancelled: counts jobs and workers, and ends what a worker that is gone was asked to end."""
    while True:
        try:
            await on_database(jobs.settle)
            metrics.set_finetune_jobs(await on_database(jobs.counts))
            workers.outlook = await on_database(jobs.outlook)
            metrics.set_workers(workers.outlook.live_workers, workers.outlook.worker_last_seen)
        except DatabaseUnavailable:
            pass  # the routes that need it say so
        except Exception:
            _log.exception("jobs were not counted", extra={"action": "job_counts_failed"})
        await asyncio.sleep(_JOB_COUNTS_EVERY_S)


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
