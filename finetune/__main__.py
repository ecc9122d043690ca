"""`python -m finetune`: the fine-tune worker. The one place that names its concrete parts."""

from __future__ import annotations

import importlib.util
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from finetune.data.store import DatasetStore
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.store import JobStore
from finetune.worker.claim_loop import Worker
from finetune.worker.metrics import WorkerMetrics
from finetune.worker.settings import WorkerSettings, load_worker_settings
from finetune.worker.supervisor import Ledger, Timing
from finetune.worker.throughput_probe import forward_rows_per_s
from finetune.worker.tracking import MlflowSink
from finetune.worker.warm_child import SpareChild, child_command
from model_registry.data_folder import DataFolder
from model_registry.db import Database
from model_registry.engine_reports import EngineReports
from model_registry.errors import DatabaseUnavailable, StoreUnavailable
from model_registry.logs import set_up
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.settings import refuse_to_start, retired_settings
from model_registry.store import FileStore
from modeling.backbone import Backbone
from modeling.intake import IntakeLimits, ingest

_log = logging.getLogger("finetune")


def main() -> int:
    settings = load_worker_settings()
    set_up(settings.log_level)
    for warning in retired_settings():
        _log.warning(warning, extra={"action": "retired_setting"})
    metrics = WorkerMetrics()
    stop_metrics = _serve(metrics, settings)  # at once: what cannot start says so before anything is loaded
    if settings.database_url is None:
        settings.data_dir.mkdir(parents=True, exist_ok=True)  # its file is in there
    database = Database(settings.resolved_database_url, busy_timeout_s=settings.database_timeout_s)
    _migrate_when_there(database)
    folder = _open_folder(settings, database)
    store = FileStore(settings.data_dir / "store", is_there=True)
    backbones = _backbones(settings, store)
    worker = Worker(
        settings.resolved_worker_id,
        Ledger(JobStore(database, max_attempts=settings.max_attempts), Registry(database), store, metrics),
        DatasetStore(database),
        backbones=backbones,
        profile=_profile(settings),
        data_dir=settings.data_dir,
        folder=folder,
        timing=Timing(settings.lease_s, settings.heartbeat_s, settings.stall_s, settings.cancel_grace_s),
        poll_s=settings.poll_s,
        engines=EngineReports(database),
        feature_cache_bytes=settings.feature_cache_bytes,
        spare=_spare(backbones) if settings.spare_process else None,
        sink=_sink(settings),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    _log.info("worker ready", extra={"action": "worker_ready", "worker": settings.resolved_worker_id})
    try:
        worker.run_forever()
    finally:
        stop_metrics()
        database.dispose()
    return 0


def _serve(metrics: WorkerMetrics, settings: WorkerSettings) -> Callable[[], None]:
    """Answer `/metrics`; returns what stops it. Raises `SystemExit` if nothing can listen there."""
    host, port = settings.worker_metrics_host, settings.worker_metrics_port
    if not port:
        return lambda: None
    try:
        return metrics.serve(host, port)
    except OSError as error:
        message = f"POLYHEAD_WORKER_METRICS_PORT: port {port} on {host} cannot be used: {error.strerror or error}."
        refuse_to_start(f"{message} Another worker may use it: set another port, or 0 to serve no metrics.")


def _sink(settings: WorkerSettings) -> MlflowSink | None:
    if settings.mlflow_tracking_uri is None:
        return None
    token = settings.mlflow_token.get_secret_value() if settings.mlflow_token else None
    return MlflowSink(settings.mlflow_tracking_uri, settings.mlflow_experiment, token=token)


def _open_folder(settings: WorkerSettings, database: Database) -> DataFolder:
    """From here on neither the directory nor the database's file is made anew."""
    try:
        folder = DataFolder.open(settings.data_dir.absolute(), database)
    except StoreUnavailable as error:
        raise SystemExit(str(error)) from error
    database.is_made = True
    return folder


def _migrate_when_there(database: Database) -> None:
    """A database that starts together with us may need a moment."""
    for attempt in range(60):
        try:
            return migrate(database)
        except DatabaseUnavailable:
            if attempt == 59:
                raise
            time.sleep(1)


def _backbones(settings: WorkerSettings, store: FileStore) -> dict[str, Backbone]:
    limits = IntakeLimits(settings.import_memory_bytes, settings.import_timeout_s)
    return {
        name: ingest(store, source, name=name, offline=settings.is_offline, limits=limits)
        for name, source in settings.backbones.items()
    }


def _spare(backbones: Mapping[str, Backbone]) -> SpareChild:
    types = [backbone.info.model_type for backbone in backbones.values()]
    return SpareChild(child_command(model_types=types, is_ahead=True))


def _profile(settings: WorkerSettings) -> WorkerProfile:
    import torch

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_has_bf16(torch)
    torch.set_num_threads(settings.resolved_cpu_threads)
    return WorkerProfile(
        device=device,
        devices=torch.cuda.device_count() if device == "cuda" else 1,
        cpu_threads=settings.resolved_cpu_threads,
        has_bf16=has_bf16,
        has_bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
        forward_rows_per_s=forward_rows_per_s(device, has_bf16=has_bf16),
    )


def _cpu_has_bf16(torch: Any) -> bool:
    """Whether matrix products in bf16 run on instructions of their own; emulated ones are slower than fp32."""
    capability = torch.backends.cpu.get_cpu_capability()
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return capability.startswith("AVX512") and bool(probe and probe())


if __name__ == "__main__":
    sys.exit(main())
