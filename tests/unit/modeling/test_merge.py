"""A graph with an adapter in its weights: layers that share weights, adapters that do not fit, files that go."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from model_registry.manifest import FileEntry
from model_registry.store import FileStore
from modeling.adapters import Adapter, LoraPair
from modeling.backbone import Backbone, ingest
from modeling.engines.graphs import GraphFiles
from modeling.engines.onnx import onnx_engine
from modeling.engines.protocol import EngineBatch
from modeling.errors import AdapterMismatch
from modeling.export import export_graphs
from modeling.merge import MergeRequest, adapter_digest, add_adapter, write_merged
from modeling.preprocess import TextPreprocessor
from modeling.testing import write_tiny_checkpoint
from tests.support.adapters import random_adapter, write_adapter


@pytest.fixture(scope="module")
def files(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> GraphFiles:
    return export_graphs(backbone, tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("model_type", ["albert", "electra"])
def test_the_layers_of_every_encoder_are_found(model_type: str, tmp_path: Path) -> None:
    """ALBERT runs one layer several times, and ELECTRA projects its embeddings."""
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", model_type=model_type)
    own = ingest(FileStore(tmp_path / "store"), checkpoint, name=model_type, source="file:x")
    files = export_graphs(own, tmp_path / "graphs")
    engine, change = onnx_engine(files, threads=1), random_adapter(files.layout, rank=4, seed=1)
    encoded = TextPreprocessor(own.folder / "tokenizer.json", max_length=32).encode(["a good film", "dull"])
    engine.load_adapter("x", change)
    expected, bare = engine.run(EngineBatch(encoded, ["x", "x"])), engine.run(EngineBatch(encoded))
    write_adapter(tmp_path / "adapter", change)
    write_merged(MergeRequest(str(files.bare), str(tmp_path / "adapter"), str(files.merged("x"))))
    engine.merge("x", engine.open_merged(files.merged("x")))
    np.testing.assert_allclose(engine.run(EngineBatch(encoded, ["x", "x"])), expected, atol=3e-5)
    assert np.abs(expected - bare).max() > 0.1


def test_equal_weights_that_are_kept_once_come_apart(files: GraphFiles) -> None:
    model, names = onnx.load(files.bare), files.layout.names()
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights(model)]
    products[1].input[1] = products[0].input[1]
    change = random_adapter(files.layout, rank=2, seed=1)
    one = Adapter(2, {names[1]: change.pairs[names[1]]})
    before = weights(model)[products[0].input[1]]
    added = add_adapter(model, one)
    first, second = (weights(added)[node.input[1]] for node in products[:2])
    np.testing.assert_array_equal(first, before)
    pair = one.pairs[names[1]]
    np.testing.assert_allclose(second, before + (pair.b @ pair.a).T, atol=1e-6)


def test_an_adapter_that_does_not_fit_is_refused(files: GraphFiles) -> None:
    name, pair = next(iter(random_adapter(files.layout, rank=2, seed=1).pairs.items()))
    for wrong in ({"no.such.layer": pair}, {name: LoraPair(pair.a[:, :-1], pair.b)}):
        with pytest.raises(AdapterMismatch):
            add_adapter(onnx.load(files.bare), Adapter(2, wrong))


def test_in_a_process_the_graph_replaces_those_of_other_adapters(files: GraphFiles, tmp_path: Path) -> None:
    own = GraphFiles(tmp_path)
    for digest in ("one", "two"):
        write_adapter(tmp_path / digest, random_adapter(files.layout, rank=2, seed=len(digest)))
        request = MergeRequest(str(files.bare), str(tmp_path / digest), str(own.merged(digest)))
        assert process(request).returncode == 0
    assert [path.name for path in tmp_path.glob("*.onnx*")] == [own.merged("two").name]
    ended = process(replace(request, adapter=str(tmp_path / "none"), target=str(own.merged("three"))))
    assert ended.returncode and "adapter_config.json is missing" in ended.stderr.splitlines()[-1]
    assert own.merged("two").is_file()


def test_the_digest_is_that_of_the_adapter_alone() -> None:
    config, head = FileEntry(path="adapter/x.json", size=1, sha256="a" * 64), "b" * 64
    other = FileEntry(path="head.safetensors", size=1, sha256=head)
    assert adapter_digest([config]) == adapter_digest([other, config])
    assert adapter_digest([config]) != adapter_digest([config.model_copy(update={"sha256": head})])


def process(request: MergeRequest) -> subprocess.CompletedProcess[str]:
    with subprocess.Popen(
        [sys.executable, "-m", "modeling.merge"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stdin is not None and started.stderr is not None
        started.stdin.write(json.dumps(asdict(request)) + "\n")
        started.stdin.flush()
        said = started.stderr.read()
        return subprocess.CompletedProcess(started.args, started.wait(), "", said)


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
