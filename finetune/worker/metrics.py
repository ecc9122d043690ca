"""The metrics of the fine-tune worker, and the loopback port they are read from.

Knows prometheus_client and nothing of jobs: the worker's loop and the supervisor set what they know. The number of jobs
in each state is not here but with the serving process, which reads it from the database.
"""

import time
from collections.abc import Callable
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

NAMESPACE: Final = "polyhead"

PHASES: Final = (
    "preparing_data",
    "loading_backbone",
    "embedding",
    "training",
    "evaluating",
    "calibrating",
    "exporting",
    "registering",
)
# `auto` is for a job that ended before its method was resolved, `requeued` for one handed back by a stopping worker.
METHODS: Final = ("auto", "baseline", "linear_probe", "lora", "full")
OUTCOMES: Final = ("succeeded", "failed", "cancelled", "requeued")

DURATION_BUCKETS_S: Final = (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400)


class WorkerMetrics:
    """The metrics of one worker process. Thread-safe.

    `registry` must not hold process collectors yet; by default a new one is made. `clock` gives Unix seconds.
    """

    def __init__(self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.time) -> None:
        disable_created_metrics()
        self.registry = registry if registry is not None else CollectorRegistry()
        self._clock = clock
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        self.finetune_duration_seconds = Histogram(
            "finetune_duration_seconds",
            "Time a job ran on this worker, from claim to end",
            ("method", "outcome"),
            namespace=NAMESPACE,
            registry=self.registry,
            buckets=DURATION_BUCKETS_S,
        )
        self.finetune_jobs_running = Gauge(
            "finetune_jobs_running", "Jobs this worker runs now", namespace=NAMESPACE, registry=self.registry
        )
        self.finetune_phase = Gauge(
            "finetune_phase",
            "1 for the phase of the running job, else 0",
            ("phase",),
            namespace=NAMESPACE,
            registry=self.registry,
        )
        self.worker_heartbeat_timestamp_seconds = Gauge(
            "worker_heartbeat_timestamp_seconds",
            "Unix time of the last turn of the worker's loop",
            namespace=NAMESPACE,
            registry=self.registry,
        )

        for method in METHODS:
            for outcome in OUTCOMES:
                self.finetune_duration_seconds.labels(method, outcome)
        self.set_phase(None)
        # A worker that has just started is not one that last beat in 1970.
        self.beat()

    def beat(self) -> None:
        """Set the heartbeat to now: once per turn of the loop, idle or not."""
        self.worker_heartbeat_timestamp_seconds.set(self._clock())

    def set_phase(self, phase: str | None) -> None:
        """Set the phase of the running job; None when there is none."""
        if phase is not None and phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}, expected one of {', '.join(PHASES)}")
        for known in PHASES:
            self.finetune_phase.labels(known).set(known == phase)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Answer `GET /metrics` on a daemon thread; returns what stops it. OSError when the port is taken."""
        server, thread = start_http_server(port, host, registry=self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop
