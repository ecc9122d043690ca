"""TensorRT, by ONNX Runtime's provider: engines are compiled ahead, never while somebody waits for an answer.

`build_tensorrt` compiles, for minutes; `tensorrt_engine` opens what was compiled. TensorRT computes rows without an
adapter. The adapters' graph, whose inputs change their shapes as adapters come, stays on CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modeling.engines import providers
from modeling.engines.device import DeviceFingerprint, fingerprint
from modeling.engines.graphs import POOLED, GraphEngine, GraphFiles, Session
from modeling.engines.onnx import INSTALL, refuse_without
from modeling.engines.onnx_gpu import GpuSession, batch_shape, cuda_session, device_id
from modeling.engines.providers import (
    TENSORRT,
    EngineCacheKey,
    SessionPlan,
    ShapeProfile,
    stale_directories,
)
from modeling.engines.slots import Stack
from modeling.errors import EngineFailed
from modeling.inputs.base import Preprocessor
from modeling.precision import low_precision_graphs
from modeling.weights import FloatArray


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine: its folder, which is there once it is compiled, the timings it shares with other models' engines,
    and its session with the engine in a given folder."""

    key: EngineCacheKey
    engine: Path
    timings: Path
    session: Callable[[Path], SessionPlan]


def build_tensorrt(files: GraphFiles, *, digest: str, max_length: int, precision: str, device: str = "cuda") -> float:
    """Compiles what is not there yet and returns the seconds it took. `digest` is that of the weights.

    Minutes of a busy GPU and a busy core: for a process of its own, or at least a thread that answers no request.
    Raises `EngineFailed`, with what to install where something is missing.
    """
    plans = _plans(files, digest=digest, max_length=max_length, precision=precision, device=device)
    low_precision_graphs(files, precision)  # for the adapters, so that none of them waits for it
    return fill_caches(files.bare, plans)


def tensorrt_engine(
    files: GraphFiles,
    preprocessor: Preprocessor,
    *,
    digest: str,
    max_length: int,
    precision: str,
    device: str = "cuda",
    adapter_slots: int = 32,
    slots_budget_bytes: int = 1 << 40,
) -> GraphEngine:
    """The engines that `build_tensorrt` left. Raises `EngineFailed` where they are missing: it compiles nothing."""
    plans = _plans(files, digest=digest, max_length=max_length, precision=precision, device=device)
    if not all(plan.engine.is_dir() for plan in plans):
        raise EngineFailed("TensorRT's engines are not built for this model, GPU and these versions of its libraries")

    def open_graph(path: Path) -> Session:
        if path == files.bare:
            sessions = [GpuSession(path, plan.session(plan.engine), padding=preprocessor.padding) for plan in plans]
            return TensorrtSession([(plan.key.profile, session) for plan, session in zip(plans, sessions, strict=True)])
        adapted = low_precision_graphs(files, precision).lora
        return cuda_session(adapted, padding=preprocessor.padding, precision=precision, device_id=device_id(device))

    return GraphEngine(
        "tensorrt",
        files,
        open_graph,
        preprocessor.collate,
        device=device,
        precision=precision,
        adapter_slots=adapter_slots,
        slots_budget_bytes=slots_budget_bytes,
    )


class TensorrtSession:
    """One graph as several engines, each with its profile, the shortest rows first. Rows beyond a profile's are cut
    into several runs: a shape outside of it would have TensorRT compile anew."""

    def __init__(self, engines: Sequence[tuple[ShapeProfile, Session]]) -> None:
        self._engines = engines

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] = (POOLED,)) -> list[FloatArray]:
        rows, length = batch_shape(feeds)
        for profile, session in self._engines:
            most, longest = profile.max
            if length <= longest:
                parts = [
                    session.run({name: values[start : start + most] for name, values in feeds.items()}, outputs)
                    for start in range(0, rows, most)
                ]
                return [np.concatenate(found) for found in zip(*parts, strict=True)]
        raise EngineFailed(f"{length} positions are more than TensorRT's engines were built for")

    def bind(self, stacks: Mapping[str, Stack]) -> None:
        for _, session in self._engines:
            session.bind(stacks)

    def memory_bytes(self) -> int:
        """Each engine has its own weights, in half the bits of the graph's."""
        return sum(session.memory_bytes() for _, session in self._engines) // 2


def engine_plans(
    files: GraphFiles,
    inputs: Sequence[str],
    *,
    digest: str,
    max_length: int,
    precision: str,
    gpu: DeviceFingerprint,
    device: int,
    version: str,
) -> list[EnginePlan]:
    """One per profile. Pure: `inputs` are the graph's, `version` is TensorRT's."""
    root = files.folder.parent / "tensorrt"
    plans = []
    for profile in providers.shape_profiles(max_length):
        key = EngineCacheKey(
            digest=digest,
            graphs=files.folder.name,
            precision=precision,
            profile=profile,
            gpu=gpu.name,
            compute_capability=gpu.compute_capability,
            driver=gpu.driver,
            cuda=gpu.libraries.get("cuda", ""),
            tensorrt=version,
            onnxruntime=gpu.libraries.get("onnxruntime-gpu", ""),
        )
        timings = root / "timings" / key.timings
        session = partial(providers.tensorrt, profile, inputs, precision=precision, timings=timings, device_id=device)
        plans.append(EnginePlan(key, root / "engines" / key.directory, timings, session))
    return plans


def fill_caches(model_file: Path, plans: Sequence[EnginePlan]) -> float:
    """Opens and runs a session for each engine that is missing, which writes it; removes what is stale. Seconds."""
    started = time.perf_counter()
    for plan in plans:
        if not plan.engine.is_dir():
            _compile(model_file, plan)
        for name in stale_directories([path.name for path in plan.engine.parent.iterdir()], plan.key):
            shutil.rmtree(plan.engine.with_name(name), ignore_errors=True)
    return time.perf_counter() - started


def _compile(model_file: Path, plan: EnginePlan) -> None:
    """In a folder beside, since others look for the engine while it is written."""
    partial_folder = plan.engine.with_name(f"{plan.engine.name}.{os.getpid()}.partial")
    for folder in (partial_folder, plan.timings):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        session = GpuSession(model_file, plan.session(partial_folder), padding={})
        # What is not compiled with the session is compiled with its first run.
        session.run({name: np.ones(plan.key.profile.opt, dtype=np.int64) for name in _inputs(model_file)})
        if not any(partial_folder.glob("*.engine")):
            raise EngineFailed(f"TensorRT took no part of {model_file.name}")
        with contextlib.suppress(OSError):  # another process was first
            partial_folder.rename(plan.engine)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _plans(files: GraphFiles, *, digest: str, max_length: int, precision: str, device: str) -> list[EnginePlan]:
    if precision not in {"bf16", "fp16"}:
        raise EngineFailed(f"TensorRT computes in bf16 or fp16 here, not in {precision}")
    refuse_without(TENSORRT)
    version = _version()
    if version is None:
        raise EngineFailed(f"TensorRT's libraries are not installed; {INSTALL[TENSORRT]}")
    return engine_plans(
        files,
        _inputs(files.bare),
        digest=digest,
        max_length=max_length,
        precision=precision,
        gpu=fingerprint(device),
        device=device_id(device),
        version=version,
    )


def _version() -> str | None:
    """Of the library that ONNX Runtime will load. NVIDIA's package, if it is there, must be imported to be found."""
    with contextlib.suppress(ImportError, OSError):
        if importlib.util.find_spec("tensorrt") is not None:
            return str(importlib.import_module("tensorrt").__version__)
        return version_text(ctypes.CDLL("libnvinfer.so.10").getInferLibVersion())
    return None


def version_text(number: int) -> str:
    """`NV_TENSORRT_VERSION` of NvInferVersion.h, from TensorRT 10 on: major × 10000 + minor × 100 + patch."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _inputs(model_file: Path) -> list[str]:
    import onnx

    return [node.name for node in onnx.load(model_file, load_external_data=False).graph.input]
