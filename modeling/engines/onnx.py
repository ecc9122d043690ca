"""ONNX Runtime over the exported graphs: sessions for every provider, and the engine on the CPU."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modeling.engines import providers
from modeling.engines.graphs import POOLED, GraphEngine, GraphFiles, graph_bytes
from modeling.engines.protocol import Collate
from modeling.engines.providers import SessionPlan
from modeling.engines.slots import Stack
from modeling.errors import EngineFailed
from modeling.weights import FloatArray


def onnx_engine(
    files: GraphFiles,
    collate: Collate,
    *,
    precision: str = "fp32",
    threads: int = 0,
    adapter_slots: int = 32,
    slots_budget_bytes: int = 1 << 40,
) -> GraphEngine:
    """The backbone in fp32, or with its weights in int8. ONNX Runtime has no bf16 or fp16 products on x86 CPUs."""
    return GraphEngine(
        "onnx",
        files,
        lambda path: OnnxSession(path, threads=threads),
        collate,
        device="cpu",
        precision=precision,
        adapter_slots=adapter_slots,
        slots_budget_bytes=slots_budget_bytes,
    )


class OnnxSession:
    """One graph on the CPU."""

    def __init__(self, model_file: Path, *, threads: int = 0) -> None:
        self._session = open_session(model_file, providers.cpu(threads=threads))
        self._stacks: dict[str, Any] = {}
        self._bytes = graph_bytes(model_file)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] = (POOLED,)) -> list[FloatArray]:
        try:
            found = self._session.run(list(outputs), {**feeds, **self._stacks})
        except Exception as error:
            raise EngineFailed(f"ONNX Runtime could not compute a batch ({type(error).__name__})") from error
        return [np.asarray(values, dtype=np.float32) for values in found]

    def bind(self, stacks: Mapping[str, Stack]) -> None:
        self._stacks = dict(stacks)

    def memory_bytes(self) -> int:
        return self._bytes


def refuse_both_wheels() -> None:
    """Raises `EngineFailed` where onnxruntime and onnxruntime-gpu are both installed: they overwrite each other."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) > 1:
        raise EngineFailed(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "uninstall both, then install one of polyhead[cpu] and polyhead[gpu]"
        )


def is_available() -> bool:
    return _is_installed("onnxruntime") or has_gpu_build()


def has_gpu_build() -> bool:
    return _is_installed("onnxruntime-gpu")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def runtime() -> Any:
    """The package without its telemetry: from 1.31 on it keeps an identifier and events in the home folder."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # noqa: TID251 - set, not read: it has no other switch
    import onnxruntime

    return onnxruntime


def open_session(model_file: Path, plan: SessionPlan) -> Any:
    """An `onnxruntime.InferenceSession`. Raises `EngineFailed`, also where the plan's first provider does not start:

    ONNX Runtime would go on with the next one and say so in its log alone.
    """
    onnxruntime = runtime()
    first = plan.providers[0][0]
    refuse_without(first)
    if plan.device == "cuda":
        onnxruntime.preload_dlls()  # CUDA's libraries from NVIDIA's packages, where torch has not loaded them
    options = onnxruntime.SessionOptions()
    for name, value in plan.attributes.items():
        setattr(options, name, value)
    for key, entry in plan.entries.items():
        options.add_session_config_entry(key, entry)
    try:
        session = onnxruntime.InferenceSession(str(model_file), options, list(plan.providers), enable_fallback=0)
    except Exception as error:  # the runtime's own classes derive from Exception directly
        raise EngineFailed(f"ONNX Runtime could not load {model_file.name} ({type(error).__name__})") from error
    if session.get_providers()[0] != first:
        raise EngineFailed(f"{first} did not start; {INSTALL.get(first, '')}")
    return session


def refuse_without(provider: str) -> None:
    """Raises `EngineFailed` where the installed ONNX Runtime was built without `provider`."""
    if provider not in runtime().get_available_providers():
        raise EngineFailed(f"the installed ONNX Runtime has no {provider}; {INSTALL.get(provider, '')}")


# Both are built for CUDA 13; the second wants TensorRT 10, from 10.14 on with attention as one operator.
INSTALL = {
    providers.CUDA: "install polyhead[gpu] in place of polyhead[cpu], and torch for CUDA 13",
    providers.TENSORRT: "install polyhead[gpu] in place of polyhead[cpu], and 'tensorrt-cu13>=10.14,<11'",
}
