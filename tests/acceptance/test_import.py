"""Classifiers that exist already: registered from a folder below the import root, and from nowhere else."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from modeling.testing import write_tiny_checkpoint
from tests.acceptance.conftest import Service, Table
from tests.acceptance.processes import Client, problem
from tests.support import hostile

LABELS = ["bad", "good", "mixed"]


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_an_imported_classifier_answers_as_transformers_does(
    service: Service, import_root: Path, words: tuple[Table, Table], model_type: str
) -> None:
    checkpoint = write_tiny_checkpoint(import_root / model_type, model_type=model_type, labels=LABELS, seed=3)
    name = f"imported-{model_type}"
    response = service.client.http.post("/models/import", json={"name": name, "source": model_type})
    assert response.status_code == 201, response.text
    assert (response.json()["status"], response.json()["labels"]) == ("ready", LABELS)
    assert response.headers["location"] == f"/models/{name}/versions/1"
    service.client.wait_served(name, "a good film", within_s=30)
    texts = words[1].texts
    answers = service.client.predict(name, texts).json()["predictions"]
    expected = probabilities(checkpoint, texts)
    for answer, row in zip(answers, expected, strict=True):
        scores = {item["label"]: item["score"] for item in answer["scores"]}
        assert [scores[label] for label in LABELS] == pytest.approx(row, abs=1e-4)
    assert len({answer["label"] for answer in answers}) > 1 or max(map(max, expected)) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "problem"), [(["a", "b"], "multi_label_classification"), (["value"], "regression")])
def test_an_imported_checkpoint_of_another_task(
    service: Service, import_root: Path, labels: list[str], problem: str
) -> None:
    name = f"imported-{len(labels)}"
    write_tiny_checkpoint(import_root / name, labels=labels, seed=3, problem_type=problem)
    response = service.client.http.post("/models/import", json={"name": name, "source": name})
    assert response.status_code == 201, response.text
    is_value = problem == "regression"
    task = "text-regression" if is_value else "text-multi-label"
    assert (response.json()["task"], response.json()["labels"]) == (task, [] if is_value else labels)
    service.client.wait_served(name, "a good film", within_s=30)
    (answer,) = service.client.predict(name, ["a good film"]).json()["predictions"]
    assert set(answer) == ({"index", "value"} if is_value else {"index", "labels", "scores"})
    write_tiny_checkpoint(import_root / f"{name}-one-label", labels=LABELS)
    clash = service.client.http.post("/models/import", json={"name": name, "source": f"{name}-one-label"})
    assert "another name" in problem_detail(clash)


def problem_detail(response: httpx.Response) -> str:
    return str(problem(response, 422, "invalid_request")["detail"])


def test_nothing_outside_the_import_root_is_read(service: Service, import_root: Path, tmp_path: Path) -> None:
    outside = write_tiny_checkpoint(tmp_path / "outside", labels=LABELS)
    (import_root / "link").symlink_to(outside)
    for source in (str(outside), f"file:{outside}", "../../../../../etc", "link", "/etc/passwd"):
        response = service.client.http.post("/models/import", json={"name": "outside", "source": source})
        detail = problem(response, 403, "forbidden")["detail"]
        assert str(outside) not in detail
    missing = service.client.http.post("/models/import", json={"name": "outside", "source": "no-such-folder"})
    problem(missing, 422, "invalid_request")
    problem(service.client.http.get("/models/outside"), 404, "model_not_found")


def test_a_checkpoint_that_brings_code_is_refused(service: Service, import_root: Path) -> None:
    folder = write_tiny_checkpoint(import_root / "with-code", labels=LABELS)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text(f"open({str(import_root / 'ran')!r}, 'w')\n")
    response = service.client.http.post("/models/import", json={"name": "with-code", "source": "with-code"})
    assert "auto_map" in problem(response, 422, "checkpoint_invalid")["detail"]
    assert not (import_root / "ran").exists()
    problem(service.client.http.get("/models/with-code"), 404, "model_not_found")


def test_a_damaged_checkpoint_is_refused(service: Service, import_root: Path) -> None:
    folder = write_tiny_checkpoint(import_root / "damaged", labels=LABELS)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    response = service.client.http.post("/models/import", json={"name": "cut-short", "source": "damaged"})
    problem(response, 422, "checkpoint_invalid")
    problem(service.client.http.get("/models/cut-short"), 404, "model_not_found")


def spoil_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def point_outside(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/hosts")


def make_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bomb": (lambda folder: hostile.change_tokenizer(folder, hostile.bomb()), "steps that lengthen"),
    "pattern": (lambda folder: hostile.change_tokenizer(folder, hostile.splitting("(a+)+$")), "retry-limit"),
    "nan": (spoil_weights, "not finite"),
    "outside": (point_outside, "outside of the import root"),
    "pipe": (make_pipe, "no regular file"),
}


@pytest.mark.slow
def test_hostile_checkpoints_are_refused_and_requests_in_flight_are_unharmed(
    service: Service, import_root: Path
) -> None:
    for name, (spoil, _) in HOSTILE.items():
        spoil(write_tiny_checkpoint(import_root / f"hostile-{name}", labels=LABELS))
    many = [f"label {number}" for number in range(30_000)]
    write_tiny_checkpoint(import_root / "hostile-labels", labels=many)
    says = {name: words for name, (_, words) in HOSTILE.items()} | {"labels": "more than 10,000 labels"}
    before, is_over = peak_bytes(service.server.pid), threading.Event()

    def ask_on() -> list[int]:
        found: list[int] = []
        with Client(service.server.url) as client:
            while not is_over.wait(0.02):  # imports take the time that requests leave
                found.append(client.predict("tiny", ["a good film"], return_embedding=True).status_code)
        return found

    def import_it(name: str) -> httpx.Response:
        body = {"name": f"hostile-{name}", "source": f"hostile-{name}"}
        return service.client.http.post("/models/import", json=body, timeout=250)

    with ThreadPoolExecutor() as threads:
        asking = [threads.submit(ask_on) for _ in range(2)]
        try:
            answers = dict(zip(says, threads.map(import_it, says), strict=True))
        finally:
            is_over.set()
        statuses = [status for client in asking for status in client.result()]
    for name, answer in answers.items():
        detail = problem(answer, 422, "checkpoint_invalid")["detail"]
        assert says[name] in detail and str(import_root) not in detail
        problem(service.client.http.get(f"/models/hostile-{name}"), 404, "model_not_found")
    assert len(statuses) > 20 and set(statuses) == {200}
    assert peak_bytes(service.server.pid) - before < 256 << 20, "the process that serves read none of it"


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@torch.inference_mode()
def probabilities(checkpoint: Path, texts: list[str]) -> list[list[float]]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"), pad_token="[PAD]")
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    keys = ["input_ids", "attention_mask"]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    logits = model(**{key: encoded[key] for key in keys}).logits
    rows: list[list[float]] = logits.softmax(1).tolist()
    return rows
