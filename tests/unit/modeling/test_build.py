"""Candidates are what is installed and allowed; a GPU's engines say what is missing where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modeling.adapters import LoraLayout
from modeling.backbone import Backbone
from modeling.engines import onnx
from modeling.engines.build import REFERENCE, EngineOptions, EngineSpec, build_engine, candidates
from modeling.engines.graphs import GraphFiles
from modeling.errors import EngineFailed
from tests.support import graphs


@pytest.fixture
def files(tmp_path: Path) -> GraphFiles:
    files = GraphFiles(tmp_path)
    for path in (files.bare, files.lora):
        graphs.write_pooled(path)
    files.describe(LoraLayout(()), hidden_size=graphs.HIDDEN)
    return files


def names(device: str, **allowed: bool) -> list[str]:
    return [str(spec) for spec in candidates(device, **allowed)]


def test_a_gpu_gets_onnx_in_every_precision_where_its_build_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names("cuda") == ["torch/fp32", "torch/bf16", "torch/fp16"]
    monkeypatch.setattr(onnx, "has_gpu_build", lambda: True)
    assert names("cuda")[3:] == ["onnx/fp32", "onnx/bf16", "onnx/fp16"]
    assert names("cuda", allow_cuda_graphs=True)[6:] == ["onnx-graphs/bf16", "onnx-graphs/fp16"]
    assert names("cuda", allow_tensorrt=True)[6:] == ["tensorrt/bf16", "tensorrt/fp16"]
    assert names("cuda", allow_int8=True) == names("cuda")


def test_tensorrt_is_never_a_candidate_on_a_cpu() -> None:
    found = candidates("cpu", allow_tensorrt=True)
    assert found[0] == REFERENCE and "tensorrt" not in {spec.runtime for spec in found}


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        ("onnx/fp32", "no CUDAExecutionProvider"),
        ("onnx/fp16", "no CUDAExecutionProvider"),
        ("onnx-graphs/fp16", "no CUDAExecutionProvider"),
        ("onnx/int8", "not converted to int8"),
        ("tensorrt/fp16", "no TensorrtExecutionProvider"),
        ("tensorrt/int8", "not in int8"),
    ],
)
def test_what_is_missing_is_named(
    spec: str, missing: str, compiles: bool, backbone: Backbone, files: GraphFiles
) -> None:
    options = replace(EngineOptions(device="cuda"), compiles=compiles)
    with pytest.raises(EngineFailed, match=missing):
        build_engine(EngineSpec.parse(spec), backbone, files, options)


def test_tensorrt_needs_a_gpu(backbone: Backbone, files: GraphFiles) -> None:
    with pytest.raises(EngineFailed, match="no engine tensorrt/fp16"):
        build_engine(EngineSpec("tensorrt", "fp16"), backbone, files, EngineOptions())
