"""Several labels and numbers over HTTP: upload, fine-tune, predict; what is served is what the report says."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from sklearn.metrics import f1_score, root_mean_squared_error

from tests.acceptance.conftest import Service
from tests.support import entities

TELLING = {"plot": "story", "cast": "actor", "look": "movie"}
WORTH = {"great": 2.0, "good": 1.0, "dull": -1.0, "bad": -2.0}


def labelled(rows: int, *, seed: int) -> list[dict[str, Any]]:
    draw, made = random.Random(seed), []
    for number in range(rows):
        labels = [name for name in TELLING if draw.random() < 0.4]
        words = [TELLING[name] for name in labels] + draw.sample("it was the of very".split(), 3)
        made.append({"text": f"{' '.join(words)} {seed}n{number}", "label": labels})
    return made


def valued(rows: int, *, seed: int) -> list[dict[str, Any]]:
    draw, made = random.Random(seed), []
    for number in range(rows):
        words = draw.choices(list(WORTH), k=2)
        value = 50 + 5 * sum(WORTH[word] for word in words) + draw.gauss(0, 0.2)
        made.append({"text": f"{' '.join(words)} {seed}n{number}", "label": value})
    return made


def upload(service: Service, rows: list[dict[str, Any]]) -> str:
    content = "\n".join(map(json.dumps, rows))
    dataset = service.client.upload(content, "rows.jsonl")
    assert dataset["status"] == "ready", dataset
    return str(dataset["id"])


def train(service: Service, train: list[dict[str, Any]], test: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    named = {"dataset": upload(service, train), "test_dataset": upload(service, test), "backbone": "tiny"}
    response = service.client.http.post("/finetune", json=named | body)
    assert response.status_code == 202, response.text
    return service.client.wait(response.json()["id"])


def predictions(service: Service, model: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts = [row["text"] for row in rows]
    service.client.wait_served(f"{model}:1", texts[0], within_s=30)
    response = service.client.http.post("/predict", json={"model": model, "inputs": texts})
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"])


@pytest.mark.parametrize("method", ["baseline", "linear_probe"])
def test_labels_are_served_as_they_were_evaluated(service: Service, method: str) -> None:
    test = labelled(60, seed=2)
    name = f"tags-{method.replace('_', '-')}"
    job = train(service, labelled(240, seed=1), test, register_as=name, hyperparameters={"method": method})
    assert (job["status"], job["task"]) == ("succeeded", "text-multi-label")
    found = predictions(service, name, test)
    names = list(TELLING)
    due = [[label in row["label"] for label in names] for row in test]
    said = [[label in row["labels"] for label in names] for row in found]
    report = service.client.get(f"/finetune/{job['id']}/evaluation")
    assert report["test"]["micro_f1"] == pytest.approx(f1_score(due, said, average="micro"), abs=1e-9)
    if method == "baseline":
        assert report["test"]["micro_f1"] > 0.95
        refused = service.client.http.post(
            "/finetune", json={"dataset": job["dataset"], "task": "text-classification", "register_as": name}
        )
        assert refused.status_code == 422 and "text-multi-label" in refused.json()["detail"]


@pytest.mark.parametrize("method", ["baseline", "linear_probe"])
def test_values_are_served_as_they_were_evaluated(service: Service, method: str) -> None:
    test = valued(60, seed=4)
    name = f"stars-{method.replace('_', '-')}"
    job = train(
        service, valued(240, seed=3), test, register_as=name, task="text-regression", hyperparameters={"method": method}
    )
    assert (job["status"], job["task"]) == ("succeeded", "text-regression")
    values = [row["value"] for row in predictions(service, name, test)]
    report = service.client.get(f"/finetune/{job['id']}/evaluation")
    rmse = root_mean_squared_error([row["label"] for row in test], values)
    # The engine that serves may compute in bf16: a hundredth of the values' deviation, about 8.
    assert report["test"]["rmse"] == pytest.approx(rmse, rel=1e-3, abs=0.1 if method == "linear_probe" else 0)
    if method == "baseline":
        assert rmse < 3


def test_a_dry_run_tells_task_metric_and_findings(service: Service) -> None:
    body = {"dataset": upload(service, labelled(60, seed=5)), "register_as": "dry", "backbone": "tiny"}
    answer = service.client.http.post("/finetune?dry_run=true", json=body).json()
    assert answer["object"] == "finetune.plan"
    plan = answer["plan"]
    assert (plan["task"], plan["metric"], plan["loss"]) == ("text-multi-label", "micro_f1", "bce")
    assert [method["method"] for method in plan["methods"]] == ["baseline", "linear_probe", "lora", "full"]
    found = service.client.http.post("/finetune?dry_run=true", json=body | {"task": "text-regression"}).json()
    (finding,) = [finding for finding in found["findings"] if finding["severity"] == "error"]
    assert (finding["code"], finding["column"], finding["rows"][0]) == ("non_numeric_target", "label", 1)
    options = {"hyperparameters": {"method": "setfit"}}
    refused = service.client.http.post("/finetune", json=body | options)
    assert refused.status_code == 422 and "setfit does not fit text-multi-label" in refused.json()["detail"]


@pytest.mark.parametrize("method", ["baseline", "linear_probe"])
def test_entities_are_served_as_they_were_evaluated(service: Service, method: str) -> None:
    test, name = entities.rows(60, seed=6), f"people-{method.replace('_', '-')}"
    job = train(
        service,
        entities.rows(200, seed=5),
        test,
        register_as=name,
        task="token-classification",
        hyperparameters={"method": method},
    )
    assert (job["status"], job["task"]) == ("succeeded", "token-classification")
    due, said = set(), set()
    for number, (row, found) in enumerate(zip(test, predictions(service, name, test), strict=True)):
        assert all(one["text"] == row["text"][one["start"] : one["end"]] for one in found["entities"])
        due |= {(number, one["start"], one["end"], one["label"]) for one in row["spans"]}
        said |= {(number, one["start"], one["end"], one["label"]) for one in found["entities"]}
    report = service.client.get(f"/finetune/{job['id']}/evaluation")
    served = 2 * len(due & said) / (len(due) + len(said))
    # The engine that serves may compute in bf16, which may turn an unsure word.
    assert report["test"]["entity_f1"] == pytest.approx(served, abs=0 if method == "baseline" else 0.02)
    assert report["test"]["entity_f1"] > (0.9 if method == "baseline" else 0.3)
