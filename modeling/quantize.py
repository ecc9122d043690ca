"""Int8 weights for the exported graphs, by ONNX Runtime's dynamic quantisation.

Activations are quantised at run time, weights once and per output channel (QInt8): what ONNX Runtime's
documentation advises for transformers. Heads, LoRA and layer norms stay in float. Whether the result is
good enough is for the measurement to say.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from model_registry.logs import errors_alone
from modeling.engines.graphs import GraphFiles
from modeling.engines.onnx import runtime

SUFFIX = "int8"


def int8_graphs(files: GraphFiles, *, has_vnni: bool) -> GraphFiles:
    """The same graphs with int8 weights, beside the originals; at once if they are there. Blocking, tens of seconds.

    Without VNNI, 8-bit products saturate in 16-bit sums, so weights get 7 bits (`reduce_range`).
    """
    return files.converted(SUFFIX, partial(_quantize, reduce_range=not has_vnni))


def _quantize(source: Path, target: Path, *, reduce_range: bool) -> None:
    runtime()  # imported here first, it would be with its telemetry
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with errors_alone(""):  # it advises a pre-processing that dynamo's graphs do not need
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
