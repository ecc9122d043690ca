"""Engine reports over SQLite and PostgreSQL: a row per weights and device, the newest measurement wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

from model_registry.db import Database
from model_registry.engine_reports import EngineMeasurement, EngineReports

MEASURED = EngineMeasurement("a" * 64, "cpu-1", {"name": "a CPU"}, "openvino/bf16", [{"engine": "torch/fp32"}])


def test_a_measurement_is_kept_per_weights_and_device(database: Database) -> None:
    database._clock = ticking()  # the database's own may not move between two rows
    reports = EngineReports(database)
    assert reports.get("a" * 64, "cpu-1") is None
    reports.put(MEASURED)
    reports.put(replace(MEASURED, device_key="gpu", chosen="torch/bf16"))
    reports.put(replace(MEASURED, digest="b" * 64))
    found = reports.get("a" * 64, "cpu-1")
    assert found is not None and found.created_at > 0
    assert replace(found, created_at=0.0) == MEASURED
    assert [row.chosen for row in reports.of(["a" * 64])] == ["torch/bf16", "openvino/bf16"]
    assert len(reports.of(["a" * 64, "b" * 64])) == 3 and reports.of([]) == []


def test_measuring_again_replaces_the_row(database: Database) -> None:
    reports = EngineReports(database)
    reports.put(MEASURED)
    reports.put(replace(MEASURED, chosen="torch/fp32"))
    found = reports.get("a" * 64, "cpu-1")
    assert found is not None and found.chosen == "torch/fp32"
    assert len(reports.of(["a" * 64])) == 1


def ticking() -> Callable[[], float]:
    seconds = count(1)
    return lambda: float(next(seconds))
