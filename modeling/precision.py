"""Exported graphs in bf16 or fp16, for GPUs: what autocast does in torch, done once to the file.

Products (MatMul, Gemm, Attention) take and give the low precision, and so do cheap operators between them. Layer
norms, softmax, sums, the residual stream and everything unknown stay in float32, and so do the graph's inputs and
its output. ONNX Runtime's own converter (onnxruntime.transformers.float16) knows no bf16 and leaves nodes
out of order (onnx.checker refuses its result for these graphs); onnxconverter-common is no longer maintained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from modeling.engines.graphs import GraphFiles
from modeling.errors import EngineFailed

# Both groups have kernels for bf16 and fp16 in ONNX Runtime's CUDA provider (1.31.1).
_PRODUCTS = frozenset({"Attention", "Gemm", "MatMul"})
_BETWEEN = frozenset(
    {
        "Add",
        "Concat",
        "Erf",
        "Expand",
        "Gather",
        "Gelu",
        "Mul",
        "Relu",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tanh",
        "Transpose",
        "Unsqueeze",
    }
)
_TYPES: dict[str, tuple[Any, int]] = {
    "bf16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16),
    "fp16": (np.float16, TensorProto.FLOAT16),
}


def low_precision_graphs(files: GraphFiles, precision: str) -> GraphFiles:
    """The same graphs in `bf16` or `fp16`, beside the originals; at once if they are there. Raises `EngineFailed`."""
    if precision not in _TYPES:
        raise EngineFailed(f"graphs are not converted to {precision}")
    return files.converted(precision, lambda source, target: onnx.save(lower(onnx.load(source), precision), target))


def lower(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Changes `model` and returns it. Raises `EngineFailed` where a weight does not fit or the graph branches."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    floats = {
        value.name
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    graph = model.graph
    lowering = _Lowering(precision, floats, graph.initializer)
    for node in graph.node:
        lowering.add(node)
    for output in graph.output:
        lowering.read(output.name, is_low=False)
    _replace(graph.node, lowering.nodes)
    used = {name for node in lowering.nodes for name in node.input} | {output.name for output in graph.output}
    _replace(graph.initializer, [tensor for tensor in lowering.initializers.values() if tensor.name in used])
    del graph.value_info[:]  # written for the values as they were
    onnx.checker.check_model(model, full_check=True)  # every operator takes the types it now gets
    return model


class _Lowering:
    """The nodes of the new graph so far. A value keeps its name in float32 and has a second one in low precision."""

    def __init__(self, precision: str, floats: set[str], initializers: Iterable[TensorProto]) -> None:
        self._suffix = precision
        self._dtype, self._type = _TYPES[precision]
        self.initializers = {tensor.name: tensor for tensor in initializers}
        self._weights = {name for name, tensor in self.initializers.items() if tensor.data_type == TensorProto.FLOAT}
        self._floats = floats | self._weights
        self._computed_low: set[str] = set()  # by their names in float32
        self._made: set[str] = set()  # names of casts and lowered weights
        self.nodes: list[NodeProto] = []

    def add(self, node: NodeProto) -> None:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise EngineFailed(f"a graph with branches ({node.op_type}) is not converted")
        is_low = self._is_low(node)
        changed = NodeProto()
        changed.CopyFrom(node)
        for index, name in enumerate(node.input):
            if name in self._floats:
                changed.input[index] = self.read(name, is_low=is_low)
        if is_low:
            for index, name in enumerate(node.output):
                if name in self._floats:
                    self._computed_low.add(name)
                    changed.output[index] = self._lowered(name)
            if node.op_type == "Attention":
                # GPU kernels do so whatever is asked for (onnxruntime#27714); here the file says so.
                changed.attribute.append(helper.make_attribute("softmax_precision", TensorProto.FLOAT))
        self.nodes.append(changed)

    def read(self, name: str, *, is_low: bool) -> str:
        """The value's name in the precision wanted, after a cast where it is computed in the other."""
        if is_low == (name in self._computed_low):
            return self._lowered(name) if is_low else name
        wanted = self._lowered(name) if is_low else name
        if wanted not in self._made:
            self._made.add(wanted)
            if name in self._weights:
                self.initializers[wanted] = self._lowered_weight(name)
            else:
                source = name if is_low else self._lowered(name)
                to = self._type if is_low else TensorProto.FLOAT
                self.nodes.append(helper.make_node("Cast", [source], [wanted], name=f"cast_{wanted}", to=to))
        return wanted

    def _is_low(self, node: NodeProto) -> bool:
        if node.domain not in {"", "ai.onnx"}:
            return False
        read = {name for name in node.input if name in self._floats}
        if node.op_type in _PRODUCTS:
            return bool(read)
        return (
            node.op_type in _BETWEEN
            and not read.isdisjoint(self._computed_low)
            and (read <= self._computed_low | self._weights)
        )

    def _lowered(self, name: str) -> str:
        return f"{name}.{self._suffix}"

    def _lowered_weight(self, name: str) -> TensorProto:
        weight = numpy_helper.to_array(self.initializers[name])
        with np.errstate(over="ignore"):
            lowered = weight.astype(self._dtype)
        if not np.isfinite(lowered.astype(np.float32)).all():
            raise EngineFailed(f"the weight {name} has values that {self._suffix} cannot hold")
        return numpy_helper.from_array(lowered, self._lowered(name))


def _replace(field: Any, values: Iterable[Any]) -> None:
    kept = list(values)
    del field[:]
    field.extend(kept)
