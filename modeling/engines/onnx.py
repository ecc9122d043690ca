"""ONNX Runtime over the exported graphs. The one module that touches onnxruntime."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modeling.engines.graphs import GraphEngine, GraphFiles
from modeling.engines.slots import Stack
from modeling.errors import EngineFailed
from modeling.weights import FloatArray, IntArray


def onnx_engine(
    files: GraphFiles, *, precision: str = "fp32", device: str = "cpu", threads: int = 0, adapter_slots: int = 32,
    slots_budget_bytes: int = 1 << 40,
) -> GraphEngine:  # fmt: skip
    """The backbone in fp32, or with its weights in int8. ONNX Runtime has no bf16 or fp16 products on x86 CPUs."""
    return GraphEngine(
        "onnx", files, lambda path: OnnxSession(path, device=device, threads=threads), device=device,
        precision=precision, adapter_slots=adapter_slots, slots_budget_bytes=slots_budget_bytes,
    )  # fmt: skip


class OnnxSession:
    """One graph on one provider."""

    def __init__(self, model_file: Path, *, device: str = "cpu", threads: int = 0) -> None:
        try:
            self._session = _session(model_file, device, threads)
        except Exception as error:  # the runtime's own classes derive from Exception directly
            raise EngineFailed(f"ONNX Runtime could not load {model_file.name} ({type(error).__name__})") from error
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._stacks: dict[str, Any] = {}
        self._bytes = model_file.stat().st_size

    def run(self, feeds: Mapping[str, IntArray]) -> FloatArray:
        tokens = {name: value for name, value in feeds.items() if name in self._inputs}
        try:
            (pooled,) = self._session.run(None, tokens | self._stacks)
        except Exception as error:
            raise EngineFailed(f"ONNX Runtime could not compute a batch ({type(error).__name__})") from error
        return np.asarray(pooled, dtype=np.float32)

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
    return _is_installed("onnxruntime") or _is_installed("onnxruntime-gpu")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _onnxruntime() -> Any:
    """The package without its telemetry: from 1.31 on it keeps an identifier and events in the home folder."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # noqa: TID251 - set, not read: it has no other switch
    import onnxruntime

    return onnxruntime


def _session(model_file: Path, device: str, threads: int) -> Any:
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Spinning workers burn seconds of CPU after every run, taken from the event loop in this process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        providers = [("CUDAExecutionProvider", {"device_id": index}), *providers]  # type: ignore[list-item]
    return onnxruntime.InferenceSession(str(model_file), options, providers=providers)
