"""ONNX Runtime over the exported backbone. The one module that touches onnxruntime."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from modeling.adapters import Adapter
from modeling.backbone import Backbone
from modeling.engines.protocol import EngineBatch, pad
from modeling.errors import AdapterMismatch, EngineFailed
from modeling.weights import FloatArray


class OnnxEngine:
    """One session on one provider. LoRA versions of its backbone run elsewhere (`supports_adapters` is False)."""

    name = "onnx"
    precision = "fp32"
    supports_adapters = False

    def __init__(self, backbone: Backbone, model_file: Path, *, device: str = "cpu", threads: int = 0) -> None:
        self.device = device
        self._pad_id = _pad_id(backbone)
        try:
            self._session = _session(model_file, device, threads)
        except Exception as error:  # the runtime's own classes derive from Exception directly
            raise EngineFailed(f"ONNX Runtime could not load {model_file.name} ({type(error).__name__})") from error
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._bytes = model_file.stat().st_size

    def run(self, batch: EngineBatch) -> FloatArray:
        ids, mask, types = pad(batch.inputs, pad_id=self._pad_id)
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        try:
            (pooled,) = self._session.run(None, {name: feeds[name] for name in self._inputs})
        except Exception as error:
            raise EngineFailed(f"ONNX Runtime could not compute a batch ({type(error).__name__})") from error
        return np.asarray(pooled, dtype=np.float32)

    def load_adapter(self, key: str, adapter: Adapter) -> None:
        raise AdapterMismatch("the ONNX engine does not take adapters; they run on the torch engine")

    def unload_adapter(self, key: str) -> None:
        pass  # none was ever loaded

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


def _session(model_file: Path, device: str, threads: int) -> Any:
    import onnxruntime

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


def _pad_id(backbone: Backbone) -> int:
    from transformers import AutoConfig

    from modeling.backbone import read_config

    return int(AutoConfig.for_model(**read_config(backbone.folder)).pad_token_id or 0)
