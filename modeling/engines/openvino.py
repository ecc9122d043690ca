"""OpenVINO over the exported graphs. The one module that touches openvino."""

from __future__ import annotations

import importlib.util
import operator
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from model_registry.spare_time import spare
from modeling.engines.graphs import POOLED, STATES, GraphEngine, GraphFiles, graph_bytes
from modeling.engines.protocol import Collate, stepped_width
from modeling.engines.slots import Stack
from modeling.errors import EngineFailed
from modeling.weights import FloatArray

_HINTS = {"fp32": "f32", "bf16": "bf16"}


def is_available() -> bool:
    return importlib.util.find_spec("openvino") is not None


def import_runtime() -> None:
    """Imports the package now, for a process that will need it later."""
    _openvino()


def openvino_engine(
    files: GraphFiles,
    collate: Collate,
    *,
    max_length: int,
    precision: str = "fp32",
    threads: int = 0,
    adapter_slots: int = 32,
    slots_budget_bytes: int = 1 << 40,
    cache: Path | None = None,
) -> GraphEngine:
    """The backbone on the CPU; in bf16 the stacks are bf16 too. `cache` keeps compiled models between starts.

    Widths are stepped, up to `max_length` tokens: a shape that OpenVINO has not seen costs it several ms.
    """
    open_session = partial(OpenVinoSession, precision=precision, threads=threads, cache=cache)
    return GraphEngine(
        "openvino",
        files,
        open_session,
        collate,
        open_with_states=partial(open_session, has_states=True),
        device="cpu",
        precision=precision,
        stack_dtype=ml_dtypes.bfloat16 if precision == "bf16" else np.float32,
        adapter_slots=adapter_slots,
        slots_budget_bytes=slots_budget_bytes,
        width=partial(stepped_width, limit=max_length),
    )


class OpenVinoSession:
    """One compiled graph with one inference request: batches come one at a time. It computes all of its outputs for
    every batch, and so has states only if they are asked for."""

    _has_run: ClassVar[bool] = False

    def __init__(
        self,
        model_file: Path,
        *,
        precision: str,
        threads: int = 0,
        cache: Path | None = None,
        has_states: bool = False,
    ) -> None:
        try:
            self._compile(model_file, precision, threads, cache, has_states=has_states)
        except Exception as error:  # the runtime raises plain RuntimeError and more
            raise EngineFailed(f"OpenVINO could not load {model_file.name} ({_first_line(error)})") from error
        self._bytes = graph_bytes(model_file) // (2 if precision == "bf16" else 1)
        self._kept: list[Any] = []

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] = (POOLED,)) -> list[FloatArray]:
        openvino = _openvino()
        try:
            for name in self._tokens:
                self._request.set_tensor(name, openvino.Tensor(feeds[name], shared_memory=True))
            self._request.infer()
            OpenVinoSession._has_run = True
            return [self._request.get_tensor(name).data.astype(np.float32) for name in outputs]  # copies
        except Exception as error:
            raise EngineFailed(f"OpenVINO could not compute a batch ({_first_line(error)})") from error

    def bind(self, stacks: Mapping[str, Stack]) -> None:
        openvino = _openvino()
        self._kept = []
        for name, stack in stacks.items():
            if stack.dtype == ml_dtypes.bfloat16:
                tensor = openvino.Tensor(stack.view(np.uint16), list(stack.shape), openvino.Type.bf16)
            else:
                tensor = openvino.Tensor(stack, shared_memory=True)
            self._kept.append((stack, tensor))  # the request reads this memory
            self._request.set_tensor(name, tensor)

    def memory_bytes(self) -> int:
        return self._bytes

    def _compile(self, model_file: Path, precision: str, threads: int, cache: Path | None, *, has_states: bool) -> None:
        openvino = _openvino()
        core = openvino.Core()
        # The first run of a process starts threads that all sessions share, and they must have its usual priority.
        run = spare if OpenVinoSession._has_run else operator.call
        model = run(core.read_model, model_file)
        for output in [] if has_states else model.outputs:
            if STATES in output.get_names():
                model.remove_result(output.get_node())
        names = [node.get_any_name() for node in model.inputs]
        stacks = [index for index, name in enumerate(names) if name.startswith(("lora_a.", "lora_b."))]
        if stacks and precision == "bf16":
            # As float32 they would be converted whole at every run.
            steps = openvino.preprocess.PrePostProcessor(model)
            for index in stacks:
                steps.input(index).tensor().set_element_type(openvino.Type.bf16)
            model = steps.build()
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            **({"INFERENCE_NUM_THREADS": str(threads)} if threads else {}),
            **({"CACHE_DIR": str(cache)} if cache is not None else {}),
        }
        self._request = run(core.compile_model, model, "CPU", options).create_infer_request()
        self._tokens = [name for name in names if name not in {names[index] for index in stacks}]


def _openvino() -> Any:
    """The package without its telemetry, which reports every import to a web service unless it cannot be found."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def supports_bf16() -> bool:
    """Whether this CPU computes bf16 faster than float32, by what OpenVINO itself says."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[-1][:200] if text else type(error).__name__
