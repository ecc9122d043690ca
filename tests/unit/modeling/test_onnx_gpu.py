"""Buckets, buffers and bindings change no answer. All but the GPU: the same code on the CPU's provider, uncaptured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling.adapters import Adapter, LoraLayout
from modeling.engines import providers
from modeling.engines.graphs import SLOTS_INPUT, GraphFiles
from modeling.engines.onnx_gpu import GpuSession, cuda_engine, cuda_session, device_id, pad_to
from modeling.engines.providers import Ladder, SessionPlan
from modeling.errors import EngineFailed
from modeling.inputs import Features
from modeling.weights import IntArray
from tests.support import graphs

LADDER = Ladder((1, 2, 4), (4, 8))
ON_CPU = providers.cpu(threads=1)
STACK = "lora_a.0"


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphs.write_pooled(tmp_path_factory.mktemp("graph") / "pooled.onnx")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphs.write_pooled(tmp_path_factory.mktemp("graph") / "adapted.onnx", has_stack=True)


class Watched:
    """A session that notes the number under which each run could be captured, and those that were released."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.runs: list[int] = []
        self.released: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.runs.append(int(options.get_run_config_entry("gpu_graph_id")))
        self._session.run_with_iobinding(binding, options)

    def release_captured_graph(self, number: int) -> None:
        self.released.append(number)
        self._session.release_captured_graph(number)


def watch(session: GpuSession) -> Watched:
    watched = Watched(session._session)
    session._session = watched
    return watched


def close(session: GpuSession, path: Path, inputs: Mapping[str, IntArray]) -> None:
    (vectors,) = session.run(inputs)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, graphs.expected(path, inputs), atol=1e-6)


# Answers


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 7), length=st.integers(1, 11), seed=st.integers(0, 99))
def test_inside_and_outside_the_ladder_the_answer_is_the_plain_sessions(
    pooled: Path, rows: int, length: int, seed: int
) -> None:
    close(
        GpuSession(pooled, ON_CPU, padding={"input_ids": 3}, ladder=LADDER),
        pooled,
        graphs.feeds(rows, length, seed=seed),
    )


def test_a_bucket_forgets_the_batch_before(pooled: Path) -> None:
    session = GpuSession(pooled, ON_CPU, padding={}, ladder=LADDER)
    (first,) = session.run(graphs.feeds(4, 8, seed=1))
    kept = first.copy()
    close(session, pooled, graphs.feeds(3, 5, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_without_a_ladder_every_batch_runs_as_it_is(pooled: Path) -> None:
    session = GpuSession(pooled, ON_CPU, padding={})
    watched = watch(session)
    close(session, pooled, graphs.feeds(2, 4))
    assert watched.runs == [-1]


def test_inputs_that_the_graph_lacks_are_ignored(pooled: Path) -> None:
    inputs = graphs.feeds(2, 4)
    (vectors,) = GpuSession(pooled, ON_CPU, padding={}, ladder=LADDER).run(inputs | {"other": np.zeros(2, np.int64)})
    np.testing.assert_allclose(vectors, graphs.expected(pooled, inputs), atol=1e-6)


# Padding


def test_padding_goes_behind_and_added_rows_repeat_the_first() -> None:
    tokens = {
        "input_ids": np.array([[7, 8], [9, 1]]),
        "attention_mask": np.array([[1, 1], [1, 0]]),
        "token_type_ids": np.array([[0, 1], [0, 0]]),
        SLOTS_INPUT: np.array([2, 1]),
    }
    padded = pad_to((3, 4), tokens, padding={"input_ids": 1})
    assert padded["input_ids"].tolist() == [[7, 8, 1, 1], [9, 1, 1, 1], [7, 8, 1, 1]]
    assert padded["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert padded["token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert padded[SLOTS_INPUT].tolist() == [2, 1, 2]
    assert {values.dtype for values in padded.values()} == {np.dtype(np.int64)}


# Captured graphs


def test_a_bucket_keeps_its_number_and_other_shapes_are_not_captured(pooled: Path) -> None:
    session = GpuSession(pooled, ON_CPU, padding={}, ladder=LADDER)
    watched = watch(session)
    for rows, length in ((1, 4), (1, 3), (3, 7), (5, 4), (4, 8), (1, 9)):
        close(session, pooled, graphs.feeds(rows, length))
    assert watched.runs == [1, 1, 2, -1, 2, -1]


# Inputs that stay


def test_a_stack_of_the_same_shape_changes_in_place(adapted: Path) -> None:
    session = GpuSession(adapted, ON_CPU, padding={}, ladder=LADDER)
    watched = watch(session)
    stack = np.arange(3 * graphs.HIDDEN, dtype=np.float32).reshape(3, -1)
    for factor in (1, 10):
        session.bind({STACK: stack * factor})
        for rows in (3, 6):
            inputs = graphs.feeds(rows, 4) | {SLOTS_INPUT: np.arange(rows) % 3}
            expected = graphs.expected(adapted, inputs | {STACK: stack * factor})
            np.testing.assert_allclose(session.run(inputs)[0], expected, atol=1e-5)
    assert watched.released == [] and watched.runs == [1, -1, 1, -1]


def test_a_stack_of_another_shape_starts_the_buckets_anew(adapted: Path) -> None:
    session = GpuSession(adapted, ON_CPU, padding={}, ladder=LADDER)
    watched = watch(session)
    for slots in (2, 5):
        stack = np.full((slots, graphs.HIDDEN), slots, dtype=np.float32)
        session.bind({STACK: stack})
        inputs = graphs.feeds(2, 4) | {SLOTS_INPUT: np.array([slots - 1, 0])}
        np.testing.assert_allclose(session.run(inputs)[0], graphs.expected(adapted, inputs | {STACK: stack}), atol=1e-5)
    assert watched.released == [1] and watched.runs == [1, 2]


def test_a_bound_stack_is_a_copy(adapted: Path) -> None:
    session = GpuSession(adapted, ON_CPU, padding={}, ladder=LADDER)
    stack = np.ones((2, graphs.HIDDEN), dtype=np.float32)
    session.bind({STACK: stack})
    inputs = graphs.feeds(2, 4) | {SLOTS_INPUT: np.array([0, 1])}
    before = session.run(inputs)
    stack *= 5
    np.testing.assert_array_equal(session.run(inputs), before)


# Refusals


@pytest.mark.parametrize("has_ladder", [True, False])
def test_what_the_runtime_refuses_is_an_engine_failure(pooled: Path, has_ladder: bool) -> None:
    session = GpuSession(pooled, ON_CPU, padding={}, ladder=LADDER if has_ladder else None)
    inputs = graphs.feeds(2, 4) | {"input_ids": np.full((2, 4), 10**6)}
    with pytest.raises(EngineFailed, match="could not compute"):
        session.run(inputs)
    close(session, pooled, graphs.feeds(2, 4))


def test_a_missing_provider_is_named_with_what_to_install(pooled: Path) -> None:
    with pytest.raises(EngineFailed, match=r"no CUDAExecutionProvider.*polyhead\[gpu\]"):
        cuda_session(pooled, padding={}, precision="fp32", device_id=0)


class NoInputs:
    """A preprocessor of which only the padding is asked for."""

    limit = 16
    padding: ClassVar[dict[str, float]] = {}

    def encode(self, *_: Any, **__: Any) -> list[list[Features]]:
        raise NotImplementedError

    def windows(self, *_: Any, **__: Any) -> list[list[Features]]:
        raise NotImplementedError

    def collate(self, rows: Sequence[Features], width: int) -> dict[str, Any]:
        raise NotImplementedError

    def sample(self, cost: int) -> Features:
        raise NotImplementedError


NO_INPUTS = NoInputs()


def refuse_to_capture(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Everything runs, on the CPU, but only the first sessions can be captured."""
    refused, captured = providers.cuda(has_graphs=True), itertools.count()

    def plan(*, has_graphs: bool, **_: object) -> SessionPlan:
        return refused if has_graphs and next(captured) >= after else ON_CPU

    monkeypatch.setattr(providers, "cuda", plan)


@pytest.fixture
def files(tmp_path: Path) -> GraphFiles:
    files = GraphFiles(tmp_path)
    graphs.write_pooled(files.bare)
    graphs.write_pooled(files.lora, has_stack=True)
    files.describe(LoraLayout(()), hidden_size=graphs.HIDDEN)
    return files


def test_a_backbone_that_cannot_be_captured_is_refused(files: GraphFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_capture(monkeypatch, after=0)
    assert cuda_engine(files, NO_INPUTS).name == "onnx"
    with pytest.raises(EngineFailed, match="no CUDAExecutionProvider"):
        cuda_engine(files, NO_INPUTS, ladder=LADDER)


def test_adapters_that_cannot_be_captured_run_without(
    files: GraphFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_to_capture(monkeypatch, after=1)
    engine = cuda_engine(files, NO_INPUTS, ladder=LADDER)
    assert engine.name == "onnx-graphs" and caplog.text == ""
    engine.load_adapter("a", Adapter(1, {}))
    assert "adapters run without CUDA graphs" in caplog.text


def test_devices_have_numbers() -> None:
    assert [device_id(device) for device in ("cuda", "cuda:0", "cuda:3")] == [0, 0, 3]
