"""The same rows, seed and plan, trained twice: the same weights to the byte, and a record that shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.jobs.link import ChildJob, EmbeddingInput, Original
from finetune.training.reproduction import comparison
from finetune.training.settings import child_environment
from tests.integration.test_recipe import RecordingLink, backbone_folder, finish, job, rows_file, store, tries_all

__all__ = ["backbone_folder", "job", "rows_file", "store", "tries_all"]

Build = Callable[..., ChildJob]
METHODS = ["baseline", "linear_probe", "setfit", "lora", "full"]


def in_a_process(job: ChildJob, *, hash_seed: int) -> dict[str, Any]:
    """The evaluation of a job in a training process of its own, in which sets have an order of their own."""
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(hash_seed)}
    answer = json.dumps({"kind": "reserved", "version": 1})
    done = subprocess.run(
        [sys.executable, "-m", "finetune.worker.child"],
        input=f"{job.model_dump_json()}\n{answer}\n",
        capture_output=True,
        text=True,
        env=child_environment(1) | variables,
    )
    ended = json.loads(done.stdout.splitlines()[-1])
    assert ended["kind"] == "succeeded", (ended, done.stderr[-2000:])
    evaluation: dict[str, Any] = ended["evaluation"]
    return evaluation


def rerun_of(job: ChildJob, evaluation: dict[str, Any], plan: dict[str, Any] | None = None) -> ChildJob:
    return job.model_copy(update={"original": Original(job_id="ft_first", plan=plan, evaluation=evaluation)})


@pytest.mark.parametrize("method", METHODS)
def test_the_same_again_gives_the_same_bytes(job: Build, method: str) -> None:
    options: dict[str, Any] = {"method": method, "epochs": 1, "setfit": {"max_pairs": 1000}}
    if method in {"lora", "full"}:
        options["dropout"] = 0.1
    first = finish(job("first", **options), RecordingLink())["evaluation"]
    torch.rand(7)  # whatever the process did before
    again = finish(rerun_of(job("again", **options), first), RecordingLink())["evaluation"]["rerun"]
    assert again["is_equal"] is True, again
    assert again["files"] and set(again["files"].values()) == {"equal"}
    assert again["differences"] == []
    assert "byte by byte" in again["message"] and "ft_first" in again["message"]


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(job: Build) -> None:
    options: dict[str, Any] = {"method": "lora", "epochs": 1, "dropout": 0.1}
    first = in_a_process(job("first", **options), hash_seed=1)
    again = in_a_process(rerun_of(job("again", **options), first), hash_seed=2)["rerun"]
    assert again["is_equal"] is True, again
    assert set(again["files"]) == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "head.safetensors",
    }


def test_a_rerun_trains_what_was_trained_by_the_plan_of_then(job: Build, tries_all: None) -> None:
    link = RecordingLink()
    first = finish(job("first", epochs=1), link)
    assert [one["method"] for one in first["evaluation"]["methods"]] == ["baseline", "linear_probe", "lora", "full"]
    only = first["evaluation"] | {"methods": first["evaluation"]["methods"][:3]}
    again = finish(rerun_of(job("again", epochs=1), only, link.columns["plan"]), RecordingLink())["evaluation"]
    assert [one["method"] for one in again["methods"]] == ["baseline", "linear_probe", "lora"]
    assert again["left_out"] == []


def test_a_rerun_is_not_stopped_by_what_stops_auto(job: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    link = RecordingLink()
    with monkeypatch.context() as patch:
        patch.setattr("finetune.training.recipe.least_discordant", lambda _: 0)
        first = finish(job("first", epochs=1), link)["evaluation"]
    again = finish(rerun_of(job("again", epochs=1), first, link.columns["plan"]), RecordingLink())["evaluation"]
    assert [one["method"] for one in again["methods"]] == [one["method"] for one in first["methods"]]
    assert again["rerun"]["is_equal"] is True, again["rerun"]


def test_vectors_that_the_first_run_left_give_the_same_head(job: Build, tmp_path: Path) -> None:
    embedding = EmbeddingInput(cache=tmp_path / "features", cache_bytes=1 << 30)
    first = job("first", method="linear_probe").model_copy(update={"embedding": embedding})
    evaluation = finish(first, RecordingLink())["evaluation"]
    again = job("again", method="linear_probe").model_copy(update={"embedding": embedding})
    found = finish(rerun_of(again, evaluation), RecordingLink())["evaluation"]["rerun"]
    assert found["is_equal"] is True
    assert [one["what"] for one in found["differences"]] == ["environment.cached_vectors"]


def test_another_seed_gives_other_weights_and_the_record_names_it(job: Build) -> None:
    first = finish(job("first", method="lora", epochs=1, seed=1), RecordingLink())["evaluation"]
    link = RecordingLink()
    found = finish(rerun_of(job("again", method="lora", epochs=1, seed=2), first), link)["evaluation"]
    assert found["rerun"]["is_equal"] is False
    assert {"what": "environment.seed", "then": 1, "now": 2} in found["rerun"]["differences"]
    assert "environment.seed (1, now 2)" in found["rerun"]["message"]
    assert "rerun_differs" in {one["code"] for one in found["verdict"]}
    assert [event["level"] for event in link.of("metrics") if event["data"].get("split") == "weights"] == ["warn"]


def test_what_differs_is_found_at_any_depth_and_a_job_without_digests_is_not_judged() -> None:
    environment = {"libraries": {"torch": "2.9", "numpy": "2"}, "processor": {"features": ["avx2"]}}
    then = {"chosen": "x", "methods": [{"method": "x"}], "weights": {"head.safetensors": "a", "gone": "b"}}
    now = {"chosen": "x", "methods": [{"method": "x"}], "weights": {"head.safetensors": "c", "new": "b"}}
    other = {"libraries": {"torch": "2.10", "numpy": "2"}, "processor": {"features": ["avx2", "avx512f"]}}
    found = comparison(
        Original(job_id="ft_1", evaluation=then | {"environment": environment}), now | {"environment": other}
    )
    assert found["files"] == {"gone": "missing", "head.safetensors": "differs", "new": "new"}
    assert [one["what"] for one in found["differences"]] == [
        "environment.libraries.torch",
        "environment.processor.features",
    ]
    unknown = comparison(Original(job_id="ft_1"), now | {"environment": other})
    assert unknown["is_equal"] is None and "no digests" in unknown["message"]
