"""One LoRA adapter's weights added into a copy of the bare graph: `python -m modeling.merge`, a request on stdin.

The graph says of each product which layer of the encoder it is, so neither torch nor another export is needed. Runs as
a process of its own at low priority, since reading and writing a graph holds the interpreter for as long as the weights
are large. What fails is the last line of its stderr.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from model_registry.manifest import FileEntry
from modeling.adapters import Adapter
from modeling.child_process import run_in_background
from modeling.engines.graphs import GraphEngine
from modeling.engines.protocol import Engine
from modeling.errors import AdapterMismatch, EngineFailed, ModelingError
from modeling.weights import FloatArray

if TYPE_CHECKING:
    import onnx

# TensorRT's engines hold their weights compiled, int8 graphs hold them rounded, and no CUDA graph can be captured
# beside an engine that serves.
_RUNTIMES = frozenset({"onnx", "openvino"})
_VARIANTS = frozenset({"", "bf16", "fp16"})
_SCOPES = "pkg.torch.onnx.name_scopes"
_ENCODER = "encoder."  # what the exported module calls the backbone


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """Files and folders by path: the bare graph in float32, the adapter's folder, and the graph to write. `variant` is
    the precision that the engine wants its files in, empty for float32."""

    bare: str
    adapter: str
    target: str
    variant: str = ""
    niceness: int = 10


def can_merge(engine: Engine) -> TypeGuard[GraphEngine]:
    """Whether rows of one adapter can run on a graph of their own there."""
    return isinstance(engine, GraphEngine) and engine.name in _RUNTIMES and engine.files.suffix in _VARIANTS


def adapter_digest(files: Sequence[FileEntry]) -> str:
    """Of a version's files, those that make its adapter."""
    entries = sorted((entry.path, entry.sha256) for entry in files if entry.path.startswith("adapter/"))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:32]


def write_merged(request: MergeRequest) -> Path:
    """Writes the graph, then removes those of other adapters beside it. Raises `ModelingError`."""
    import onnx

    from modeling.precision import lower

    target = Path(request.target)
    temporary = partial_file(target, os.getpid())
    model = add_adapter(onnx.load(request.bare), Adapter.read(Path(request.adapter)))
    try:
        onnx.save(lower(model, request.variant) if request.variant else model, temporary)
        temporary.replace(target)
    except ValueError as error:  # protobuf ends at 2 GiB
        raise EngineFailed(f"the merged graph could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    for other in target.parent.glob("merged-*.onnx"):
        if other != target:
            other.unlink(missing_ok=True)
    return target


def partial_file(target: Path, process_id: int) -> Path:
    """What that process writes before `target` is complete; it stays behind where the process is killed."""
    return target.with_name(f"{target.name}.{process_id}.partial")


def add_adapter(model: onnx.ModelProto, adapter: Adapter) -> onnx.ModelProto:
    """Changes `model`, a bare graph in float32, to compute with `W + B·A`. Raises `AdapterMismatch`, `EngineFailed`.

    A layer that runs several times stays one weight; equal weights that the exporter keeps once come apart.
    """
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    merged: dict[str, onnx.TensorProto] = {}
    displaced = set()
    for node in graph.node:
        name = _layer(node)
        if name is None or name not in adapter.pairs:
            continue
        weight = weights.get(node.input[1])
        if node.op_type != "MatMul" or weight is None:
            raise EngineFailed(f"the export computes {name} in another way than as one product")
        if name not in merged:
            values = numpy_helper.to_array(weight)
            pair = adapter.pairs[name]
            if values.shape != (pair.a.shape[1], pair.b.shape[0]) or values.dtype != np.float32:
                raise AdapterMismatch(f"{name}: the graph has {values.dtype}{list(values.shape)}")
            change: FloatArray = (pair.b @ pair.a).T
            merged[name] = numpy_helper.from_array(np.ascontiguousarray(values + change), f"{name}.merged")
        displaced.add(node.input[1])
        node.input[1] = merged[name].name
    missing = sorted(set(adapter.pairs) - set(merged))
    if missing:
        raise AdapterMismatch(f"the graph has no linear layer {missing[0][:100]!r}")
    displaced -= {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in displaced]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *merged.values()])
    return model


def _layer(node: onnx.NodeProto) -> str | None:
    """The encoder's linear layer that a node belongs to, by what the exporter noted; None for anything else."""
    if node.op_type not in {"MatMul", "Gemm"}:
        return None
    notes = {note.key: note.value for note in node.metadata_props}
    scopes = ast.literal_eval(notes.get(_SCOPES, "[]"))
    if len(scopes) < 2 or not scopes[-2].startswith(_ENCODER):
        return None
    return str(scopes[-2].removeprefix(_ENCODER))


def main() -> None:
    request = MergeRequest(**json.loads(sys.stdin.readline()))
    run_in_background(request.niceness)
    try:
        write_merged(request)
    except (ModelingError, OSError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
