"""The proof that nothing but its own files knows a modality: sequences of floats go all the way that texts go, through
the real classes, by a line in each dict (`tests.support.series`)."""

from __future__ import annotations

import asyncio
import io
import itertools
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.check import ROWS_FILE, write_checked
from finetune.jobs.link import ChildJob, DatasetInput
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec
from finetune.training.recipe import run_job
from model_registry.db import Database
from model_registry.manifest import MANIFEST_NAME, BackboneRef, ModelManifest
from model_registry.migrations import migrate
from model_registry.refs import ModelRef
from model_registry.registry import Promotion, Registry
from model_registry.store import FileStore
from modeling.assemble import GoldenRow, write_version_files
from modeling.backbone import GRAPHS_FOLDER, Backbone, ingest
from modeling.engine_benchmark import TrialRequest, run_trial
from modeling.engines.build import EngineOptions, EngineSpec, build_engine
from modeling.engines.graphs import GraphFiles
from modeling.engines.protocol import Engine, EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.export import export_graphs
from modeling.heads import DenseLayer, TaskHead, softmax
from modeling.inputs import open_preprocessor, single
from modeling.tasks import TASKS, Options
from service.inference.capacity import AdmissionController
from service.inference.lanes import taken
from service.inference.predictor import Predictor, PredictResult
from service.metrics import ServingMetrics
from tests.integration.test_recipe import RecordingLink
from tests.support import series
from tests.support.adapters import random_adapter
from tests.support.series import CHANNELS, HIDDEN, KIND, LIMIT, PER_POSITION, RANKING, Series, as_series
from tests.support.world import World

RUNTIMES = ["torch", "onnx", "openvino"]
LABELS = ("down", "up")


@pytest.fixture(scope="module", autouse=True)
def modality() -> Iterator[None]:
    with series.registered():
        yield


class SeriesWorld(World):
    """A registry and a store with a backbone of series, whose engine `runtime` names."""

    runtime = "torch"

    def open_engine(self, backbone: Backbone) -> Engine:
        files = GraphFiles(backbone.folder / GRAPHS_FOLDER)
        if not files.is_complete and self.runtime != "torch":
            files = export_graphs(backbone, self.folder / "exports" / backbone.info.digest)
        return build_engine(EngineSpec(self.runtime), backbone, files, EngineOptions(threads=1))

    def publish_head(self, name: str, task: str, head: TaskHead) -> None:
        """A head over the backbone, with golden rows by torch."""
        golden = [walk(3, seed=1), walk(9, seed=2), walk(LIMIT + 4, seed=3)]
        rows, needs = encoded(self.backbone, golden), TASKS[task].needs
        outputs = TorchEngine(self.backbone).run(EngineBatch(rows, states=range(len(rows))))
        logits = [head.logits(taken(outputs, [row], needs)[0]) for row in range(len(rows))]
        kept = [values if needs == "states" else values[0] for values in logits]

        def write(staged: Path) -> None:
            write_version_files(
                staged,
                head=head,
                labels=LABELS,
                max_length=LIMIT,
                temperature=1.0,
                golden=[GoldenRow(example, row.tolist()) for example, row in zip(golden, kept, strict=True)],
                task=task,
            )

        base = BackboneRef(name="tiny", digest=self.backbone.info.digest, source="file:tiny")
        self._register(name, LABELS, write, kind="head", method="linear_probe", base=base, promote=True, task=task)

    def publish_trained(self, result: dict[str, Any]) -> None:
        """As the supervisor commits what a child reported."""
        manifest = ModelManifest.model_validate(result["manifest"])
        self.store.put_bytes(f"{manifest.prefix}/{MANIFEST_NAME}", manifest.to_bytes(), create_only=True)
        promotion = Promotion(is_wanted=True, over=None, reason="a test")
        with self.registry.transaction() as connection:
            self.registry.reserve(
                connection,
                tenant="default",
                name=manifest.name,
                task=manifest.task,
                kind=manifest.kind,
                method=manifest.method,
                job_id=None,
            )
            self.registry.publish(connection, manifest, actor="test", promotion=promotion)

    def ask(self, asked: Sequence[tuple[str, Sequence[Any], Options]]) -> list[PredictResult]:
        """All requests at once, so that they share batches."""

        async def scenario() -> list[PredictResult]:
            predictor = Predictor(
                AdmissionController(max_inputs=1000, max_queue_delay_s=60),
                ServingMetrics(),
                max_inputs=500,
                preprocessor_threads=1,
            )
            try:
                async with self.pool() as pool:
                    await pool.apply(self.registry.snapshot())
                    models = [await pool.find("default", ModelRef.parse(name)) for name, _, _ in asked]
                    deadline = time.monotonic() + 60
                    return await asyncio.gather(
                        *(
                            predictor.predict(model, inputs, options, deadline=deadline)
                            for model, (_, inputs, options) in zip(models, asked, strict=True)
                        )
                    )
            finally:
                predictor.close()

        return asyncio.run(scenario())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeriesWorld]:
    folder = tmp_path_factory.mktemp("series")
    database = Database(f"sqlite:///{folder / 'registry.db'}")
    migrate(database)
    store = FileStore(folder / "store")
    backbone = ingest(store, series.write_checkpoint(folder / "checkpoint"), name="tiny", source="file:tiny")
    world = SeriesWorld(Registry(database), store, backbone, folder)
    world.make_engine = world.open_engine
    world.publish_head("kind", KIND, random_head(seed=1))
    world.publish_head("positions", PER_POSITION, random_head(seed=2))
    world.publish_head("ranking", RANKING, random_head(seed=3))
    yield world
    database.dispose()


@pytest.fixture(params=RUNTIMES)
def world(home: SeriesWorld, request: pytest.FixtureRequest) -> SeriesWorld:
    home.runtime = request.param
    return home


def walk(length: int, *, seed: int, drift: float = 0.0) -> Series:
    return as_series(np.random.default_rng(seed).normal(size=(length, CHANNELS)).cumsum(axis=0) * 0.3 + drift)


def random_head(*, seed: int) -> TaskHead:
    weight = np.random.default_rng(seed).normal(size=(len(LABELS), HIDDEN)).astype(np.float32)
    return TaskHead((DenseLayer(weight, np.zeros(len(LABELS), np.float32)),))


def encoded(backbone: Backbone, examples: Sequence[Series]) -> list[Any]:
    return single(open_preprocessor(backbone).encode(examples))


def test_a_batch_answers_each_row_as_alone_with_and_without_an_adapter(world: SeriesWorld) -> None:
    engine, reference = world.open_engine(world.backbone), TorchEngine(world.backbone)
    layout = export_graphs(world.backbone, world.folder / "exports" / world.backbone.info.digest).layout
    assert layout.groups
    for each in (engine, reference):
        each.load_adapter("a", random_adapter(layout, rank=4, seed=1))
    rows = encoded(world.backbone, [walk(length, seed=length) for length in (1, 7, 2, 24, 11)])
    keys = [None, "a", None, "a", "a"]
    together = engine.run(EngineBatch(rows, keys, range(5)))
    for row in range(5):
        alone = reference.run(EngineBatch([rows[row]], [keys[row]], [0]))
        np.testing.assert_allclose(together.pooled[row], alone.pooled[0], atol=1e-5)
        np.testing.assert_allclose(together.states[row], alone.states[0], atol=1e-5)
    assert np.abs(together.pooled[1] - engine.run(EngineBatch(rows)).pooled[1]).max() > 0.01


def test_engines_are_measured_on_the_modalitys_own_probe_set(home: SeriesWorld) -> None:
    names = tuple(f"{runtime}/fp32" for runtime in RUNTIMES)
    folder = home.folder / "exports" / home.backbone.info.digest
    reports = run_trial(TrialRequest(str(home.backbone.folder), str(folder), names, threads=1), lambda _: None)
    assert [report.engine for report in reports] == list(names)
    for report in reports:
        assert report.error is None or "not measured further" in report.error
        assert report.min_cosine is None or report.min_cosine > 0.9999


def test_heads_on_vectors_and_on_states_share_batches(world: SeriesWorld) -> None:
    inputs = [walk(length, seed=length, drift=length % 3 - 1) for length in (1, 5, 24, 12, 3)]
    kinds, positions = world.ask([("kind", inputs, Options()), ("positions", inputs, Options())])
    outputs = TorchEngine(world.backbone).run(EngineBatch(encoded(world.backbone, inputs), states=range(5)))
    probabilities = softmax(random_head(seed=1).logits(outputs.pooled))
    for row, (kind, labels) in enumerate(zip(kinds.answers, positions.answers, strict=True)):
        assert kind.score == pytest.approx(probabilities[row].max(), abs=1e-5)  # type: ignore[attr-defined]
        expected = random_head(seed=2).logits(outputs.states[row]).argmax(axis=1)
        assert labels.labels == [LABELS[index] for index in expected]  # type: ignore[attr-defined]
    assert kinds.input_tokens == sum(map(len, inputs))


def test_an_input_that_must_not_be_cut_is_read_in_two_windows(world: SeriesWorld) -> None:
    long = walk(LIMIT + 6, seed=8)
    whole, cut, first, second = world.ask(
        [
            ("positions", [long], Options(truncate=False)),
            ("positions", [long], Options()),
            ("positions", [long[:LIMIT]], Options()),
            ("positions", [long[LIMIT:]], Options()),
        ]
    )
    labels = [result.answers[0].labels for result in (whole, cut, first, second)]  # type: ignore[attr-defined]
    assert labels[0] == labels[2] + labels[3] and labels[1] == labels[2]
    assert whole.input_tokens == len(long)


def test_one_query_against_several_documents(world: SeriesWorld) -> None:
    query, documents = walk(3, seed=1), [walk(length, seed=length) for length in (4, 9, 2)]
    ranked, alone = world.ask(
        [
            ("ranking", [(query, documents), (query, documents[:1])], Options()),
            ("ranking", [(query, [document]) for document in documents], Options()),
        ]
    )
    scores = [answer.scores for answer in ranked.answers]  # type: ignore[attr-defined]
    each = list(itertools.chain(*(answer.scores for answer in alone.answers)))  # type: ignore[attr-defined]
    assert scores[0] == pytest.approx(each, abs=1e-5) and scores[1] == pytest.approx(each[:1], abs=1e-5)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Series in files of an archive, which the cells of the table name."""
    folder, sink = tmp_path_factory.mktemp("rows"), io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for number in range(120):
            label = LABELS[number % 2]
            values = walk(4 + number % 30, seed=number, drift=1.5 if label == "up" else -1.5)
            archive.writestr(f"{label}/{number}.f32", values.astype("<f4").tobytes())
    (folder / "raw").write_bytes(sink.getvalue())
    assert write_checked(folder / "raw", "zip", folder).is_valid
    return folder / ROWS_FILE


@pytest.fixture
def trained(home: SeriesWorld, rows_file: Path, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    def train(method: str) -> dict[str, Any]:
        job = ChildJob(
            job_id="ft_1",
            tenant="default",
            attempt=1,
            spec=JobSpec(
                dataset="ds_1",
                backbone="tiny",
                register_as=method.replace("_", "-"),
                task=KIND,
                hyperparameters={"method": method, **({} if method == "linear_probe" else {"epochs": 6})},
            ),
            train=DatasetInput(id="ds_1", sha256="0" * 64, rows_file=rows_file),
            backbone_folder=home.backbone.folder,
            store_root=home.store.root,
            work_dir=tmp_path,
            worker=WorkerProfile(cpu_threads=1),
        )
        link = RecordingLink()
        run_job(job, link)
        assert link.result is not None
        return link.result

    return train


@pytest.mark.parametrize("method", ["linear_probe", "full", "lora"])
def test_what_is_trained_on_files_of_an_archive_is_served_on_every_engine(
    home: SeriesWorld, trained: Callable[[str], dict[str, Any]], method: str
) -> None:
    result = trained(method)
    assert result["evaluation"]["test"]["accuracy"] > 0.9
    home.publish_trained(result)
    inputs = [walk(9, seed=1000 + number, drift=drift) for number, drift in enumerate((1.5, -1.5, 1.5))]
    for runtime in RUNTIMES:
        home.runtime = runtime
        (answered,) = home.ask([(method.replace("_", "-"), inputs, Options())])
        assert [answer.label for answer in answered.answers] == ["up", "down", "up"]  # type: ignore[attr-defined]
        assert answered.engine == f"{runtime}/fp32"
