"""ONNX Runtime on a GPU: inputs and outputs in buffers of the device, and small batches as captured CUDA graphs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modeling.engines import providers
from modeling.engines.graphs import POOLED, GraphEngine, GraphFiles, graph_bytes
from modeling.engines.onnx import open_session, runtime
from modeling.engines.providers import Bucket, Ladder, SessionPlan
from modeling.engines.slots import Stack
from modeling.errors import EngineFailed
from modeling.inputs.base import Preprocessor
from modeling.weights import FloatArray

_log = logging.getLogger("modeling.onnx_gpu")
# Run option by which ONNX Runtime tells captured graphs apart (onnxruntime#19636).
_GRAPH_ID = "gpu_graph_id"
_NO_GRAPH = "-1"


def cuda_engine(
    files: GraphFiles,
    preprocessor: Preprocessor,
    *,
    precision: str = "fp32",
    device: str = "cuda",
    ladder: Ladder | None = None,
    adapter_slots: int = 32,
    slots_budget_bytes: int = 1 << 40,
) -> GraphEngine:
    """The graphs of `files`, which are in `precision` already, on the CUDA provider.

    With `ladder`, its shapes are captured as CUDA graphs. For processes that have the GPU alone: ONNX Runtime
    captures in CUDA's global mode, in which an allocation by any other thread fails and spoils the capture.
    """
    open_session = partial(cuda_session, padding=preprocessor.padding, precision=precision, device_id=device_id(device))

    def open_graph(path: Path) -> GpuSession:
        try:
            return open_session(path, ladder=ladder)
        except EngineFailed as error:
            if ladder is None or path == files.bare:
                raise
            _log.warning(f"adapters run without CUDA graphs: {error}")
            return open_session(path)

    return GraphEngine(
        "onnx" if ladder is None else "onnx-graphs",
        files,
        open_graph,
        preprocessor.collate,
        device=device,
        precision=precision,
        adapter_slots=adapter_slots,
        slots_budget_bytes=slots_budget_bytes,
    )


def cuda_session(
    model_file: Path, *, padding: Mapping[str, float], precision: str, device_id: int, ladder: Ladder | None = None
) -> GpuSession:
    """Raises `EngineFailed`; with `ladder` also where a part of the graph would run on the CPU."""
    plan = providers.cuda(device_id=device_id, precision=precision, has_graphs=ladder is not None)
    return GpuSession(model_file, plan, padding=padding, ladder=ladder)


def device_id(device: str) -> int:
    """Of `cuda` or `cuda:1`."""
    return int(device.partition(":")[2] or 0)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What a bucket's runs read and write, at addresses that stay: a captured graph knows nothing else."""

    graph_id: int
    inputs: dict[str, Any]
    output: Any
    binding: Any
    options: Any


class GpuSession:
    """One graph by a plan that begins with a GPU's provider; any other plan takes the same ways through this code.

    A batch that fits a bucket of `ladder` is padded to it and runs in the bucket's own buffers; with CUDA graphs that
    is one launch, captured at the bucket's first batch, in place of hundreds. Other batches run as they are, and so do
    those with states.

    Called from one thread at a time. ONNX Runtime captures per thread: another thread captures anew.
    """

    def __init__(
        self, model_file: Path, plan: SessionPlan, *, padding: Mapping[str, float], ladder: Ladder | None = None
    ) -> None:
        self._session = open_session(model_file, plan)
        self._plan, self._padding, self._ladder = plan, padding, ladder
        self._inputs = {node.name for node in self._session.get_inputs()}
        output = next(node for node in self._session.get_outputs() if node.name == POOLED)
        self._hidden_size = int(output.shape[-1])
        self._buckets: dict[Bucket, _Buffers] = {}
        # A number is never used again: its graph would replay with the addresses of buffers that are gone.
        self._graph_ids = itertools.count(1)
        self._stacks: dict[str, Any] = {}
        self._without_graph = _run_options(_NO_GRAPH)
        self._bytes = graph_bytes(model_file)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] = (POOLED,)) -> list[FloatArray]:
        tokens = {name: value for name, value in feeds.items() if name in self._inputs}
        rows, length = batch_shape(tokens)
        bucket = self._ladder.bucket_for(rows, length) if self._ladder is not None and len(outputs) == 1 else None
        try:
            return self._run_as_is(tokens, outputs) if bucket is None else [self._run_in(bucket, tokens)[:rows]]
        except Exception as error:  # the runtime's own classes derive from Exception directly
            raise EngineFailed(f"ONNX Runtime could not compute a batch ({type(error).__name__})") from error

    def bind(self, stacks: Mapping[str, Stack]) -> None:
        """Copies the stacks to the device; those that keep their shape keep their address too."""
        for name, stack in stacks.items():
            kept = self._stacks.get(name)
            if kept is None or tuple(kept.shape()) != stack.shape:
                self._forget_buckets()
                self._stacks[name] = kept = self._allocate(stack.shape, stack.dtype)
            kept.update_inplace(stack)

    def memory_bytes(self) -> int:
        return self._bytes

    def _run_in(self, bucket: Bucket, tokens: Mapping[str, npt.NDArray[Any]]) -> FloatArray:
        buffers = self._buffers(bucket, tokens)
        for name, values in pad_to(bucket, tokens, padding=self._padding).items():
            buffers.inputs[name].update_inplace(values)
        self._session.run_with_iobinding(buffers.binding, buffers.options)
        return np.array(buffers.output.numpy(), dtype=np.float32)  # the buffer's next batch must not change it

    def _run_as_is(self, tokens: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> list[FloatArray]:
        binding = self._session.io_binding()
        for name, values in tokens.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
        for name, stack in self._stacks.items():
            binding.bind_ortvalue_input(name, stack)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding, self._without_graph)
        return [np.asarray(values, dtype=np.float32) for values in binding.copy_outputs_to_cpu()]

    def _buffers(self, bucket: Bucket, tokens: Mapping[str, npt.NDArray[Any]]) -> _Buffers:
        """The bucket's, made at its first batch."""
        buffers = self._buckets.get(bucket)
        if buffers is None:
            buffers = self._buckets[bucket] = self._new_buffers(bucket, tokens)
        return buffers

    def _new_buffers(self, bucket: Bucket, tokens: Mapping[str, npt.NDArray[Any]]) -> _Buffers:
        inputs = {
            name: self._allocate((*bucket[: values.ndim], *values.shape[2:]), values.dtype)
            for name, values in tokens.items()
        }
        output = self._allocate((bucket[0], self._hidden_size), np.dtype(np.float32))
        binding = self._session.io_binding()
        for name, value in (inputs | self._stacks).items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(POOLED, output)
        graph_id = next(self._graph_ids)
        return _Buffers(graph_id, inputs, output, binding, _run_options(str(graph_id)))

    def _forget_buckets(self) -> None:
        """What was captured reads the stacks at their old addresses."""
        for buffers in self._buckets.values():
            self._session.release_captured_graph(buffers.graph_id)
        self._buckets.clear()

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        kind = runtime().OrtValue
        return kind.ortvalue_from_shape_and_type(list(shape), dtype.type, self._plan.device, self._plan.device_id)


def batch_shape(feeds: Mapping[str, npt.NDArray[Any]]) -> tuple[int, int]:
    """Rows and width of a batch, by an input that has positions."""
    rows, width = next(values.shape[:2] for values in feeds.values() if values.ndim > 1)
    return rows, width


def pad_to(
    bucket: Bucket, feeds: Mapping[str, npt.NDArray[Any]], *, padding: Mapping[str, float]
) -> dict[str, npt.NDArray[Any]]:
    """Inputs [rows, width, …] or [rows] in the shape of `bucket`, padded behind; added rows repeat the first, for
    attention over nothing at all would be 0 / 0."""
    padded = {}
    for name, values in feeds.items():
        rows, *rest = values.shape
        shape = (*bucket[: values.ndim], *values.shape[2:])
        full = np.full(shape, padding.get(name, 0), dtype=values.dtype)
        full[(slice(rows), *map(slice, rest))] = values
        full[rows:] = full[0]
        padded[name] = full
    return padded


def _run_options(graph_id: str) -> Any:
    options = runtime().RunOptions()
    options.add_run_config_entry(_GRAPH_ID, graph_id)
    return options
