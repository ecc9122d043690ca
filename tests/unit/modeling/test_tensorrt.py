"""Engines are compiled once per profile, ahead and completely; batches reach the engine that takes their shape.

Everything but TensorRT itself: sessions run on the CPU's provider, and where TensorRT is asked for, it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeling.adapters import LoraLayout
from modeling.engines import providers, tensorrt
from modeling.engines.device import DeviceFingerprint
from modeling.engines.graphs import POOLED, GraphFiles
from modeling.engines.onnx_gpu import GpuSession
from modeling.engines.providers import SessionPlan, ShapeProfile
from modeling.engines.tensorrt import (
    EnginePlan,
    TensorrtSession,
    build_tensorrt,
    engine_plans,
    fill_caches,
    tensorrt_engine,
    version_text,
)
from modeling.errors import EngineFailed
from modeling.weights import FloatArray
from tests.support import graphs
from tests.unit.modeling.test_onnx_gpu import NO_INPUTS

GPU = DeviceFingerprint(
    "cuda", "A GPU", 132, (), 1 << 37, "9.0", "580.1", {"cuda": "13.0", "onnxruntime-gpu": "1.31.1"}
)
PROFILES = [ShapeProfile((1, 2), (2, 3), (3, 4)), ShapeProfile((1, 2), (1, 6), (2, 8))]


@pytest.fixture
def files(tmp_path: Path) -> GraphFiles:
    files = GraphFiles(tmp_path / "graphs" / "key")
    files.folder.mkdir(parents=True)
    graphs.write_pooled(files.bare)
    files.lora.write_bytes(b"")
    files.describe(LoraLayout(()), hidden_size=graphs.HIDDEN)
    return files


def plans_of(files: GraphFiles, *, gpu: DeviceFingerprint = GPU, precision: str = "fp16") -> list[EnginePlan]:
    return engine_plans(
        files, ["input_ids"], digest="d", max_length=256, precision=precision, gpu=gpu, device=1, version="10.16.1"
    )


def on_cpu(plan: EnginePlan, opened: list[Path]) -> EnginePlan:
    """The plan with a session that writes what TensorRT would."""

    def session(folder: Path) -> SessionPlan:
        opened.append(folder)
        (folder / "a.engine").write_bytes(b"an engine")
        return providers.cpu(threads=1)

    return replace(plan, session=session)


# Plans


def test_there_is_an_engine_per_profile_with_a_folder_of_its_own(files: GraphFiles) -> None:
    plans = plans_of(files)
    assert [plan.key.profile for plan in plans] == list(providers.shape_profiles(256))
    assert len({plan.engine for plan in plans}) == len(plans) == 2
    assert len({plan.timings for plan in plans}) == 1
    for plan in plans:
        session = plan.session(Path("/engines"))
        options = session.providers[0][1]
        assert options["trt_engine_cache_path"] == "/engines"
        assert options["trt_timing_cache_path"] == str(plan.timings)
        assert options["trt_profile_max_shapes"] == "input_ids:" + "x".join(map(str, plan.key.profile.max))
        assert (session.device, session.device_id) == ("cuda", 1)


def test_engines_of_another_driver_are_looked_for_elsewhere(files: GraphFiles) -> None:
    for plan, other in zip(plans_of(files), plans_of(files, gpu=replace(GPU, driver="581")), strict=True):
        assert plan.engine != other.engine and plan.engine.parent == other.engine.parent


# Compiling


def test_each_engine_is_compiled_once_and_what_is_stale_goes(files: GraphFiles) -> None:
    opened: list[Path] = []
    old = [on_cpu(plan, opened) for plan in plans_of(files, gpu=replace(GPU, driver="1"))]
    other = [on_cpu(plan, opened) for plan in plans_of(files, precision="bf16")]
    new = [on_cpu(plan, opened) for plan in plans_of(files)]
    assert fill_caches(files.bare, old) > 0
    fill_caches(files.bare, other)
    fill_caches(files.bare, new)
    assert [plan.engine.is_dir() for plan in (*old, *other, *new)] == [False, False, True, True, True, True]
    assert len(opened) == 6
    fill_caches(files.bare, new)
    assert len(opened) == 6
    assert all(plan.timings.is_dir() for plan in new)


def test_an_engine_appears_only_when_it_is_complete(files: GraphFiles, tmp_path: Path) -> None:
    opened: list[Path] = []
    (plan, _) = (on_cpu(plan, opened) for plan in plans_of(files))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(EngineFailed, match=r"broken\.onnx"):
        fill_caches(broken, [plan])
    assert opened[0] != plan.engine
    assert list(plan.engine.parent.iterdir()) == []


def test_a_graph_that_tensorrt_does_not_take_is_not_kept(files: GraphFiles) -> None:
    plan = replace(plans_of(files)[0], session=lambda folder: providers.cpu(threads=1))
    with pytest.raises(EngineFailed, match="took no part"):
        fill_caches(files.bare, [plan])
    assert list(plan.engine.parent.iterdir()) == []


def test_a_second_process_that_compiled_the_same_does_no_harm(files: GraphFiles) -> None:
    plan = plans_of(files)[0]

    def session(folder: Path) -> SessionPlan:
        (folder / "a.engine").touch()
        plan.engine.mkdir()  # the other one is done meanwhile
        (plan.engine / "b.engine").touch()
        return providers.cpu(threads=1)

    fill_caches(files.bare, [replace(plan, session=session)])
    assert [path.name for path in plan.engine.parent.iterdir()] == [plan.engine.name]
    assert [path.name for path in plan.engine.iterdir()] == ["b.engine"]


# Running


@pytest.mark.parametrize(("rows", "length"), [(1, 2), (3, 4), (4, 4), (7, 3), (2, 5), (5, 8)])
def test_every_shape_runs_in_pieces_that_some_engine_takes(files: GraphFiles, rows: int, length: int) -> None:
    seen: list[tuple[int, int]] = []

    class Noting(GpuSession):
        def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] = (POOLED,)) -> list[FloatArray]:
            rows, length = feeds["input_ids"].shape
            seen.append((rows, length))
            return super().run(feeds, outputs)

    session = TensorrtSession(
        [(profile, Noting(files.bare, providers.cpu(threads=1), padding={})) for profile in PROFILES]
    )
    inputs = graphs.feeds(rows, length)
    np.testing.assert_allclose(session.run(inputs)[0], graphs.expected(files.bare, inputs), atol=1e-6)
    most, longest = PROFILES[0].max if length <= 4 else PROFILES[1].max
    assert all(r <= most and n <= longest for r, n in seen)
    assert session.memory_bytes() == files.bare.stat().st_size


def test_a_text_longer_than_every_engine_is_refused(files: GraphFiles) -> None:
    session = TensorrtSession([(PROFILES[0], GpuSession(files.bare, providers.cpu(threads=1), padding={}))])
    with pytest.raises(EngineFailed, match="5 positions"):
        session.run(graphs.feeds(1, 5))


# Refusals


@pytest.mark.parametrize(
    "call", [build_tensorrt, lambda files, **options: tensorrt_engine(files, NO_INPUTS, **options)]
)
def test_without_tensorrt_it_says_what_to_install(call, files: GraphFiles) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EngineFailed, match=r"no TensorrtExecutionProvider.*tensorrt-cu13"):
        call(files, digest="d", max_length=64, precision="fp16")
    with pytest.raises(EngineFailed, match="not in fp32"):
        call(files, digest="d", max_length=64, precision="fp32")


def test_missing_libraries_are_told_apart_from_a_missing_provider(
    files: GraphFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "refuse_without", lambda provider: None)
    with pytest.raises(EngineFailed, match=r"libraries are not installed.*tensorrt-cu13"):
        build_tensorrt(files, digest="d", max_length=64, precision="fp16")


def test_serving_compiles_nothing(files: GraphFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    plans = [on_cpu(plan, opened) for plan in plans_of(files)]
    monkeypatch.setattr(tensorrt, "_plans", lambda *_, **__: plans)
    with pytest.raises(EngineFailed, match="not built"):
        tensorrt_engine(files, NO_INPUTS, digest="d", max_length=256, precision="fp16")
    assert opened == []
    fill_caches(files.bare, plans)
    engine = tensorrt_engine(files, NO_INPUTS, digest="d", max_length=256, precision="fp16")
    assert (engine.name, engine.precision) == ("tensorrt", "fp16")
    assert opened[-2:] == [plan.engine for plan in plans]


def test_building_leaves_the_adapters_graph_too(files: GraphFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs.write_pooled(files.lora, has_stack=True)
    plans = [on_cpu(plan, []) for plan in plans_of(files)]
    monkeypatch.setattr(tensorrt, "_plans", lambda *_, **__: plans)
    build_tensorrt(files, digest="d", max_length=256, precision="fp16")
    assert files.variant("fp16").lora.is_file() and all(plan.engine.is_dir() for plan in plans)


def test_the_librarys_number_reads_as_a_version() -> None:
    assert version_text(101601) == "10.16.1"
    assert version_text(110400) == "11.4.0"
