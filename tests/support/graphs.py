"""Small graphs with the inputs and the output of an exported backbone, written in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from modeling.weights import FloatArray, IntArray

VOCABULARY, HIDDEN = 50, 6
TOKENS = ("input_ids", "attention_mask", "token_type_ids")


def write_pooled(path: Path, *, has_stack: bool = False) -> Path:
    """The mean of embeddings under the mask, times the second half's share; with a stack, plus the row of the slot."""
    tokens = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in TOKENS]
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask_3d"]),
        helper.make_node("Mul", ["embedded", "mask_3d"], ["seen"]),
        helper.make_node("ReduceSum", ["seen", "second"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask_3d", "second"], ["count"], keepdims=0),
        helper.make_node("Div", ["total", "count"], ["mean"]),
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["types", "second"], ["types_total"], keepdims=1),
        helper.make_node("Add", ["mean", "types_total"], ["summed" if has_stack else "pooled"]),
    ]
    if has_stack:
        tokens += [
            helper.make_tensor_value_info("lora_slots", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("lora_a.0", TensorProto.FLOAT, ["slots", HIDDEN]),
        ]
        nodes += [
            helper.make_node("Gather", ["lora_a.0", "lora_slots"], ["change"]),
            helper.make_node("Add", ["summed", "change"], ["pooled"]),
        ]
    weights = {
        "embeddings": np.random.default_rng(0).normal(size=(VOCABULARY, HIDDEN)).astype(np.float32),
        "second": np.array([1]),
        "last": np.array([-1]),
    }
    return save(path, nodes, tokens, weights, output=["batch", HIDDEN])


def feeds(rows: int, length: int, *, seed: int = 0) -> dict[str, IntArray]:
    """Random rows, each of a length of its own up to `length`, which the first one has."""
    draw = np.random.default_rng(seed)
    lengths = np.array([length, *draw.integers(1, length + 1, size=rows - 1)])
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    ids, types = draw.integers(1, VOCABULARY, size=(rows, length)), draw.integers(0, 2, size=(rows, length))
    return dict(zip(TOKENS, (ids * mask, mask, types * mask), strict=True))


def expected(path: Path, inputs: Mapping[str, np.ndarray]) -> FloatArray:
    """What a plain session computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(inputs))[0])


def save(
    path: Path,
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, np.ndarray],
    *,
    output: Sequence[int | str | None],
) -> Path:
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    pooled = helper.make_tensor_value_info("pooled", TensorProto.FLOAT, output)
    graph = helper.make_graph(nodes, "graph", inputs, [pooled], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
