"""A data folder of an earlier release goes on serving, and old and new processes work side by side on one.

The folder was written by `tests.support.data_folder`. With `POLYHEAD_OLD_CHECKOUT`, a folder with the code of an
earlier release, each release serves what the other one trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeling.backbone import GRAPHS_FOLDER, Backbone
from modeling.engines.build import EngineOptions, EngineSpec, build_engine
from modeling.engines.graphs import GraphFiles
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.inputs import open_preprocessor, single
from tests.acceptance.processes import REPOSITORY, Client
from tests.support import data_folder
from tests.support.data_folder import DataFolder

FIXTURE = Path(__file__).parents[1] / "fixtures" / "data_folder"
EXPECTED: dict[str, Any] = json.loads((FIXTURE / data_folder.EXPECTED).read_text())
OLD = Path(os.environ.get("POLYHEAD_OLD_CHECKOUT", ""))
TOLERANCE = 1e-5
WITHOUT_GRAPH = {"baseline", "linear_probe", "lora"}


@dataclass
class Upgraded:
    folder: DataFolder
    client: Client


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgraded]:
    """A server of this tree on a copy."""
    folder = DataFolder.unpack(FIXTURE / data_folder.ARCHIVE, tmp_path_factory.mktemp("folder"))
    with folder.server() as server, Client(server.wait_ready().url) as client:
        yield Upgraded(folder, client)


def test_every_version_answers_as_it_did(upgraded: Upgraded) -> None:
    for reference, wanted in EXPECTED["answers"].items():
        same(data_folder.answer(upgraded.client, reference), wanted, reference)
    for name, model in EXPECTED["models"].items():
        for alias, version in model["aliases"].items():
            by_alias = data_folder.answer(upgraded.client, f"{name}@{alias}")
            same(by_alias, EXPECTED["answers"][f"{name}:{version}"], f"{name}@{alias}")


def test_what_was_recorded_can_be_read(upgraded: Upgraded) -> None:
    client = upgraded.client
    found = data_folder.models(client)
    assert {name: found[name] for name in EXPECTED["models"]} == EXPECTED["models"]
    for name, model in EXPECTED["models"].items():
        assert client.get(f"/models/{name}")["id"] == name
        assert {move["alias"] for move in client.get(f"/models/{name}/history")["data"]} == set(model["aliases"])
        for version in (f"/models/{name}/versions/{one['version']}" for one in model["versions"]):
            assert client.get(version)["status"] == "ready"
            assert name in client.http.get(f"{version}/card").text
            assert client.get(f"{version}/files/golden.json")
    jobs = {job["id"]: job for job in client.get("/finetune", limit=100)["data"]}
    assert jobs.keys() == {*EXPECTED["jobs"], EXPECTED["queued"]}
    for job in EXPECTED["jobs"]:
        assert jobs[job]["status"] == "succeeded"
        assert client.events(job)[-1]["data"]["status"] == "succeeded"
        assert client.get(f"/finetune/{job}/evaluation")
    for dataset in client.get("/datasets")["data"]:
        for part in ("", "/report", "/preview"):
            assert client.get(f"/datasets/{dataset['id']}{part}")


def test_the_job_that_waited_is_run(upgraded: Upgraded) -> None:
    with upgraded.folder.worker() as worker:
        worker.wait_ready()
        upgraded.client.wait(EXPECTED["queued"])
    assert len(data_folder.answer(upgraded.client, "queued")) == len(data_folder.TEXTS) + len(data_folder.PAIRS)


def test_graphs_that_versions_brought_still_run(upgraded: Upgraded) -> None:
    graphs = sorted(upgraded.folder.folder.glob(f"data/store/models/**/{GRAPHS_FOLDER}"))
    assert len(graphs) == len([method for _, method in data_folder.trained() if method not in WITHOUT_GRAPH])
    for folder in graphs:
        backbone = Backbone.open(folder.parent)
        rows = single(open_preprocessor(backbone).encode([*data_folder.TEXTS, *data_folder.PAIRS]))
        engine = build_engine(EngineSpec("onnx"), backbone, GraphFiles(folder), EngineOptions(threads=1))
        found, wanted = (one.run(EngineBatch(rows)).pooled for one in (engine, TorchEngine(backbone)))
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=str(folder))


@pytest.mark.skipif(not OLD.name, reason="needs POLYHEAD_OLD_CHECKOUT, a folder with the code of an earlier release")
@pytest.mark.parametrize(
    ("trainer", "reader"), [(REPOSITORY, OLD), (OLD, REPOSITORY)], ids=["new trains", "old trains"]
)
def test_each_release_serves_what_the_other_trained(tmp_path: Path, trainer: Path, reader: Path) -> None:
    folder = DataFolder.unpack(FIXTURE / data_folder.ARCHIVE, tmp_path)
    with folder.server(reader) as server, Client(server.wait_ready().url, is_ours=reader is REPOSITORY) as client:
        datasets = {task: data_folder.upload(client, task) for task in data_folder.TASKS}
        with folder.worker(trainer) as worker:
            worker.wait_ready()
            jobs = {
                name: data_folder.submit(client, datasets[task], task, method, name=name)
                for task, method in data_folder.trained()
                for name in [f"new-{data_folder.model_name(task, method)}"]
            }
            for job in jobs.values():
                client.wait(job, within_s=600)
        answers = {name: data_folder.answer(client, name) for name in jobs}
    with folder.server(trainer) as server, Client(server.wait_ready().url, is_ours=trainer is REPOSITORY) as client:
        for name, wanted in answers.items():
            same(data_folder.answer(client, name), wanted, name)


def same(found: Any, wanted: Any, where: str) -> None:
    """Compare answers: numbers within the tolerance of golden rows, everything else exactly."""
    if isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=TOLERANCE, rel=TOLERANCE), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            same(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, value in enumerate(wanted):
            same(found[number], value, f"{where}[{number}]")
    else:
        assert found == wanted, where
