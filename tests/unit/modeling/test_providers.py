"""Options hold what their names promise, buckets take every batch they can, engines are found only while valid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.engines.providers import (
    CPU,
    CUDA,
    TENSORRT,
    EngineCacheKey,
    ShapeProfile,
    cpu,
    cuda,
    ladder,
    shape_profiles,
    stale_directories,
    tensorrt,
)

PROFILE = ShapeProfile((1, 2), (8, 64), (128, 128))
KEY = EngineCacheKey(
    digest="d",
    graphs="g",
    precision="fp16",
    profile=PROFILE,
    gpu="A GPU",
    compute_capability="9.0",
    driver="580",
    cuda="13.0",
    tensorrt="10.16.1",
    onnxruntime="1.31.1",
)
ELSEWHERE = {"gpu": "B GPU", "compute_capability": "8.0", "digest": "other weights"}
CHANGED = {"graphs": "g2", "driver": "581", "cuda": "13.1", "tensorrt": "10.17", "onnxruntime": "1.32", "schema": 99}
ANOTHER = {"precision": "bf16", "profile": ShapeProfile((1, 2), (8, 64), (128, 256))}


def on_tensorrt(**options: object) -> dict[str, str]:
    values = {"precision": "fp16", "timings": Path("/t")} | options
    plan = tensorrt(PROFILE, ["input_ids", "attention_mask"], Path("/e"), **values)  # type: ignore[arg-type]
    return plan.providers[0][1]


# Sessions


def test_no_session_spins_or_keeps_a_pattern_per_shape() -> None:
    for plan in (cpu(), cuda(), tensorrt(PROFILE, [], Path("e"), precision="fp16", timings=Path("t"))):
        assert plan.entries == {"session.intra_op.allow_spinning": "0"}
        assert plan.attributes["inter_op_num_threads"] == 1
        assert plan.attributes["enable_mem_pattern"] is False


def test_threads_are_the_callers_on_a_cpu() -> None:
    plan = cpu(threads=3)
    assert [name for name, _ in plan.providers] == [CPU] and plan.device == "cpu"
    assert plan.attributes["intra_op_num_threads"] == 3


def test_fp32_on_a_gpu_means_fp32() -> None:
    assert cuda(precision="fp32").providers[0][1]["use_tf32"] == "0"
    assert cuda(precision="fp16").providers[0][1]["use_tf32"] == "1"


def test_the_cpu_comes_last_on_a_gpu() -> None:
    plan = cuda(device_id=2, has_graphs=True)
    assert [name for name, _ in plan.providers] == [CUDA, CPU]
    assert plan.providers[0][1] | {"device_id": "2", "enable_cuda_graph": "1"} == plan.providers[0][1]
    assert (plan.device, plan.device_id) == ("cuda", 2)
    assert cuda().providers[0][1]["enable_cuda_graph"] == "0"


def test_all_options_are_text() -> None:
    """The runtime calls str() on whatever it gets, so that False would become a word it may not know."""
    plan = tensorrt(PROFILE, ["input_ids"], Path("e"), precision="bf16", timings=Path("t"))
    assert all(isinstance(value, str) for _, options in plan.providers for value in options.values())


def test_tensorrt_caches_where_it_is_told_and_falls_back_to_cuda() -> None:
    plan = tensorrt(PROFILE, ["input_ids"], Path("/e"), precision="fp16", timings=Path("/t"), device_id=1)
    assert [name for name, _ in plan.providers] == [TENSORRT, CUDA, CPU]
    options = plan.providers[0][1]
    assert (options["trt_engine_cache_enable"], options["trt_engine_cache_path"]) == ("1", "/e")
    assert (options["trt_timing_cache_enable"], options["trt_timing_cache_path"]) == ("1", "/t")
    assert {options["device_id"], plan.providers[1][1]["device_id"]} == {"1"}


def test_tensorrt_computes_in_one_low_precision() -> None:
    flags = ("trt_fp16_enable", "trt_bf16_enable", "trt_layer_norm_fp32_fallback")
    assert [on_tensorrt(precision="fp16")[flag] for flag in flags] == ["1", "0", "1"]
    assert [on_tensorrt(precision="bf16")[flag] for flag in flags] == ["0", "1", "1"]


def test_every_dynamic_input_has_its_shapes() -> None:
    options = PROFILE.options(["input_ids", "attention_mask"])
    assert options == {
        "trt_profile_min_shapes": "input_ids:1x2,attention_mask:1x2",
        "trt_profile_opt_shapes": "input_ids:8x64,attention_mask:8x64",
        "trt_profile_max_shapes": "input_ids:128x128,attention_mask:128x128",
    }


@given(st.integers(2, 8192), st.integers(1, 4096), st.integers(64, 1 << 20))
def test_profiles_reach_every_length_in_order(max_length: int, max_rows: int, max_tokens: int) -> None:
    profiles = shape_profiles(max_length, max_rows=max_rows, max_tokens=max_tokens)
    longest = [profile.max[1] for profile in profiles]
    assert longest == sorted(set(longest)) and longest[-1] == max_length
    for profile in profiles:
        assert profile.min == (1, 1), "a tokenizer may add no special tokens, and a text be one token"
        for axis in (0, 1):
            assert profile.min[axis] <= profile.opt[axis] <= profile.max[axis]
        assert profile.max[0] == 1 or profile.max[0] * profile.max[1] <= max_tokens


# Buckets


@given(st.integers(2, 1024), st.integers(1, 40), st.integers(1, 1024))
def test_the_bucket_is_the_smallest_that_takes_the_batch(max_length: int, rows: int, length: int) -> None:
    steps = ladder(max_length)
    bucket = steps.bucket_for(rows, length)
    fitting = [(r, n) for r in steps.rows for n in steps.lengths if r >= rows and n >= length]
    assert bucket == (min(fitting) if fitting else None)


@pytest.mark.parametrize(
    ("max_length", "lengths"),
    [
        (512, (16, 32, 64, 128, 256, 512)),
        (384, (16, 32, 64, 128, 256, 384)),
        (8192, (16, 32, 64, 128, 256, 512)),
        (8, (8,)),
    ],
)
def test_no_bucket_is_longer_than_the_backbone_takes(max_length: int, lengths: tuple[int, ...]) -> None:
    steps = ladder(max_length)
    assert steps.lengths == lengths and steps.rows == (1, 2, 4, 8, 16)
    assert len(steps) == 5 * len(lengths)


# Engine caches


@pytest.mark.parametrize("change", [{key: value} for key, value in (ELSEWHERE | CHANGED | ANOTHER).items()])
def test_whatever_an_engine_depends_on_gives_it_another_folder(change: dict[str, object]) -> None:
    changed = replace(KEY, **change)  # type: ignore[arg-type]
    assert changed.directory != KEY.directory
    assert replace(KEY).directory == KEY.directory


def test_timings_are_shared_by_models_but_not_by_gpus_or_versions() -> None:
    shared = ANOTHER | {"digest": "x", "graphs": "y"}
    assert replace(KEY, **shared).timings == KEY.timings  # type: ignore[arg-type]
    for change in ({"gpu": "B"}, {"compute_capability": "8.0"}, {"driver": "x"}, {"cuda": "x"}, {"tensorrt": "x"}):
        assert replace(KEY, **change).timings != KEY.timings  # type: ignore[arg-type]


def test_only_what_nothing_can_use_any_more_is_stale() -> None:
    stale = [replace(KEY, **{name: value}).directory for name, value in CHANGED.items()]  # type: ignore[arg-type]
    kept = [replace(KEY, **{name: value}).directory for name, value in (ELSEWHERE | ANOTHER).items()]  # type: ignore[arg-type]
    foreign = ["notes", f"{KEY.directory}.12.partial", "0" * 12, ""]
    assert stale_directories([KEY.directory, *stale, *kept, *foreign], KEY) == sorted(stale)
