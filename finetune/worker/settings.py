"""The worker's settings: read once from the environment (`POLYHEAD_…`), then passed on as plain values."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, SecretStr, model_validator

from model_registry.settings import CommonSettings, read_settings

# Names that the serving process and clients read; anything else with our prefix is a misspelling.
FOREIGN = frozenset(
    "HOST PORT DEFAULT_MODEL DEFAULT_BACKBONE IMPORT_ROOT ENGINE PRECISION ALLOW_INT8 ALLOW_COMPILE "
    "ALLOW_CUDA_GRAPHS ALLOW_TENSORRT ENGINE_TRIAL_STALL_S ENGINE_TIMEOUT_S ADAPTER_SLOTS ADAPTER_SLOTS_BYTES "
    "THREADS MEMORY_BUDGET_BYTES MAX_BATCH_TOKENS MAX_BATCH_ROWS MAX_BATCH_DELAY_MS BATCH_LOG "
    "MAX_CONCURRENT_REQUESTS MAX_QUEUE_DELAY_MS MAX_CLIENT_BATCH_SIZE MAX_BODY_BYTES MAX_UPLOAD_BYTES "
    "REQUEST_TIMEOUT_S TOKENIZER_THREADS DRAIN_DELAY_S DRAIN_GRACE_S REGISTRY_POLL_S DATASET_CHECK_TIMEOUT_S "
    "DATASET_CHECK_MEMORY_BYTES API_KEYS URL API_KEY KEEP_VERSIONS KEEP_DAYS RETENTION RETENTION_DRY_RUN "
    "MAX_EVENT_STREAMS".split()
)


class WorkerSettings(CommonSettings):
    """What the worker reads beside the common settings."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where training runs")
    cpu_threads: int = Field(0, ge=0, le=1024, description="threads of a training run; 0: one per core")
    feature_cache_bytes: int = Field(2 << 30, ge=0, description="vectors of frozen backbones kept on disk; 0: none")
    spare_process: bool = Field(True, description="while idle, keep a training process waiting with its imports done")

    worker_id: str = Field("", max_length=128, description="name in the job table; default: host and process")
    worker_metrics_host: str = Field("127.0.0.1", description="address of the worker's /metrics")
    worker_metrics_port: int = Field(9109, ge=0, le=65535, description="port of the worker's /metrics; 0: none")
    lease_s: float = Field(60.0, ge=1, le=3600, description="seconds after which a silent worker loses its job")
    heartbeat_s: float = Field(15.0, ge=0.1, le=600, description="seconds between renewals of the lease")
    poll_s: float = Field(0.5, ge=0.05, le=60, description="seconds between looks at an empty queue")
    stall_s: float = Field(900.0, ge=10, description="seconds without any sign of progress until a run is aborted")
    cancel_grace_s: float = Field(30.0, ge=0, description="seconds a run gets to wind down before it is killed")
    max_attempts: int = Field(3, ge=1, le=10, description="runs a job may lose before it fails")
    mlflow_tracking_uri: str | None = Field(
        None, pattern=r"^https?://", description="MLflow server that ended jobs are recorded in; default: none"
    )
    mlflow_experiment: str = Field("polyhead", min_length=1, max_length=200, description="experiment of those records")
    mlflow_token: SecretStr | None = Field(None, description="bearer token for that server")

    @model_validator(mode="after")
    def _renews_in_time(self) -> WorkerSettings:
        if self.heartbeat_s * 2 > self.lease_s:
            raise ValueError("heartbeat_s must be at most half of lease_s, or one late renewal loses the job")
        return self

    @property
    def resolved_worker_id(self) -> str:
        return self.worker_id or f"{socket.gethostname()}-{os.getpid()}"

    @property
    def resolved_cpu_threads(self) -> int:
        return self.cpu_threads or len(os.sched_getaffinity(0))


def load_worker_settings(environment: Mapping[str, str] | None = None) -> WorkerSettings:
    """Raises `SystemExit` that lists every error at once, misspelt variables included."""
    return read_settings(WorkerSettings, others=FOREIGN, environment=environment)
