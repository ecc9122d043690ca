"""Every engine computes what torch computes, for any mix of adapters in a batch, and says so when it cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from onnx import load, save
from onnx.reference import ReferenceEvaluator

from model_registry.store import FileStore
from modeling.adapters import Adapter, LoraPair
from modeling.backbone import Backbone, ingest
from modeling.engines import onnx, openvino, providers
from modeling.engines.build import CAPTURED, TENSORRT, EngineOptions, EngineSpec, build_engine
from modeling.engines.graphs import GraphEngine, GraphFiles, weights_file
from modeling.engines.onnx_gpu import GpuSession
from modeling.engines.protocol import Engine, EngineBatch
from modeling.engines.providers import Ladder
from modeling.engines.torch import TorchEngine
from modeling.errors import AdapterMismatch, EngineFailed
from modeling.inputs import Features, open_preprocessor, padded
from modeling.precision import low_precision_graphs
from modeling.quantize import int8_graphs
from modeling.testing import write_tiny_checkpoint
from modeling.weights import FloatArray
from tests.support.adapters import random_adapter
from tests.support.exports import Exports
from tests.support.rows import encoded_texts

TEXTS = ["a good film", "dull plot and a bad actor", "wheat", "the movie was not very good and it was dull", "oil"]
SLOTS = 3
TOLERANCE = {"fp32": 3e-5, "bf16": 0.06, "fp16": 0.01, "int8": 0.15}

Make = Callable[[], Engine]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", hidden_size=32)
    return ingest(FileStore(folder / "store"), checkpoint, name="tiny", source="file:tiny")


@pytest.fixture(scope="module")
def files(backbone: Backbone, exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> GraphFiles:
    return exports(backbone, tmp_path_factory.mktemp("export"))


ON_CPU = ["torch", "torch-bf16", "onnx", "onnx-int8", "onnx-fp16", "onnx-buckets", "openvino", "openvino-bf16"]
ON_GPU = [
    *(EngineSpec("torch", precision) for precision in ("fp32", "bf16", "fp16")),
    *(EngineSpec("onnx", precision) for precision in ("fp32", "bf16", "fp16")),
    *(EngineSpec(runtime, precision) for runtime in (CAPTURED, TENSORRT) for precision in ("bf16", "fp16")),
]
PROVIDERS = {"onnx": providers.CUDA, CAPTURED: providers.CUDA, TENSORRT: providers.TENSORRT}


def on_gpu(specs: Iterable[EngineSpec]) -> list[Any]:
    return [pytest.param(spec, marks=pytest.mark.gpu, id=f"cuda-{spec}") for spec in specs]


@pytest.fixture(params=[*ON_CPU, *on_gpu(ON_GPU)])
def make(request: pytest.FixtureRequest, backbone: Backbone, files: GraphFiles) -> Make:
    provider = PROVIDERS.get(request.param.runtime) if isinstance(request.param, EngineSpec) else None
    if provider is not None and provider not in onnx.runtime().get_available_providers():
        pytest.skip(f"needs {provider}")

    def build() -> Engine:
        collate = open_preprocessor(backbone).collate
        if isinstance(request.param, EngineSpec):
            options = EngineOptions(device="cuda", adapter_slots=SLOTS, compiles=True)
            return build_engine(request.param, backbone, files, options)
        match request.param:
            case "torch":
                return TorchEngine(backbone, adapter_slots=SLOTS)
            case "torch-bf16":
                return TorchEngine(backbone, precision="bf16", adapter_slots=SLOTS)
            case "onnx":
                return onnx.onnx_engine(files, collate, threads=1, adapter_slots=SLOTS)
            case "onnx-int8":
                quantized = int8_graphs(files, has_vnni=True)
                return onnx.onnx_engine(quantized, collate, precision="int8", threads=1, adapter_slots=SLOTS)
            case "onnx-fp16":  # computed in fp32 on a CPU, after rounding
                return onnx.onnx_engine(
                    low_precision_graphs(files, "fp16"), collate, precision="fp16", threads=1, adapter_slots=SLOTS
                )
            case "onnx-buckets":
                return GraphEngine(
                    "onnx",
                    files,
                    in_buckets,
                    collate,
                    device="cpu",
                    precision="fp32",
                    adapter_slots=SLOTS,
                )
            case name:
                precision = "bf16" if name == "openvino-bf16" else "fp32"
                return openvino.openvino_engine(
                    files,
                    collate,
                    max_length=backbone.info.max_length,
                    precision=precision,
                    threads=1,
                    adapter_slots=SLOTS,
                )

    return build


def in_buckets(path: Path) -> GpuSession:
    """What a GPU runs, on the CPU's provider: some batches of the tests fit a bucket, some do not."""
    return GpuSession(path, providers.cpu(threads=1), padding={}, ladder=Ladder((1, 4), (8, 16)))


def adapters(files: GraphFiles) -> dict[str, Adapter]:
    layout = files.layout
    return {
        "all": random_adapter(layout, rank=4, seed=1),
        "some": random_adapter(layout, rank=16, seed=2, share=0.5),
        "high": random_adapter(layout, rank=24, seed=3, share=0.8),
        "one": Adapter(3, dict(list(random_adapter(layout, rank=3, seed=4, scale=0.8).pairs.items())[-1:])),
        "last": random_adapter(layout, rank=8, seed=5),
    }


def encode(backbone: Backbone) -> list[Features]:
    return encoded_texts(backbone.folder, TEXTS, limit=32)


def merged(backbone: Backbone, change: Adapter | None, item: Features) -> FloatArray:
    """The reference: a model whose weights have the adapter added in, on one row alone."""
    import torch

    engine = TorchEngine(backbone)
    for name, pair in {} if change is None else change.pairs.items():
        with torch.no_grad():
            engine._encoder.get_parameter(f"{name}.base.weight").add_(torch.from_numpy(pair.b @ pair.a))
    row: FloatArray = engine.run(EngineBatch([item])).pooled[0]
    return row


def close(engine: Engine, ours: FloatArray, expected: FloatArray) -> None:
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE[engine.precision], rtol=TOLERANCE[engine.precision])


def test_a_batch_with_any_mix_of_adapters_equals_each_row_merged_and_alone(
    make: Make, backbone: Backbone, files: GraphFiles
) -> None:
    engine, encoded, known = make(), encode(backbone), adapters(files)
    for key, change in known.items():
        engine.load_adapter(key, change)
    bare = engine.run(EngineBatch(encoded)).pooled
    assert bare.dtype == np.float32 and bare.shape == (len(TEXTS), 32)
    mixes: list[list[str | None]] = [
        [None] * 5,
        ["all"] * 5,
        ["all", None, "some", "all", None],
        ["one", "high", None, "some", "last"],
        ["last", "all", "high", "one", "some"],
        [None, "high", None, None, None],
    ]
    for keys in mixes:  # the last ones name more adapters than there are slots
        vectors = engine.run(EngineBatch(encoded, keys)).pooled
        for row, name in enumerate(keys):
            expected = merged(backbone, known[name] if name else None, encoded[row])
            close(engine, vectors[row], expected)
            if name is not None:
                assert np.abs(vectors[row] - bare[row]).max() > 0.1, "an adapter that changes nothing proves nothing"


def test_an_adapter_can_be_replaced_and_unloaded(make: Make, backbone: Backbone, files: GraphFiles) -> None:
    engine, encoded, known = make(), encode(backbone), adapters(files)
    engine.load_adapter("a", known["all"])
    engine.run(EngineBatch(encoded, ["a"] * 5))
    engine.load_adapter("a", known["some"])
    close(engine, engine.run(EngineBatch(encoded[:1], ["a"])).pooled[0], merged(backbone, known["some"], encoded[0]))
    engine.unload_adapter("a")
    with pytest.raises(EngineFailed, match="not loaded"):
        engine.run(EngineBatch(encoded, ["a"] * 5))


def test_an_adapter_that_does_not_fit_changes_nothing(make: Make, backbone: Backbone, files: GraphFiles) -> None:
    engine, encoded, good = make(), encode(backbone), adapters(files)["all"]
    name, pair = next(iter(good.pairs.items()))
    for wrong in ({"encoder.no.such.layer": pair}, {**good.pairs, name: LoraPair(pair.a[:, :-1], pair.b)}):
        with pytest.raises(AdapterMismatch):
            engine.load_adapter("x", Adapter(4, wrong))
    with pytest.raises(EngineFailed):
        engine.run(EngineBatch(encoded, ["x"] * 5))
    close(engine, engine.run(EngineBatch(encoded[:1])).pooled[0], merged(backbone, None, encoded[0]))


def test_a_batch_is_padded_to_what_the_engine_says(make: Make, backbone: Backbone) -> None:
    engine, limit = make(), backbone.info.max_length
    widths = [engine.width(longest) for longest in range(1, limit + 1)]
    assert widths == sorted(widths) and widths[-1] == limit
    assert all(width >= longest for longest, width in enumerate(widths, start=1))
    for longest in (limit - 1, limit):
        row = open_preprocessor(backbone).sample(longest)
        close(engine, engine.run(EngineBatch([row])).pooled[0], merged(backbone, None, row))


def test_memory_is_named_apart_for_weights_slots_and_adapters(
    make: Make, backbone: Backbone, files: GraphFiles
) -> None:
    engine, encoded, known = make(), encode(backbone), adapters(files)
    assert engine.memory().slots == 0
    engine.load_adapter("all", known["all"])
    engine.run(EngineBatch(encoded, ["all"] * 5))
    before = engine.memory()
    engine.load_adapter("again", known["all"])
    engine.run(EngineBatch(encoded, ["again"] * 5))
    assert engine.memory() == before, "a further adapter of the same rank costs no slots"
    assert before.weights > 0 and before.slots > 0
    assert engine.adapter_bytes("all") <= known["all"].size_bytes
    assert engine.adapter_bytes("no such") == 0


def test_rows_that_ask_get_the_states_of_their_own_positions(make: Make, backbone: Backbone, files: GraphFiles) -> None:
    engine, encoded, known = make(), encode(backbone), adapters(files)
    engine.load_adapter("all", known["all"])
    engine.load_adapter("high", known["high"])
    reference = TorchEngine(backbone, adapter_slots=SLOTS)
    for key in ("all", "high"):
        reference.load_adapter(key, known[key])
    mixes: list[list[str | None]] = [[None] * 5, ["all"] * 5, ["high", None, "all", None, "all"]]
    for keys in mixes:
        for asking in ([0, 1, 2, 3, 4], [2], [1, 4]):
            outputs = engine.run(EngineBatch(encoded, keys, asking))
            assert sorted(outputs.states) == asking
            close(engine, outputs.pooled, engine.run(EngineBatch(encoded, keys)).pooled)
            for row in asking:
                alone = reference.run(EngineBatch([encoded[row]], [keys[row]], [0]))
                states = outputs.states[row]
                assert states.dtype == np.float32 and states.shape == (encoded[row].cost, 32)
                # Layer norms make states larger than their mean, and so the errors of low precision.
                close(engine, states / np.float32(4), alone.states[0] / np.float32(4))
                close(engine, states.mean(0), outputs.pooled[row])
    assert not engine.run(EngineBatch(encoded)).states


def test_states_are_opened_ahead_and_counted(make: Make, backbone: Backbone, files: GraphFiles) -> None:
    engine, encoded, before = make(), encode(backbone), make().memory().weights
    assert engine.memory().weights == before
    engine.open_states(None)
    opened = engine.memory().weights
    assert opened == (2 * before if engine.name == "openvino" else before)
    engine.run(EngineBatch(encoded, states=[0]))
    assert engine.memory().weights == opened, "the first row that asks opens nothing more"


@pytest.mark.parametrize("open_engine", [onnx.onnx_engine, partial(openvino.openvino_engine, max_length=32)])
def test_a_graph_of_an_earlier_release_serves_vectors_and_says_why_it_gives_no_states(
    open_engine: Callable[..., Engine], backbone: Backbone, files: GraphFiles, tmp_path: Path
) -> None:
    former = GraphFiles(tmp_path)
    for graph in (files.bare, files.lora):
        model = load(graph)
        del model.graph.output[1:]
        save(model, tmp_path / graph.name)
    former.describe(files.layout, hidden_size=files.hidden_size)
    former.description.write_text(former.description.read_text().replace('"schema": 6', '"schema": 4'))
    former = GraphFiles(tmp_path)
    collate, encoded = open_preprocessor(backbone).collate, encode(backbone)
    engine, current = open_engine(former, collate, threads=1), open_engine(files, collate, threads=1)
    assert former.is_complete
    wanted = engine.run(EngineBatch(encoded)).pooled
    np.testing.assert_allclose(current.run(EngineBatch(encoded)).pooled, wanted, atol=1e-6)
    for ask in (lambda: engine.open_states(None), lambda: engine.run(EngineBatch(encoded, states=[0]))):
        with pytest.raises(EngineFailed, match="earlier release and give no states"):
            ask()


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.999), ("fp16", 0.99999)])
def test_graphs_in_low_precision_stay_close(
    precision: str, bound: float, backbone: Backbone, files: GraphFiles
) -> None:
    """By ONNX's reference implementation, since ONNX Runtime computes no bf16 on a CPU."""
    rows = encode(backbone)
    feeds = open_preprocessor(backbone).collate(rows, max(row.cost for row in rows))
    reference = ReferenceEvaluator(str(low_precision_graphs(files, precision).bare))
    vectors, _ = cast("list[FloatArray]", reference.run(None, feeds))
    expected = (
        onnx.onnx_engine(files, open_preprocessor(backbone).collate, threads=1)
        .run(EngineBatch(encode(backbone)))
        .pooled
    )
    cosines = (vectors * expected).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
    assert vectors.dtype == np.float32 and cosines.min() > bound


@pytest.mark.parametrize("open_engine", [onnx.onnx_engine, partial(openvino.openvino_engine, max_length=32)])
def test_a_file_that_will_not_load_is_refused(
    open_engine: Callable[..., Engine], files: GraphFiles, tmp_path: Path
) -> None:
    broken = GraphFiles(tmp_path)
    broken.description.write_bytes(files.description.read_bytes())
    weights_file(broken.bare).write_bytes(weights_file(files.bare).read_bytes())
    for content in (b"", b"not a graph", files.bare.read_bytes()[:-2000]):
        broken.bare.write_bytes(content)
        with pytest.raises(EngineFailed, match=r"backbone\.onnx"):
            open_engine(broken, padded)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_the_compiled_engine_equals_the_plain_one(backbone: Backbone, files: GraphFiles) -> None:
    engine, encoded, change = TorchEngine(backbone, is_compiled=True), encode(backbone), adapters(files)["all"]
    engine.load_adapter("a", change)
    assert engine.name == "torch-compile"
    for rows in (encoded, encoded[:2]):
        vectors = engine.run(EngineBatch(rows)).pooled
        for row, item in zip(vectors, rows, strict=True):
            close(engine, row, merged(backbone, None, item))
    close(engine, engine.run(EngineBatch(encoded[:1], ["a"])).pooled[0], merged(backbone, change, encoded[0]))


def test_no_runtime_writes_or_sends_anything_about_its_use(files: GraphFiles, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from modeling.engines import onnx, openvino
from modeling.engines.graphs import GraphFiles
from modeling.inputs import padded
files = GraphFiles(Path({str(files.folder)!r}))
openvino.supports_bf16(), onnx.onnx_engine(files, padded), openvino.openvino_engine(files, padded, max_length=8)
"""
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_adopted_export_is_converted_although_its_files_have_several_links(
    files: GraphFiles, tmp_path: Path
) -> None:
    """onnx refuses such weights."""
    adopted = GraphFiles(tmp_path)
    adopted.adopt(files)
    assert weights_file(adopted.bare).stat().st_nlink > 1
    for made in (int8_graphs(adopted, has_vnni=True), low_precision_graphs(adopted, "fp16")):
        assert made.bare.is_file() and made.lora.is_file()
    assert {path.suffix for path in tmp_path.iterdir()} == {".onnx", ".data", ".json"}


_COMPUTED = """
import os, sys
from pathlib import Path

import numpy as np

from model_registry.spare_time import beside_requests
from modeling.engines.openvino import OpenVinoSession
from modeling.engines.onnx import OnnxSession


def idle_threads() -> dict[str, int]:
    threads = [name for name in os.listdir("/proc/self/task") if os.sched_getscheduler(int(name)) == os.SCHED_IDLE]
    return {name: int(Path(f"/proc/self/task/{name}/schedstat").read_text().split()[0]) for name in threads}


graph = Path(sys.argv[1])
feeds = {name: np.ones((8, 16), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
sessions = []
for number in range(3):
    for kind, options in ((OpenVinoSession, {"precision": "fp32"}), (OnnxSession, {})):
        opened = beside_requests(lambda: kind(graph, threads=2, **options), are_waiting=True)
        sessions.append(opened)
        opened.run(feeds)
before = idle_threads()
for _ in range(50):
    for session in sessions:
        session.run(feeds)
after = idle_threads()  # less those that opened a session and have ended by now
print(sum(after.get(name, spent) - spent for name, spent in before.items()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the scheduler of Linux")
def test_a_session_opened_in_spare_time_computes_at_the_usual_priority(files: GraphFiles) -> None:
    """A thread inherits its class from the one that starts it, and keeps it."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPUTED, str(files.bare)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0, "nanoseconds of the processor's time, by threads that take only spare time"
