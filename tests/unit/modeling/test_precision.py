"""Products change their precision, what is delicate does not, and the answers stay close."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from modeling.engines.graphs import GraphFiles
from modeling.errors import EngineFailed
from modeling.precision import low_precision_graphs, lower
from tests.support.graphs import save

TYPES = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
MIN_COSINE = {"bf16": 0.9999, "fp16": 0.999999}
HIDDEN = 16


@pytest.fixture
def block(tmp_path: Path) -> Path:
    """A piece of an encoder: product, bias, GELU, product, residual, layer norm, scores, softmax, product."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["up"], name="up"),
        helper.make_node("Add", ["up", "shared"], ["biased"], name="bias"),
        helper.make_node("Gelu", ["biased"], ["active"], name="gelu"),
        helper.make_node("MatMul", ["active", "w2"], ["down"], name="down"),
        helper.make_node("Add", ["down", "x"], ["residual"], name="residual"),
        helper.make_node("LayerNormalization", ["residual", "scale", "shared"], ["normed"], name="norm"),
        helper.make_node("Transpose", ["normed"], ["turned"], perm=[0, 2, 1], name="turn"),
        helper.make_node("MatMul", ["normed", "turned"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], name="softmax"),
        helper.make_node("MatMul", ["shares", "normed"], ["pooled"], name="mix"),
    ]
    draw = np.random.default_rng(0)
    weights = {
        "w1": draw.normal(size=(HIDDEN, HIDDEN)),
        "w2": draw.normal(size=(HIDDEN, HIDDEN)),
        "shared": draw.normal(size=HIDDEN),
        "scale": draw.normal(size=HIDDEN),
    }
    floats = {name: (value * 0.3).astype(np.float32) for name, value in weights.items()}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", HIDDEN])]
    return save(tmp_path / "block.onnx", nodes, inputs, floats, output=["batch", "length", HIDDEN])


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)
    }
    return values | {tensor.name: tensor.data_type for tensor in graph.initializer}


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    (answer,) = cast("list[np.ndarray]", ReferenceEvaluator(model).run(None, {"x": x}))
    return answer


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    a, b = (np.reshape(values, (-1, values.shape[-1])).astype(np.float64) for values in (ours, theirs))
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.mark.parametrize("precision", TYPES)
def test_products_and_what_lies_between_them_change_the_rest_does_not(block: Path, precision: str) -> None:
    lowered = lower(onnx.load(block), precision)
    types, low = types_of(lowered), TYPES[precision]
    read = {node.name: [types[name] for name in node.input] for node in lowered.graph.node}
    for name in ("up", "bias", "gelu", "down", "scores", "mix"):
        assert set(read[name]) == {low}, name
    for name in ("residual", "norm", "turn", "softmax"):
        assert set(read[name]) == {TensorProto.FLOAT}, name
    assert {value.name: types[value.name] for value in (*lowered.graph.input, *lowered.graph.output)} == {
        "x": TensorProto.FLOAT,
        "pooled": TensorProto.FLOAT,
    }


def test_weights_are_kept_in_the_precisions_that_are_read(block: Path) -> None:
    weights = {tensor.name: tensor.data_type for tensor in lower(onnx.load(block), "fp16").graph.initializer}
    assert weights == {
        "w1.fp16": TensorProto.FLOAT16,
        "w2.fp16": TensorProto.FLOAT16,
        "scale": TensorProto.FLOAT,
        "shared": TensorProto.FLOAT,
        "shared.fp16": TensorProto.FLOAT16,
    }


def test_a_value_is_cast_once_however_often_it_is_read(block: Path) -> None:
    lowered = lower(onnx.load(block), "fp16")
    cast = [node.input[0] for node in lowered.graph.node if node.op_type == "Cast"]
    assert sorted(cast) == sorted(set(cast))


@pytest.mark.parametrize("precision", TYPES)
def test_answers_stay_close(block: Path, precision: str) -> None:
    x = np.random.default_rng(1).normal(size=(3, 5, HIDDEN)).astype(np.float32)
    expected = run(onnx.load(block), x)
    lowered = lower(onnx.load(block), precision)
    found = run(lowered, x)
    assert found.dtype == np.float32 and not np.array_equal(found, expected)
    assert cosine(found, expected) > MIN_COSINE[precision]


def test_a_cpu_loads_fp16_though_it_gains_nothing(block: Path) -> None:
    x = np.random.default_rng(1).normal(size=(3, 5, HIDDEN)).astype(np.float32)
    lowered = lower(onnx.load(block), "fp16")
    session = onnxruntime.InferenceSession(lowered.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = run(onnx.load(block), x)
    assert cosine(session.run(None, {"x": x})[0], expected) > MIN_COSINE["fp16"]


def test_softmax_inside_of_attention_is_float32_too(tmp_path: Path) -> None:
    shape: list[int | str | None] = ["batch", 2, "length", 8]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("q", "k", "v")]
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Attention", ["q", "k", "v"], ["pooled"])], inputs, {}, output=shape
    )
    (attention,) = [node for node in lower(onnx.load(path), "bf16").graph.node if node.op_type == "Attention"]
    assert [a.i for a in attention.attribute if a.name == "softmax_precision"] == [TensorProto.FLOAT]


def test_a_weight_beyond_fp16_is_refused_and_fits_bf16(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])]
    weights = {"w": np.array([[1e5, 0], [0, 1]], dtype=np.float32)}
    path = save(
        tmp_path / "w.onnx", [helper.make_node("MatMul", ["x", "w"], ["pooled"])], inputs, weights, output=["batch", 2]
    )
    lower(onnx.load(path), "bf16")
    with pytest.raises(EngineFailed, match="weight w has values that fp16 cannot hold"):
        lower(onnx.load(path), "fp16")


def test_a_graph_with_branches_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "branch",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
    )
    nodes = [helper.make_node("If", ["condition"], ["pooled"], then_branch=branch, else_branch=branch)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])]
    path = save(tmp_path / "if.onnx", nodes, inputs, {"condition": np.array(True)}, output=["batch", 2])
    with pytest.raises(EngineFailed, match="branches"):
        lower(onnx.load(path), "fp16")


def test_both_graphs_are_written_once_beside_the_originals(block: Path, tmp_path: Path) -> None:
    files = GraphFiles(tmp_path / "graphs")
    files.folder.mkdir()
    for path in (files.bare, files.lora):
        path.write_bytes(block.read_bytes())
    lowered = low_precision_graphs(files, "fp16")
    assert sorted(path.name for path in files.folder.iterdir()) == [
        "backbone.fp16.onnx",
        "backbone.onnx",
        "lora.fp16.onnx",
        "lora.onnx",
    ]
    written = lowered.bare.stat().st_mtime_ns
    low_precision_graphs(files, "fp16")
    assert lowered.bare.stat().st_mtime_ns == written
    with pytest.raises(EngineFailed, match="fp8"):
        low_precision_graphs(files, "fp8")


def test_a_file_that_is_no_graph_is_an_engine_failure(tmp_path: Path) -> None:
    files = GraphFiles(tmp_path)
    model = helper.make_model(helper.make_graph([helper.make_node("NoSuchOperator", ["x"], ["y"])], "g", [], []))
    onnx.save(model, files.bare)
    with pytest.raises(EngineFailed, match=r"^backbone\.onnx could not be converted to \w+ \(\w+\)$"):  # and no path
        low_precision_graphs(files, "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.onnx"]
