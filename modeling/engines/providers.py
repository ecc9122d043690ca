"""What ONNX Runtime is asked for: providers with their options, shapes to prepare for, names of engine caches. Pure.

Nothing here imports onnxruntime or looks at the machine. Every name of an option is in the binaries of
onnxruntime-gpu 1.31.1; they are explained in

- onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html and `cuda_provider_options.h`,
- onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html,
- `onnxruntime_session_options_config_keys.h`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_ENGINE_SCHEMA = 1  # raised when TensorRT's options change

Options = dict[str, str]
Bucket = tuple[int, int]  # rows, length


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """One session: `providers` in order of preference, and what is set on its SessionOptions.

    Its buffers are on `device` (`cpu` or `cuda`) number `device_id`.
    """

    providers: tuple[tuple[str, Options], ...]
    attributes: Mapping[str, int | bool]
    entries: Mapping[str, str]
    device: str = "cpu"
    device_id: int = 0


def cpu(*, threads: int = 0) -> SessionPlan:
    """On the CPU with this many threads, 0 for one per core."""
    return SessionPlan(((CPU, {}),), _attributes(threads), _ENTRIES)


def cuda(*, device_id: int = 0, precision: str = "fp32", has_graphs: bool = False) -> SessionPlan:
    """On one GPU. With `has_graphs` runs can be captured as CUDA graphs; all of the graph must then fit the GPU.

    - `use_tf32` is on by default and rounds the factors of products to 10 bits: off for fp32, which is to mean fp32.
    - `arena_extend_strategy`: by default the arena doubles; torch and other sessions share this GPU.
    - `cudnn_conv_algo_search`: by default every new shape of a convolution is benchmarked exhaustively; batches
      come in thousands of shapes. Text encoders have none.
    - `do_copy_in_default_stream` stays on: off, copies race with kernels (onnxruntime#4829).
    """
    options = {
        "device_id": str(device_id),
        "enable_cuda_graph": _flag(has_graphs),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": _flag(precision != "fp32"),
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    # Only the arithmetic of shapes is left to the CPU.
    return SessionPlan(((CUDA, options), (CPU, {})), _attributes(threads=1), _ENTRIES, "cuda", device_id)


def tensorrt(
    profile: ShapeProfile, inputs: Sequence[str], engines: Path, *, precision: str, timings: Path, device_id: int = 0
) -> SessionPlan:
    """The fp32 graph on TensorRT in bf16 or fp16, CUDA for what TensorRT does not take. `inputs`: those of the tokens.

    `engines` is a folder of this one engine, `timings` one for all of this GPU's.

    - All three `trt_profile_…` strings for every dynamic input: without them the engine is built again, on the
      request path, whenever a batch leaves the shapes seen so far. Only the first of several profiles in one
      engine is used (onnxruntime#31624), so a session has one.
    - `trt_layer_norm_fp32_fallback`: sums of squares overflow fp16.
    - `trt_builder_optimization_level`: 3 is the default; below it the documentation promises no good engine.
    - `trt_max_workspace_size` is all of the GPU's memory by default; other engines share it.

    A change of an option raises `_ENGINE_SCHEMA`.
    """
    options = {
        "device_id": str(device_id),
        **profile.options(inputs),
        "trt_fp16_enable": _flag(precision == "fp16"),
        "trt_bf16_enable": _flag(precision == "bf16"),
        "trt_layer_norm_fp32_fallback": _flag(True),
        "trt_engine_cache_enable": _flag(True),
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": _flag(True),
        "trt_timing_cache_path": str(timings),
        "trt_builder_optimization_level": "3",
        "trt_max_workspace_size": str(2 << 30),
    }
    rest = cuda(device_id=device_id, precision=precision)
    return SessionPlan(
        ((TENSORRT, options), *rest.providers), rest.attributes, rest.entries, rest.device, rest.device_id
    )


# Spinning workers burn seconds of CPU after every run, taken from the event loop in this process.
_ENTRIES = {"session.intra_op.allow_spinning": "0"}


def _attributes(threads: int) -> dict[str, int | bool]:
    return {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        # A pattern is kept for every shape met, and batches come in thousands of them (docs/log.md).
        "enable_mem_pattern": False,
        "log_severity_level": 3,
    }


def _flag(value: bool) -> str:
    return "1" if value else "0"


@dataclass(frozen=True, slots=True)
class Ladder:
    """The shapes that are captured as CUDA graphs. Batches are padded up to the next one."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows) * len(self.lengths)

    def bucket_for(self, rows: int, length: int) -> Bucket | None:
        """The smallest that takes these rows of this length; None if there is none."""
        steps = _step(self.rows, rows), _step(self.lengths, length)
        return None if steps[0] is None or steps[1] is None else (steps[0], steps[1])


def ladder(max_length: int) -> Ladder:
    """For a backbone of at most `max_length` tokens. Beyond 16 rows launches are few beside the work itself."""
    lengths = (16, 32, 64, 128, 256, 512)
    return Ladder((1, 2, 4, 8, 16), tuple(dict.fromkeys(min(length, max_length) for length in lengths)))


def _step(steps: Sequence[int], value: int) -> int | None:
    return next((step for step in steps if step >= value), None)


@dataclass(frozen=True, slots=True)
class ShapeProfile:
    """The shapes of one TensorRT engine, (rows, length): the smallest, the one it is tuned for, the largest."""

    min: Bucket
    opt: Bucket
    max: Bucket

    def options(self, inputs: Sequence[str]) -> Options:
        """`inputs` are those with rows and length."""
        names = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
        return {
            name: ",".join(f"{tensor}:{rows}x{length}" for tensor in inputs)
            for name, (rows, length) in zip(names, (self.min, self.opt, self.max), strict=True)
        }


def shape_profiles(max_length: int, *, max_rows: int = 128, max_tokens: int = 16384) -> tuple[ShapeProfile, ...]:
    """Short and long rows apart, shortest first, since an engine is tuned for one shape and reserves memory for its
    largest. Each takes up to `max_tokens` in up to `max_rows`."""
    lengths = sorted({min(128, max_length), max_length})
    profiles = []
    for shorter, length in itertools.pairwise([0, *lengths]):
        rows = max(1, min(max_rows, max_tokens // length))
        profiles.append(ShapeProfile((1, 1), (min(8, rows), max(1, (shorter + length) // 2)), (rows, length)))
    return tuple(profiles)


@dataclass(frozen=True, slots=True)
class EngineCacheKey:
    """What a compiled engine is valid for: ONNX Runtime asks its users to delete engines by hand when it changes.

    `digest` is that of the weights, `graphs` the export's key (`modeling.engines.graphs.graphs_key`).
    """

    digest: str
    graphs: str
    precision: str
    profile: ShapeProfile
    gpu: str
    compute_capability: str
    driver: str
    cuda: str
    tensorrt: str
    onnxruntime: str
    schema: int = _ENGINE_SCHEMA

    @property
    def directory(self) -> str:
        """The weights, the kind of GPU, what else can change under them, and which of their engines this is."""
        versions = _sha256((self.graphs, self.schema, *self._libraries))
        engine = _sha256((self.precision, asdict(self.profile)))
        return f"{_sha256(self.digest)[:12]}-{self._kind_of_gpu}-{versions[:16]}-{engine[:16]}"

    @property
    def timings(self) -> str:
        """Timings of kernels hold for all models on the same kind of GPU and versions."""
        return f"{self._kind_of_gpu}-{_sha256(self._libraries)[:16]}"

    @property
    def _kind_of_gpu(self) -> str:
        return _sha256((self.gpu, self.compute_capability))[:8]

    @property
    def _libraries(self) -> tuple[str, ...]:
        return self.driver, self.cuda, self.tensorrt, self.onnxruntime


def stale_directories(listing: Iterable[str], key: EngineCacheKey) -> list[str]:
    """Of the directories listed, those of the same weights on the same kind of GPU that nothing can use any more.

    Other precisions and profiles stay, and so do the engines of other GPUs: their hosts may share the folder.
    """
    *weights_and_gpu, versions, _ = key.directory.split("-")
    stale = []
    for name in listing:
        parts = name.split("-") if _DIRECTORY.fullmatch(name) else []
        if parts[:2] == weights_and_gpu and parts[2] != versions:
            stale.append(name)
    return sorted(stale)


_DIRECTORY = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}-[0-9a-f]{16}-[0-9a-f]{16}")


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
