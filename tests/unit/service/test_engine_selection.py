"""Finding an engine: what crashes or hangs is left out, what was chosen is remembered, and the pool changes over."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

import pytest

from model_registry.db import Database
from model_registry.engine_reports import EngineMeasurement, EngineReports
from model_registry.migrations import migrate
from model_registry.refs import ModelRef
from modeling.backbone import GRAPHS_FOLDER, Backbone
from modeling.checkpoints import write_encoder
from modeling.encoder import load_encoder
from modeling.engine_benchmark import EngineReport, TrialRequest, run_trial
from modeling.engines.build import REFERENCE, EngineOptions, EngineSpec
from modeling.engines.graphs import GraphFiles
from modeling.engines.protocol import Engine, EngineBatch, EngineOutputs
from modeling.errors import EngineFailed
from modeling.tasks import Options
from service.inference.capacity import AdmissionController
from service.inference.engine_choice import EngineChoice
from service.inference.engine_selection import EngineSelector, SelectionPolicy, measure
from service.inference.engine_worker import BatchLimits
from service.inference.errors import InferenceError, ModelNotReady
from service.inference.model_pool import ModelPool
from service.inference.predictor import Predictor, PredictResult
from service.metrics import ServingMetrics
from tests.support.world import World, one_labels, run

# Takes the place of `modeling.engine_benchmark`: opens each candidate in turn; `crash` dies, `hang` says nothing more.
_TRIAL = """
import json, sys, time
request = json.loads(sys.stdin.readline())
names = ["torch/fp32", *request["candidates"]]
for name in names:
    print(json.dumps({"engine": name, "stage": "open"}), flush=True)
    if name.startswith("crash"):
        sys.exit(11)
    if name.startswith("hang"):
        time.sleep(60)
print(json.dumps({"reports": [{"engine": name, "texts_per_s": 1.0} for name in names]}), flush=True)
"""


def trial(*candidates: str, stall_s: float = 20.0) -> dict[str, str | None]:
    request = TrialRequest(backbone="-", graphs="-", candidates=candidates)
    reports = run(measure(request, stall_s=stall_s, command=(sys.executable, "-c", _TRIAL)))
    return {report.engine: report.error for report in reports}


def test_an_engine_that_crashes_the_process_is_left_out_and_named() -> None:
    errors = trial("good/fp32", "crash/one", "crash/two", "other/fp32")
    assert errors["good/fp32"] is None and errors["other/fp32"] is None
    assert "status 11" in str(errors["crash/one"]) and "status 11" in str(errors["crash/two"])


def test_an_engine_that_hangs_is_ended() -> None:
    errors = trial("hang/fp32", "good/fp32", stall_s=2.0)
    assert "no sign of life" in str(errors["hang/fp32"]) and errors["good/fp32"] is None


# Says that it has begun, then nothing for the given number of seconds.
_SILENT = """
import json, sys, time
sys.stdin.readline()
print(json.dumps({"engine": "torch/fp32", "stage": "open"}), flush=True)
time.sleep(float(sys.argv[1]))
print(json.dumps({"reports": []}), flush=True)
"""


@dataclass
class Spied:
    """The processes of the trials that a test starts, and the signals that they were sent."""

    processes: list[asyncio.subprocess.Process]
    signals: list[int]

    async def measure(self, seconds: float, in_demand: Callable[[], bool] | None, *, stall_s: float) -> None:
        request = TrialRequest(backbone="-", graphs="-", candidates=())
        command = (sys.executable, "-c", _SILENT, str(seconds))
        await measure(request, stall_s=stall_s, in_demand=in_demand, command=command)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    spied, start = Spied([], []), asyncio.create_subprocess_exec

    async def spying(*command: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*command, **options)
        send = process.send_signal

        def send_signal(signal: int) -> None:
            spied.signals.append(signal)
            send(signal)

        monkeypatch.setattr(process, "send_signal", send_signal)
        spied.processes.append(process)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spying)
    return spied


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing would end a process that is stopped")


@linux_only
@pytest.mark.parametrize("is_in_demand", [True, False, None])
def test_a_patient_trial_pauses_while_requests_are_in_demand(spied: Spied, is_in_demand: bool | None) -> None:
    run(spied.measure(0.2, None if is_in_demand is None else lambda: bool(is_in_demand), stall_s=20))
    assert bool(spied.signals) is (is_in_demand is True)
    assert spied.signals == [SIGSTOP, SIGCONT] * (len(spied.signals) // 2)


@linux_only
def test_pauses_do_not_count_as_silence(spied: Spied) -> None:
    with pytest.raises(EngineFailed, match="no sign of life"):
        run(spied.measure(60, lambda: True, stall_s=0.6))  # it counts from the process's start, which takes a while
    assert spied.signals.count(SIGSTOP) >= 4


@linux_only
def test_a_trial_that_is_cancelled_while_it_is_stopped_ends(spied: Spied) -> None:
    async def cancelled() -> None:
        stopped = asyncio.Event()

        def in_demand() -> bool:
            stopped.set()
            return True

        trial = asyncio.create_task(spied.measure(60, in_demand, stall_s=60))
        await stopped.wait()
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)

    run(cancelled())
    assert [process.returncode for process in spied.processes] == [-SIGKILL]


def test_where_the_trial_itself_does_not_start_it_is_said() -> None:
    request = TrialRequest(backbone="-", graphs="-", candidates=("a/fp32",))
    with pytest.raises(EngineFailed, match="during the start"):
        run(measure(request, stall_s=20, command=(sys.executable, "-c", "raise SystemExit(3)")))


# Dies where it would export.
_DIES_AT_EXPORT = _TRIAL.replace(
    "for name in names:",
    """if any(not name.startswith("torch") for name in names):
    print(json.dumps({"engine": "export", "stage": "export"}), flush=True)
    sys.exit(11)
for name in names:""",
    1,
)


def test_an_export_that_takes_the_process_down_leaves_torch_measured() -> None:
    request = TrialRequest(backbone="-", graphs="-", candidates=("torch/bf16", "onnx/fp32", "openvino/bf16"))
    found = run(measure(request, stall_s=20, command=(sys.executable, "-c", _DIES_AT_EXPORT)))
    errors = {report.engine: report.error for report in found}
    assert errors["torch/fp32"] is None and errors["torch/bf16"] is None
    assert "status 11 during the export" in str(errors["onnx/fp32"]) and errors["openvino/bf16"]


def test_a_backbone_that_cannot_be_exported_is_measured_without_graphs(
    world: World, reports: EngineReports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is kept says why: for `/models`, and for the next start."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("/a/path/of/this/host") from ValueError("no such operator")

    monkeypatch.setattr("modeling.export.export_graphs", fails)
    finder = selector(world, reports)
    request = TrialRequest(
        str(world.backbone.folder), str(world.folder / "g"), ("onnx/fp32", "torch/fp32"), examples=64
    )
    found = run_trial(request, lambda line: None)

    async def measured(*_: Any, **__: Any) -> list[EngineReport]:
        return found

    monkeypatch.setattr("service.inference.engine_selection.measure", measured)
    assert run(finder.select(world.backbone)).engine == "torch/fp32"
    (kept,) = finder.measurements([world.backbone.info.digest])
    refused = {row["engine"]: row["refused"] for row in kept.engines}
    assert refused["onnx/fp32"] == "bert could not be exported (RuntimeError from ValueError)"

    def disk_is_full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("modeling.export.export_graphs", disk_is_full)
    with pytest.raises(OSError, match="full"):
        run_trial(request, lambda line: None)


@pytest.fixture
def reports(tmp_path: Path) -> EngineReports:
    database = Database(f"sqlite:///{tmp_path / 'reports.db'}")
    migrate(database)
    return EngineReports(database)


def selector(world: World, reports: EngineReports | None, engine: str = "auto", **options: Any) -> EngineSelector:
    policy = SelectionPolicy(engine=engine, precision="fp32", examples=64)
    return EngineSelector(policy, EngineOptions(threads=1), world.folder / "graphs", reports, **options)


@pytest.mark.slow
def test_the_choice_is_measured_once_and_remembered(world: World, reports: EngineReports) -> None:
    """The real trial on a tiny backbone; which engine wins is the machine's affair."""
    first = selector(world, reports)
    engine, is_final = first.open_first(world.backbone)
    assert engine.name == "torch" and not is_final
    choice = run(first.select(world.backbone))
    (measured,) = first.measurements([world.backbone.info.digest])
    by_name = {row["engine"]: row for row in measured.engines}
    assert {"torch/fp32", "onnx/fp32", "openvino/fp32"} <= set(by_name)
    assert by_name["torch/fp32"]["rows"] == 64 and by_name["torch/fp32"]["flips"] == 0.0
    for row in by_name.values():
        assert (row["engine"] == measured.chosen) or row["refused"] or row["engine"] == "torch/fp32"
    again, is_final = selector(world, reports).open_first(world.backbone)
    assert is_final and f"{again.name}/{again.precision}" == choice.engine
    other, is_final = selector(world, reports, engine="onnx").open_first(world.backbone)
    assert other.name == "torch" and not is_final, "another policy has to be measured anew"


def report(engine: str, texts_per_s: float, *, cosine: float = 1.0) -> EngineReport:
    return EngineReport(engine, texts_per_s, single_ms=1.0, rows=64, flips=0.0, min_cosine=cosine, max_abs_dp=0.0)


@pytest.fixture
def measure_gives(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has every trial end with these reports."""

    def give(*found: EngineReport) -> None:
        async def measured(*_: Any, **__: Any) -> list[EngineReport]:
            return list(found)

        monkeypatch.setattr("service.inference.engine_selection.measure", measured)

    return give


def test_an_engine_named_by_the_operator_serves_although_it_is_slower(
    world: World, reports: EngineReports, measure_gives: Callable[..., None]
) -> None:
    asked = selector(world, reports, engine="onnx")
    measure_gives(report("torch/fp32", 100.0), report("onnx/fp32", 10.0))
    assert run(asked.select(world.backbone)).engine == "onnx/fp32"
    measure_gives(report("torch/fp32", 100.0), report("onnx/fp32", 10.0, cosine=0.9))
    assert run(asked.select(world.backbone)).engine == "torch/fp32"


def test_weights_of_a_known_shape_are_proven_equal_and_keep_the_speed_of_their_like(
    world: World, reports: EngineReports, measure_gives: Callable[..., None], tmp_path: Path
) -> None:
    """Their trial pauses for requests, so that its own clock says nothing."""
    finder, other = selector(world, reports), of_the_same_shape(world, tmp_path / "full")
    world.export(world.backbone, finder._graphs(world.backbone).folder)
    measure_gives(report("torch/fp32", 100.0), report("onnx/fp32", 300.0))
    run(finder.select(world.backbone))
    measure_gives(report("torch/fp32", 50.0), report("onnx/fp32", 20.0))
    assert run(finder.select(other, like=world.backbone)).engine == "onnx/fp32"
    (kept,) = finder.measurements([other.info.digest])
    assert {row["engine"]: row["texts_per_s"] for row in kept.engines} == {"torch/fp32": 100.0, "onnx/fp32": 300.0}
    measure_gives(report("torch/fp32", 50.0), report("onnx/fp32", 20.0, cosine=0.9))
    assert run(finder.select(other, like=world.backbone)).engine == "torch/fp32"


def test_a_trial_whose_clock_must_tell_does_not_pause(
    world: World, reports: EngineReports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the same shape have no measurement yet either."""
    paused: list[bool] = []

    async def measured(*_: Any, in_demand: Callable[[], bool] | None, **__: Any) -> list[EngineReport]:
        paused.append(in_demand is not None)
        return [report("torch/fp32", 100.0), report("onnx/fp32", 300.0)]

    monkeypatch.setattr("service.inference.engine_selection.measure", measured)
    finder = selector(world, reports)
    world.export(world.backbone, finder._graphs(world.backbone).folder)
    for like in (world.backbone, None, world.backbone):
        run(finder.select(world.backbone, like=like, in_demand=lambda: True))
    assert paused == [False, False, True]


@pytest.mark.parametrize("name", ["backbone.onnx", "backbone.onnx.data", "lora.onnx", "lora.onnx.data"])
def test_a_damaged_graph_leaves_torch_serving_and_is_exported_anew(
    world: World, reports: EngineReports, name: str
) -> None:
    finder = selector(world, reports)
    digest = world.backbone.info.digest
    files = world.export(world.backbone, finder._graphs(world.backbone).folder)
    reports.put(EngineMeasurement(digest, finder._device_key(), {}, "onnx/fp32", []))
    assert selector(world, reports).open_first(world.backbone)[0].name == "onnx"
    damaged = files.folder / name
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    files.variant("int8").bare.write_bytes(b"made of a damaged graph")
    fallbacks: list[tuple[str, str]] = []
    finder = selector(world, reports, on_fallback=lambda name, spec, error: fallbacks.append((name, str(spec))))
    engine, is_final = finder.open_first(world.backbone)
    assert (engine.name, is_final) == ("torch", False)
    assert fallbacks == [("tiny", "onnx/fp32")]
    assert not list(files.folder.iterdir()), "what was made of a damaged graph may be damaged too"
    world.export(world.backbone, files.folder)
    assert selector(world, reports).open_first(world.backbone)[0].name == "onnx"


class Scripted(EngineSelector):
    """A selector whose trial is replaced: it answers `choice`, or fails."""

    def __init__(self, world: World, choice: str | Exception) -> None:
        super().__init__(SelectionPolicy(engine="auto"), EngineOptions(threads=1), world.folder / "graphs", None)
        self.choice, self.export = choice, world.export
        self.opened: list[str] = []

    async def select(
        self, backbone: Backbone, *, like: Backbone | None = None, in_demand: Callable[[], bool] = lambda: False
    ) -> EngineChoice:
        await asyncio.sleep(0)
        if isinstance(self.choice, Exception):
            raise self.choice
        return EngineChoice(self.choice, {})

    def open(self, spec: EngineSpec, backbone: Backbone) -> Engine:
        self.opened.append(str(spec))
        if str(spec) == "torch/fp32":
            return super().open(spec, backbone)
        self.export(backbone, self._graphs(backbone).folder)
        return super().open(spec, backbone)


async def ask(pool: ModelPool, model: str) -> PredictResult:
    admission = AdmissionController(max_inputs=9, max_queue_delay_s=60)
    predictor = Predictor(admission, ServingMetrics(), max_inputs=9, preprocessor_threads=1)
    try:
        return await predictor.predict(
            await pool.find("default", ModelRef.parse(model)),
            ["a good film", "dull"],
            Options(),
            deadline=time.monotonic() + 30,
        )
    finally:
        predictor.close()


def before_and_after(
    world: World, chosen: EngineSelector, metrics: ServingMetrics
) -> tuple[PredictResult, PredictResult]:
    async def scenario() -> tuple[PredictResult, PredictResult]:
        limits = BatchLimits(1024, 32, 0.0)
        pool = ModelPool(world.store, chosen, limits, metrics, memory_budget_bytes=1 << 30)
        try:
            await pool.add_backbone("tiny", world.backbone)
            await pool.apply(world.registry.snapshot())
            before = await ask(pool, "m")
            await pool.engines.idle()
            return before, await ask(pool, "m")
        finally:
            await pool.stop()

    answers: tuple[PredictResult, PredictResult] = run(scenario())
    return answers


@pytest.mark.parametrize("engine", ["onnx/fp32", "openvino/fp32"])
def test_the_chosen_engine_takes_over_while_serving(world: World, engine: str) -> None:
    world.publish("m", seed=1)
    before, after = before_and_after(world, Scripted(world, engine), ServingMetrics())
    assert (before.engine, after.engine) == ("torch/fp32", engine)
    for one, other in zip(one_labels(before), one_labels(after), strict=True):
        assert one.label == other.label
        assert one.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.parametrize("failure", [EngineFailed("no exporter"), RuntimeError("a bug"), "no-such/fp32"])
def test_where_no_engine_comes_about_the_first_goes_on_and_it_is_counted(
    world: World, failure: str | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish("m", seed=1)
    metrics = ServingMetrics()
    _, after = before_and_after(world, Scripted(world, failure), metrics)
    assert after.engine == "torch/fp32"
    reason = type(failure).__name__ if isinstance(failure, Exception) else "EngineFailed"
    labels = {"backbone": "tiny", "from": "auto", "to": "torch/fp32", "reason": reason}
    assert metrics.registry.get_sample_value("polyhead_engine_fallback_total", labels) == 1


@pytest.mark.parametrize(
    ("failure", "says"), [(EngineFailed("no exporter"), "no exporter"), (RuntimeError("/a/path"), "RuntimeError")]
)
def test_why_an_engine_does_not_serve_is_kept(world: World, failure: Exception, says: str) -> None:
    async def scenario() -> tuple[str | None, str | None]:
        limits = BatchLimits(1024, 32, 0.0)
        chosen = Scripted(world, failure)
        pool = ModelPool(world.store, chosen, limits, ServingMetrics(), memory_budget_bytes=1 << 30)
        try:
            await pool.add_backbone("tiny", world.backbone)
            await pool.engines.idle()
            await pool.apply(world.registry.snapshot())
            await ask(pool, "m")
            lane = pool.backbones()["tiny"].lane
            return pool.status.reason_of(lane), pool.status.engine_reason(("default", "m", 1))
        finally:
            await pool.stop()

    world.publish("m", seed=1)
    assert run(scenario()) == (says, says)


class Fragile:
    """An engine that computes like another until `fault` is set, which then decides what becomes of each run."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self._engine = name, engine
        self.fault: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, batch: EngineBatch) -> EngineOutputs:
        if self.fault is not None:
            self.fault()
        return self._engine.run(batch)


class StartsFragile(Scripted):
    def __init__(self, world: World, *, name: str = "fragile") -> None:
        super().__init__(world, "torch/fp32")
        self._name = name
        self.fragile: Fragile | None = None

    def open_first(self, backbone: Backbone, *, like: Backbone | None = None) -> tuple[Engine, bool]:
        self.fragile = Fragile(self._name, super().open(REFERENCE, backbone))
        return self.fragile, True


def broken() -> None:
    raise EngineFailed("the device is gone")


def hang(gate: threading.Event) -> None:
    gate.wait(60)


@pytest.mark.parametrize("kind", ["fails", "hangs"])
def test_an_engine_that_fails_while_it_serves_is_replaced_by_the_reference(world: World, kind: str) -> None:
    world.publish("m", seed=1)
    metrics, gate = ServingMetrics(), threading.Event()

    async def scenario() -> tuple[PredictResult, PredictResult, list[str]]:
        selector = StartsFragile(world)
        limits = BatchLimits(1024, 32, 0.0, engine_timeout_s=0.5)
        pool = ModelPool(world.store, selector, limits, metrics, memory_budget_bytes=1 << 30)
        try:
            await pool.add_backbone("tiny", world.backbone)
            await pool.apply(world.registry.snapshot())
            before = await ask(pool, "m")
            assert selector.fragile is not None
            selector.fragile.fault = broken if kind == "fails" else partial(hang, gate)
            errors: list[str] = []
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    after = await ask(pool, "m")
                    serving = {"backbone": "tiny", "engine": "torch/fp32"}
                    assert metrics.registry.get_sample_value("polyhead_batch_tokens_limit", serving)
                    return before, after, errors
                except InferenceError as error:
                    errors.append(type(error).__name__)
                    await asyncio.sleep(0.02)
            raise AssertionError(f"never served again: {errors}")
        finally:
            gate.set()
            await pool.stop()

    before, after, errors = run(scenario())
    assert (before.engine, after.engine) == ("fragile/fp32", "torch/fp32")
    assert one_labels(before)[0].label == one_labels(after)[0].label
    assert set(errors) <= {"InferenceFailed", "ModelNotReady"} and errors
    labels = {"backbone": "tiny", "from": "fragile/fp32", "to": "torch/fp32", "reason": "EngineFailed"}
    assert metrics.registry.get_sample_value("polyhead_engine_fallback_total", labels) == 1


def test_where_the_reference_itself_fails_the_service_says_so_until_it_passes_again(world: World) -> None:
    world.publish("m", seed=1)

    async def scenario() -> list[bool]:
        selector = StartsFragile(world, name="torch")
        pool = ModelPool(world.store, selector, BatchLimits(1024, 32), ServingMetrics(), memory_budget_bytes=1 << 30)
        try:
            await pool.add_backbone("tiny", world.backbone)
            await pool.apply(world.registry.snapshot())
            worker = pool.engines.lanes()[0].worker
            assert selector.fragile is not None
            selector.fragile.fault = broken
            fit = [worker.is_fit]
            for _ in range(3):
                with contextlib.suppress(InferenceError):
                    await ask(pool, "m")
            await asyncio.sleep(0.2)
            fit.append(worker.is_fit)
            assert worker.supervisor.unfit_for_s() > 0
            with pytest.raises(ModelNotReady):
                await ask(pool, "m")
            selector.fragile.fault = None
            await asyncio.sleep(2)
            return [*fit, worker.is_fit, (await ask(pool, "m")).engine == "torch/fp32"]
        finally:
            await pool.stop()

    assert run(scenario()) == [True, False, True, True]


def test_the_pool_knows_a_fine_tune_for_the_like_of_its_backbone(world: World, tmp_path: Path) -> None:
    """Though it lacks the pooler, and its vectors are not normalised."""
    tuned = write_encoder(
        tmp_path / "full",
        load_encoder(world.backbone.folder),
        like=world.backbone.folder,
        name="tiny",
        source="full fine-tune",
        pooling="mean",
        normalize=not world.backbone.info.normalize,
        max_length=8,
    )
    assert tuned.info.parameters < world.backbone.info.parameters
    asked: list[Backbone | None] = []

    class Asked(Scripted):
        def open_first(self, backbone: Backbone, *, like: Backbone | None = None) -> tuple[Engine, bool]:
            asked.append(like)
            return super().open(REFERENCE, backbone), True

    async def scenario() -> None:
        pool = ModelPool(
            world.store,
            Asked(world, "torch/fp32"),
            BatchLimits(1024, 32, 0.0),
            ServingMetrics(),
            memory_budget_bytes=1 << 30,
        )
        try:
            await pool.add_backbone("tiny", world.backbone)
            await pool.engines.lane_of(tuned)
        finally:
            await pool.stop()

    run(scenario())
    assert asked == [None, world.backbone]


def of_the_same_shape(world: World, folder: Path) -> Backbone:
    return write_encoder(
        folder,
        load_encoder(world.backbone.folder),
        like=world.backbone.folder,
        name="tiny",
        source="test",
        pooling="mean",
        normalize=False,
        max_length=16,
    )


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left")


def test_weights_of_a_known_shape_begin_on_the_engine_that_serves_there(
    world: World, reports: EngineReports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the export that they bring, which is linked into the cache and left as it is."""
    finder = selector(world, reports)
    reports.put(EngineMeasurement(world.backbone.info.digest, finder._device_key(), {}, "onnx/fp32", []))
    world.export(world.backbone, finder._graphs(world.backbone).folder)
    other = of_the_same_shape(world, tmp_path / "full")
    assert other.info.digest != world.backbone.info.digest
    engine, is_final = selector(world, reports).open_first(other, like=world.backbone)
    assert (engine.name, is_final) == ("torch", False), "without an export there is nothing to begin on"
    brought = world.export(other, other.folder / GRAPHS_FOLDER, has_adapters=False)
    before = {path.name: path.stat().st_mtime_ns for path in brought.folder.iterdir()}
    engine, is_final = selector(world, reports).open_first(other, like=world.backbone)
    assert (engine.name, is_final) == ("onnx", False)
    assert {path.name: path.stat().st_mtime_ns for path in brought.folder.iterdir()} == before
    shutil.rmtree(finder._graphs(other).folder)
    with monkeypatch.context() as patch:
        patch.setattr(GraphFiles, "adopt", full_disk)
        engine, is_final = selector(world, reports).open_first(other, like=world.backbone)
    assert (engine.name, is_final) == ("torch", False), "without room for the export torch serves"
    brought.bare.write_bytes(brought.bare.read_bytes()[:-2000])
    assert not brought.is_complete
