"""What becomes of a job's data in the recipe: its split, its slices, its suspects, and the record of all that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.data.check import ROWS_FILE, write_checked
from finetune.data.options import Columns
from finetune.jobs.failures import DatasetInvalid
from finetune.jobs.hyperparameters import Hyperparameters
from finetune.jobs.link import ChildJob, DatasetInput
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec
from finetune.training.recipe import frozen_vectors, load_sides, planner, run_job
from model_registry.manifest import ModelManifest
from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest
from modeling.inputs.text import Text
from modeling.testing import write_tiny_checkpoint
from tests.support.links import RecordingLink

LABELS = ("good", "bad")


class RegisteringLink(RecordingLink):
    """Takes what a finished run registers."""

    manifest: dict[str, Any]
    evaluation: dict[str, Any]

    def reserve(self, *, kind: str, method: str) -> int:
        return 1

    def succeed(self, *, manifest: Any, evaluation: Any, was_cancelled: bool) -> None:
        self.manifest, self.evaluation = dict(manifest), dict(evaluation)


def row(number: int) -> dict[str, str]:
    label = LABELS[number % 2]
    return {
        "text": f"a {label} film {label} story number{number} of year{number % 7}",
        # One in forty of each class stands under the other label.
        "label": LABELS[1 - number % 2] if number % 40 in (10, 31) else label,
        "who": f"writer {number // 2 % 30}",
        "source": ("web", "mail", "")[number % 3],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    ingest(FileStore(folder / "store"), write_tiny_checkpoint(folder / "tiny"), name="tiny", source="file:tiny")
    for name, numbers, keys in (
        ("train", range(240), ("text", "label", "who", "source")),
        ("test", range(1000, 1030), ("text", "label")),
    ):
        (folder / name).mkdir()
        lines = [json.dumps({key: row(number)[key] for key in keys}) for number in numbers]
        (folder / name / "raw").write_text("\n".join(lines))
        assert write_checked(folder / name / "raw", "jsonl", folder / name).is_valid
    return folder


@pytest.fixture
def job(home: Path, tmp_path: Path) -> Callable[..., ChildJob]:
    def build(*, test: bool = False, columns: Columns | None = None, **hyperparameters: Any) -> ChildJob:
        (backbone,) = (home / "store" / "backbones").glob("[!.]*/model.safetensors")
        return ChildJob(
            job_id="ft_1",
            tenant="default",
            attempt=1,
            spec=JobSpec(
                dataset="ds_1",
                backbone="tiny",
                register_as="m",
                columns=columns or Columns(),
                hyperparameters={"method": "baseline", **hyperparameters},
            ),
            train=DatasetInput(id="ds_1", sha256="1" * 64, rows_file=home / "train" / ROWS_FILE),
            test=DatasetInput(id="ds_2", sha256="2" * 64, rows_file=home / "test" / ROWS_FILE) if test else None,
            backbone_folder=backbone.parent,
            store_root=home / "store",
            work_dir=tmp_path,
            worker=WorkerProfile(),
        )

    return build


def test_split_columns_and_rows_are_recorded_with_the_version(job: Callable[..., ChildJob], home: Path) -> None:
    link = RegisteringLink()
    torch.manual_seed(0)
    split = {"strategy": "group", "group_column": "who"}
    run_job(job(split=split, columns=Columns(slices=("source",))), link)
    manifest = ModelManifest.model_validate(link.manifest)
    fingerprint = json.loads((home / "store" / manifest.prefix / "data" / "fingerprint.json").read_bytes())
    assert fingerprint["datasets"] == {"train": {"id": "ds_1", "sha256": "1" * 64}}
    assert {name: fingerprint["split"][name] for name in ("strategy", "group_column", "leaks", "test")} == {
        "strategy": "group",
        "group_column": "who",
        "leaks": "drop",
        "test": 0.15,
    }
    assert fingerprint["columns"]["slices"] == ["source"]
    hashes = fingerprint["row_hashes"]
    assert {side: len(own) for side, own in hashes.items()} == fingerprint["rows"]
    assert sum(fingerprint["rows"].values()) == 240
    assert sorted(digest for own in hashes.values() for digest in own) == sorted(
        Text().digest(row(number)["text"]).hex()[:16] for number in range(240)
    )


def test_suspects_stand_in_the_evaluation_and_among_the_events(job: Callable[..., ChildJob]) -> None:
    link = RegisteringLink()
    torch.manual_seed(0)
    run_job(job(), link)
    suspects = link.evaluation["suspects"]
    assert suspects and json.dumps(suspects)
    for suspect in suspects:
        number = suspect["row"] - 1
        assert number % 40 in (10, 31), "only rows that were changed on purpose"
        assert (suspect["given"], suspect["suggested"]) == (row(number)["label"], LABELS[number % 2])
    (event,) = [event for event in link.of("data_warning") if event["data"]["code"] == "suspected_label_error"]
    assert event["data"]["rows"] == [suspect["row"] for suspect in suspects][:20]


def test_slices_come_along_and_one_that_the_test_data_lacks_is_told(job: Callable[..., ChildJob]) -> None:
    link = RecordingLink()
    train, validation, test = load_sides(
        job(test=True, columns=Columns(slices=("source", "who"))), Hyperparameters(), link
    )
    for side in (train, validation):
        expected = [row(number - 1)["source"] or None for number in side.row_numbers.tolist()]
        assert side.extras["source"] == expected and len(side.extras["who"]) == len(side)
    assert test.extras == {"source": [None] * 30, "who": [None] * 30}
    told = [event["data"] for event in link.of("data_warning") if event["data"]["code"] == "missing_column"]
    assert [(finding["severity"], finding["column"]) for finding in told] == [("warning", "source"), ("warning", "who")]


def test_a_column_missing_from_the_data_ends_the_job_with_its_finding(job: Callable[..., ChildJob]) -> None:
    with pytest.raises(DatasetInvalid) as raised:
        load_sides(job(test=True, columns=Columns(label="lable")), Hyperparameters(), RecordingLink())
    codes = [finding["code"] for finding in raised.value.failure.findings]
    assert codes == ["missing_column", "missing_column"], "one for each dataset that lacks it"


def test_texts_that_are_cut_are_told_with_their_rows(job: Callable[..., ChildJob]) -> None:
    link = RecordingLink()
    short, wanted = job(), Hyperparameters(max_length=8)
    train, validation, test = load_sides(short, wanted, link)
    vectors = frozen_vectors(short, Backbone.open(short.backbone_folder), None)
    planner(short, wanted, vectors, train, validation, test, link)
    (event,) = [event for event in link.of("data_warning") if event["data"]["code"] == "too_long"]
    assert event["level"] == "warn" and event["data"]["count"] == len(train)
    assert event["data"]["rows"] == train.row_numbers.tolist()[:20]


@pytest.mark.parametrize("method", ["baseline", "linear_probe"])
def test_a_job_on_pairs_is_trained_evaluated_and_written_as_pairs(
    job: Callable[..., ChildJob], home: Path, method: str
) -> None:
    link = RegisteringLink()
    run_job(job(columns=Columns.model_validate({"text_pair": "who"}), method=method), link)
    folder = home / "store" / ModelManifest.model_validate(link.manifest).prefix
    golden = json.loads((folder / "golden.json").read_bytes())["rows"]
    assert golden and all(row["text"][1].startswith("writer ") for row in golden)
    fingerprint = json.loads((folder / "data" / "fingerprint.json").read_bytes())
    assert fingerprint["columns"] == {"text": "text", "text_pair": "who", "label": "label", "slices": []}
    assert link.evaluation["validation"]["accuracy"] > 0.8
