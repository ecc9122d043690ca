"""The serving process's settings: read once from the environment (`POLYHEAD_…`), then passed on as plain values."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model_registry.settings import CommonSettings, read_settings
from service.memory_plan import LEAST_CHECK_BYTES, MemoryPlan, memory_limit, physical_memory, plan_memory

Scope = Literal["predict", "datasets", "finetune", "models:promote", "models:delete", "admin"]
# Names that other processes and clients read; anything else with our prefix is a misspelling.
FOREIGN = frozenset(
    {
        "WORKER_ID",
        "WORKER_METRICS_HOST",
        "WORKER_METRICS_PORT",
        "LEASE_S",
        "HEARTBEAT_S",
        "POLL_S",
        "STALL_S",
        "CANCEL_GRACE_S",
        "MAX_ATTEMPTS",
        "CPU_THREADS",
        "FEATURE_CACHE_BYTES",
        "SPARE_PROCESS",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT",
        "MLFLOW_TOKEN",
        "URL",
        "API_KEY",
    }
)


class ApiKey(BaseModel):
    """One key, by the SHA-256 of its text. `admin` includes every other scope."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope]
    tenant: str = Field("default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")


class KeepRule(BaseModel):
    """Which versions of a model are kept; those that neither rule keeps are deleted."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    keep_versions: int | None = Field(None, ge=1, le=100_000)
    keep_days: float | None = Field(None, gt=0, le=36_500)


class ServingSettings(CommonSettings):
    """What the serving process reads beside the common settings."""

    host: str = Field("127.0.0.1", description="address to listen on; other than loopback needs api_keys")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")

    default_model: str | None = Field(None, description="model of a request that names none")
    default_backbone: str | None = Field(
        None, description="backbone of a fine-tune that names none; default: the first"
    )
    import_root: Path | None = Field(None, description="folder under which POST /models/import may read")
    engine: Literal["auto", "torch", "onnx", "openvino", "tensorrt"] = Field(
        "auto", description="runtime of backbones; auto: the fastest measured here that gives the same answers"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="precision of backbones; auto: whatever the engine's measurement allows"
    )
    allow_int8: bool = Field(False, description="also measure weights in int8; they serve only inside the bound")
    allow_compile: bool = Field(False, description="also measure torch.compile; on a CPU it needs a C++ compiler")
    allow_cuda_graphs: bool = Field(False, description="also measure CUDA graphs; for a process with one backbone")
    allow_tensorrt: bool = Field(False, description="also build and measure TensorRT's engines, for minutes, on a GPU")
    engine_trial_stall_s: float = Field(600.0, gt=0, le=3600, description="silence after which a measurement is ended")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where backbones run")
    adapter_slots: int = Field(32, ge=1, le=4096, description="LoRA adapters that one engine run can mix")
    adapter_slots_bytes: int = Field(2 << 30, ge=1 << 20, description="memory of a backbone's adapter slots")
    threads: int = Field(0, ge=0, le=1024, description="compute threads; 0: one per core")
    memory_budget_bytes: int | None = Field(
        None, ge=1 << 20, description="for versions, the least used of which go; default: by the container's limit"
    )

    max_batch_tokens: int = Field(16384, ge=64, le=1 << 22, description="padded tokens in one engine run")
    max_batch_rows: int = Field(128, ge=1, le=4096, description="rows in one engine run")
    max_batch_delay_ms: float = Field(0.0, ge=0, le=1000, description="wait for a fuller batch; 0: never while idle")
    engine_timeout_s: float = Field(60.0, gt=0, le=3600, description="a run longer than this is taken for hung")
    batch_log: Path | None = Field(None, description="file to which each batch's shape and seconds are appended")
    max_concurrent_requests: int = Field(512, ge=1, description="inputs admitted at once; beyond it 429")
    max_queue_delay_ms: float = Field(
        10_000.0, gt=0, description="work that could not start by then is refused with 429"
    )
    max_client_batch_size: int = Field(256, ge=1, le=4096, description="inputs in one request; beyond it 413")
    max_body_bytes: int = Field(2_000_000, ge=1000, description="body of a request other than an upload")
    max_upload_bytes: int = Field(4 << 30, ge=1000, description="body of an upload")
    request_timeout_s: float = Field(30.0, gt=0, le=3600, description="deadline of a request that names none")
    max_event_streams: int = Field(50, ge=1, le=10_000, description="event streams of one key at once; beyond it 429")
    tokenizer_threads: int = Field(2, ge=1, le=64, description="threads that tokenise")

    drain_delay_s: float = Field(15.0, ge=0, le=300, description="serving goes on so long after SIGTERM, unready")
    drain_grace_s: float = Field(30.0, ge=0, le=600, description="requests in flight get so long to finish")
    registry_poll_s: float = Field(0.25, ge=0.02, le=60, description="seconds between looks for new versions")
    dataset_check_timeout_s: float = Field(900.0, gt=0, description="seconds the check of an upload may take")
    dataset_check_memory_bytes: int | None = Field(
        None, ge=LEAST_CHECK_BYTES, description="address space of that check; default: by the container's limit"
    )
    api_keys: tuple[ApiKey, ...] = Field((), description="JSON list of {name, sha256, scopes, tenant}")

    keep_versions: int | None = Field(
        None, ge=1, le=100_000, description="the newest versions of each model that are kept"
    )
    keep_days: float | None = Field(None, gt=0, le=36_500, description="versions younger than this are kept")
    retention: dict[str, KeepRule] = Field(
        {}, description="rules of single models, by name or tenant/name, in place of the two above"
    )
    retention_dry_run: bool = Field(False, description="only log what retention would delete")

    @model_validator(mode="after")
    def _is_safe_and_consistent(self) -> ServingSettings:
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reachable from other machines, so api_keys must be set; without keys only "
                "127.0.0.1, ::1 and localhost are allowed"
            )
        if self.default_backbone is not None and self.default_backbone not in self.backbones:
            raise ValueError(f"default_backbone {self.default_backbone!r} is not among backbones")
        if not self.backbones:
            raise ValueError("backbones is empty; name at least one")
        return self

    @property
    def memory(self) -> MemoryPlan:
        """Raises `ValueError` if what is set does not fit the container."""
        return plan_memory(
            self.memory_budget_bytes,
            self.dataset_check_memory_bytes,
            limit=memory_limit(),
            physical=physical_memory(),
        )

    def public(self) -> dict[str, Any]:
        """Every effective value that may be shown: no keys, no database address."""
        values = self.model_dump(mode="json", exclude={"api_keys", "database_url", "batch_log"})
        memory = self.memory
        values |= {"memory_budget_bytes": memory.budget_bytes, "dataset_check_memory_bytes": memory.check_bytes}
        return values | {"api_keys": len(self.api_keys), "database": self.resolved_database_url.split(":", 1)[0]}


def load_settings(environment: Mapping[str, str] | None = None) -> ServingSettings:
    """Raises `SystemExit` that lists every error at once, misspelt variables included."""
    settings = read_settings(ServingSettings, others=FOREIGN, environment=environment)
    try:
        settings.memory  # noqa: B018 (whether it fits is known here, before anything is loaded)
    except ValueError as error:
        raise SystemExit(f"the settings are not usable:\n  {error}") from error
    return settings


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keep_threads_passive() -> None:
    """Compute threads sleep between runs: spinning, they take the event loop's processor. Before torch is imported.

    A burst of texts is tokenised by the one thread that took it: handed to a pool, a text costs half as much again.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
