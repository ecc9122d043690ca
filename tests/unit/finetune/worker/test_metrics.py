import socket
import urllib.error
import urllib.request

import pytest

from finetune.worker.metrics import METHODS, OUTCOMES, PHASES, WorkerMetrics


def value(metrics: WorkerMetrics, name: str, labels: dict[str, str] | None = None) -> float | None:
    return metrics.registry.get_sample_value(f"polyhead_{name}", labels or {})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_series_exist_before_the_first_job() -> None:
    metrics = WorkerMetrics()
    for method in METHODS:
        for outcome in OUTCOMES:
            labels = {"method": method, "outcome": outcome}
            assert value(metrics, "finetune_duration_seconds_count", labels) == 0
    assert value(metrics, "finetune_jobs_running") == 0
    assert [value(metrics, "finetune_phase", {"phase": phase}) for phase in PHASES] == [0] * len(PHASES)
    assert metrics.registry.get_sample_value("process_resident_memory_bytes")


def test_a_new_worker_has_just_beaten() -> None:
    now = 1000.0
    metrics = WorkerMetrics(clock=lambda: now)
    assert value(metrics, "worker_heartbeat_timestamp_seconds") == 1000
    now = 1015.0
    metrics.beat()
    assert value(metrics, "worker_heartbeat_timestamp_seconds") == 1015


def test_one_phase_at_a_time() -> None:
    metrics = WorkerMetrics()
    metrics.set_phase("embedding")
    metrics.set_phase("training")
    assert [phase for phase in PHASES if value(metrics, "finetune_phase", {"phase": phase})] == ["training"]
    metrics.set_phase(None)
    assert not any(value(metrics, "finetune_phase", {"phase": phase}) for phase in PHASES)
    with pytest.raises(ValueError, match="unknown phase 'resting'"):
        metrics.set_phase("resting")


def test_serve_answers_until_it_is_stopped() -> None:
    metrics = WorkerMetrics()
    port = free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    stop = metrics.serve("127.0.0.1", port)
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            assert b"polyhead_finetune_jobs_running 0.0" in answer.read()
        with pytest.raises(OSError):
            WorkerMetrics().serve("127.0.0.1", port)
    finally:
        stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)
    WorkerMetrics().serve("127.0.0.1", port)()
