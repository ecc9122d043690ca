"""Engines by name: the one place that knows which runtimes and precisions there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modeling.backbone import Backbone
from modeling.engines.device import fingerprint, has_vnni
from modeling.engines.graphs import GraphFiles
from modeling.errors import EngineFailed
from modeling.inputs import Preprocessor, open_preprocessor

if TYPE_CHECKING:
    from modeling.engines.protocol import Engine


@dataclass(frozen=True, slots=True, order=True)
class EngineSpec:
    """A runtime and the precision it computes in, written `openvino/bf16`."""

    runtime: str
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.runtime}/{self.precision}"

    @classmethod
    def parse(cls, text: str) -> EngineSpec:
        runtime, _, precision = text.partition("/")
        return cls(runtime, precision or "fp32")

    @property
    def needs_graphs(self) -> bool:
        return self.runtime not in {"torch", COMPILED}


COMPILED = "torch-compile"
CAPTURED = "onnx-graphs"
TENSORRT = "tensorrt"
REFERENCE = EngineSpec("torch", "fp32")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What every engine of a process shares. `threads` 0: one per core. `compiles`: TensorRT's engines may be built."""

    device: str = "cpu"
    threads: int = 0
    adapter_slots: int = 32
    slots_budget_bytes: int = 1 << 40
    compiles: bool = False


def candidates(
    device: str,
    *,
    allow_int8: bool = False,
    allow_compile: bool = False,
    allow_cuda_graphs: bool = False,
    allow_tensorrt: bool = False,
) -> list[EngineSpec]:
    """What is installed and makes sense on `device`, the reference first."""
    from modeling.engines import onnx, openvino

    if device != "cpu":
        found = [REFERENCE, EngineSpec("torch", "bf16"), EngineSpec("torch", "fp16")]
        found += [EngineSpec(COMPILED, "bf16"), EngineSpec(COMPILED, "fp16")] if allow_compile else []
        if onnx.has_gpu_build():
            found += [EngineSpec("onnx"), EngineSpec("onnx", "bf16"), EngineSpec("onnx", "fp16")]
            found += [EngineSpec(CAPTURED, "bf16"), EngineSpec(CAPTURED, "fp16")] if allow_cuda_graphs else []
            found += [EngineSpec(TENSORRT, "bf16"), EngineSpec(TENSORRT, "fp16")] if allow_tensorrt else []
        return found
    found = [REFERENCE]
    has_openvino = openvino.is_available()
    is_bf16_fast = has_openvino and openvino.supports_bf16()
    if is_bf16_fast:
        found.append(EngineSpec("torch", "bf16"))
    if allow_compile:
        found += [EngineSpec(COMPILED)] + ([EngineSpec(COMPILED, "bf16")] if is_bf16_fast else [])
    if onnx.is_available():
        found += [EngineSpec("onnx")] + ([EngineSpec("onnx", "int8")] if allow_int8 else [])
    if has_openvino:
        found += [EngineSpec("openvino")] + ([EngineSpec("openvino", "bf16")] if is_bf16_fast else [])
    return found


def build_engine(spec: EngineSpec, backbone: Backbone, files: GraphFiles | None, options: EngineOptions) -> Engine:
    """Opens the engine. Raises `EngineFailed` where the runtime is missing or refuses the graph."""
    if spec.runtime in {"torch", COMPILED}:
        import torch

        from modeling.engines.torch import TorchEngine

        if options.threads:
            torch.set_num_threads(options.threads)
        return TorchEngine(
            backbone,
            device=options.device,
            precision=spec.precision,
            adapter_slots=options.adapter_slots,
            slots_budget_bytes=options.slots_budget_bytes,
            is_compiled=spec.runtime == COMPILED,
        )
    if files is None or not files.is_complete:
        raise EngineFailed(f"{spec} needs the exported graphs, which are missing or damaged")
    slots, budget = options.adapter_slots, options.slots_budget_bytes
    preprocessor = open_preprocessor(backbone)
    if options.device.startswith("cuda") and spec.runtime in {"onnx", CAPTURED, TENSORRT}:
        return _build_on_gpu(spec, backbone, files, preprocessor, options)
    if spec.runtime == "onnx":
        from modeling.engines.onnx import onnx_engine

        if spec.precision == "int8":
            from modeling.quantize import int8_graphs

            files = int8_graphs(files, has_vnni=has_vnni(fingerprint(options.device)))
        return onnx_engine(
            files,
            preprocessor.collate,
            precision=spec.precision,
            threads=options.threads,
            adapter_slots=slots,
            slots_budget_bytes=budget,
        )
    if spec.runtime == "openvino":
        from modeling.engines.openvino import openvino_engine

        return openvino_engine(
            files,
            preprocessor.collate,
            max_length=backbone.info.max_length,
            precision=spec.precision,
            threads=options.threads,
            adapter_slots=slots,
            slots_budget_bytes=budget,
        )
    raise EngineFailed(f"there is no engine {spec}")


def _build_on_gpu(
    spec: EngineSpec, backbone: Backbone, files: GraphFiles, preprocessor: Preprocessor, options: EngineOptions
) -> Engine:
    from modeling.engines.onnx_gpu import cuda_engine
    from modeling.engines.providers import ladder
    from modeling.engines.tensorrt import build_tensorrt, tensorrt_engine
    from modeling.precision import low_precision_graphs

    digest, max_length, device = backbone.info.digest, backbone.info.max_length, options.device
    slots, budget = options.adapter_slots, options.slots_budget_bytes
    if spec.runtime == TENSORRT:
        if options.compiles:
            build_tensorrt(files, digest=digest, max_length=max_length, precision=spec.precision, device=device)
        return tensorrt_engine(
            files,
            preprocessor,
            digest=digest,
            max_length=max_length,
            precision=spec.precision,
            device=device,
            adapter_slots=slots,
            slots_budget_bytes=budget,
        )
    if spec.precision != "fp32":
        files = low_precision_graphs(files, spec.precision)
    captured = ladder(max_length) if spec.runtime == CAPTURED else None
    return cuda_engine(
        files,
        preprocessor,
        precision=spec.precision,
        device=device,
        ladder=captured,
        adapter_slots=slots,
        slots_budget_bytes=budget,
    )
