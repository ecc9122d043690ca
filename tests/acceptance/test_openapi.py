"""The examples of the OpenAPI document are requests that succeed, on models and rows that a first user would have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modeling.testing import write_tiny_checkpoint
from tests.acceptance.conftest import Service
from tests.acceptance.processes import Client
from tests.support.openapi import document


@pytest.fixture(scope="module")
def job(service: Service, service_words: tuple[str, str]) -> str:
    """The models that the examples name have versions, and a job waits."""
    client = service.client
    for name in ("reviews", "reviews", "moved", "moved"):
        client.train(service_words[0], name, method="baseline")
    assert client.move_alias("moved", 2, 1).status_code in {200, 202}
    client.wait_served("reviews", "a good film", within_s=30)
    return client.finetune(service_words[0], "examples", method="linear_probe")


def bodies(path: str, method: str) -> list[Any]:
    content = document()["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    options = [content, *content.get("anyOf", [])]
    (name,) = [one["$ref"].rpartition("/")[2] for one in options if "$ref" in one]
    examples: list[Any] = document()["components"]["schemas"][name]["examples"]
    return examples


def send(client: Client, method: str, path: str, values: dict[str, str], dataset: str) -> None:
    for example in bodies(path, method.lower()):
        body = json.loads(json.dumps(example).replace("ds_\\u2026", dataset))
        answered = client.http.request(method, path.format(**values), json=body)
        assert answered.status_code < 300, (path, body, answered.text)
        if answered.json()["object"] == "finetune.job":  # its worker has other tests' jobs to run
            client.http.post(f"/finetune/{answered.json()['id']}/cancel", json={"keep_best": False})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/predict"),
        ("POST", "/v1/models/{model}/predict"),
        ("POST", "/v1/embeddings"),
        ("POST", "/finetune"),
        ("POST", "/finetune/{job_id}/cancel"),
        ("PUT", "/models/{name}/aliases/{alias}"),
        ("POST", "/models/{name}/rollback"),
        ("POST", "/models/import"),
    ],
)
def test_examples_run(
    service: Service, import_root: Path, service_words: tuple[str, str], job: str, method: str, path: str
) -> None:
    if path == "/models/import":
        write_tiny_checkpoint(import_root / "topics-bert", labels=["sport", "money"])
    name = "moved" if path.endswith("rollback") else "reviews"
    values = {"model": "reviews", "name": name, "alias": "champion", "job_id": job}
    send(service.client, method, path, values, service_words[0])


def test_every_example_is_run() -> None:
    parameters: Any = test_examples_run.pytestmark[0].args[1]  # type: ignore[attr-defined]
    bodied = {
        (method.upper(), path)
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    assert set(parameters) == bodied
