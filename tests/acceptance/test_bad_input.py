"""What a client, a file or a disk can get wrong: each refusal says what, and the service goes on."""

from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.conftest import Service, Table
from tests.acceptance.processes import problem, until

FILES: dict[str, tuple[bytes, str]] = {
    # name: csv, code of the finding that ends the job
    "one class": (b"text,label\n" + b"".join(b"text %d,same\n" % number for number in range(40)), "single_class"),
    "one row": (b"text,label\nonly this,good\n", "single_class"),
    "empty labels": (b"text,label\n" + b"".join(b"text %d,\n" % number for number in range(40)), "empty_value"),
    "scores, not classes": (
        b"text,label\n" + b"".join(b"text %d,%.3f\n" % (number, math.sin(number)) for number in range(60)),
        "class_too_small",
    ),
}


@pytest.fixture(autouse=True)
def still_healthy(service: Service) -> Iterator[None]:
    """After every test the server is ready and predicts."""
    yield
    assert service.client.http.get("/readyz").status_code == 200
    assert service.client.predict("tiny", ["a good film"], return_embedding=True).status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/finetune"])
def test_a_body_that_is_not_json(service: Service, path: str) -> None:
    for body in (b"{", b"inputs=a", b"\xff\xfe{}", b""):
        response = service.client.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code in {400, 422}, response.text
        problem(response, response.status_code, "malformed_request" if body else response.json()["code"])
    untyped = service.client.http.post(path, content=b'{"inputs": "a"}', headers={"Content-Type": "text/plain"})
    problem(untyped, 415, "unsupported_media_type")


@pytest.mark.parametrize("inputs", [[], "", ["  "], ["a good film", ""]])
def test_empty_inputs(service: Service, inputs: Any) -> None:
    response = service.client.http.post("/predict", json={"model": "tiny", "inputs": inputs})
    problem(response, 400, "empty_input")


def test_more_inputs_than_one_request_may_bring(service: Service) -> None:
    detail = problem(service.client.predict("tiny", ["text"] * 300), 413, "payload_too_large")["detail"]
    assert "300" in detail and "256" in detail


def test_a_body_of_ten_megabytes(service: Service) -> None:
    problem(service.client.predict("tiny", ["x" * 10_000_000]), 413, "payload_too_large")


@pytest.mark.parametrize("model", ["no-such-model", "no-such-model@champion", "no-such-model:3", "tiny:1"])
def test_an_unknown_model(service: Service, model: str) -> None:
    problem(service.client.predict(model, ["text"]), 404, "model_not_found")


@pytest.mark.parametrize("model", ["No Such Model", "a@b@c", "../../etc/passwd", "movies:0", None])
def test_a_name_that_can_be_no_model(service: Service, model: str | None) -> None:
    response = service.client.http.post("/predict", json={"model": model, "inputs": "text"})
    problem(response, 422, "invalid_request")


def test_a_backbone_has_no_labels_to_predict(service: Service) -> None:
    problem(service.client.predict("tiny", ["text"]), 422, "invalid_request")


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"inputs": 5}, "inputs"),
        ({"inputs": [["a", "b", "c"]]}, "inputs"),
        ({"inputs": "a", "parameters": {"top_k": "many"}}, "top_k"),
        ({"inputs": "a", "parameters": {"threshold": 2}}, "threshold"),
        ({"inputs": "a", "parameter": {}}, "parameter"),
        (["a"], "body"),
    ],
)
def test_wrong_types_and_unknown_fields_are_named(service: Service, body: Any, place: str) -> None:
    if isinstance(body, dict):
        body = {"model": "tiny", **body}
    document = problem(service.client.http.post("/predict", json=body), 422, "invalid_request")
    assert place in [part for error in document["errors"] for part in error["loc"]]


@pytest.mark.parametrize(
    ("hyperparameters", "hint"),
    [
        ({"learning_rat": 1e-3}, "did you mean learning_rate?"),
        ({"epoch": 3}, "did you mean epochs?"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"epochs": -1}, "epochs"),
        ({"method": "magic"}, "method"),
        ({"lora": {"rank": 8}}, "lora.rank"),
        ({"augment": "light"}, "augment is not available yet"),
        ({"method": "lora", "processes": 64}, "processes"),  # known of the worker, before any job
    ],
)
def test_hyperparameters_that_are_unknown_or_out_of_bounds(
    service: Service, service_words: tuple[str, str], hyperparameters: dict[str, Any], hint: str
) -> None:
    body = {"dataset": service_words[0], "register_as": "never", "hyperparameters": hyperparameters}
    detail = problem(service.client.http.post("/finetune", json=body), 422, "invalid_request")["detail"]
    assert hint in detail


def test_requests_for_jobs_that_cannot_be(service: Service, service_words: tuple[str, str]) -> None:
    post, good = service.client.http.post, {"dataset": service_words[0], "register_as": "never"}
    problem(post("/finetune", json=good | {"dataset": "ds_000000000000000000000000"}), 404, "dataset_not_found")
    problem(post("/finetune", json=good | {"test_dataset": "ds_none"}), 404, "dataset_not_found")
    problem(post("/finetune", json=good | {"backbone": "gpt"}), 404, "model_not_found")
    problem(post("/finetune", json=good | {"register_as": "Not A Name"}), 422, "invalid_request")
    problem(post("/finetune", json=good | {"register_as": "tiny"}), 422, "invalid_request")
    problem(post("/finetune", json=good | {"task": "regression"}), 422, "invalid_request")
    problem(post("/finetune", json=good | {"surprise": 1}), 422, "invalid_request")
    problem(service.client.http.get("/finetune/ft_none"), 404, "job_not_found")


def test_a_column_that_is_not_there(service: Service, service_words: tuple[str, str]) -> None:
    body = {"dataset": service_words[0], "register_as": "never", "columns": {"text": "review"}}
    document = problem(service.client.http.post("/finetune", json=body), 422, "dataset_invalid")
    assert "review" in document["detail"]
    (finding,) = document["errors"]
    assert (finding["code"], finding["severity"]) == ("missing_column", "error")
    assert finding["fix"]


def test_a_file_in_two_encodings(service: Service) -> None:
    mixed = "text,label\ncafé au lait,good\n".encode() + "café crème,bad\n".encode("latin-1") * 3
    dataset = service.client.upload(mixed)
    assert dataset["status"] == "invalid"
    report = service.client.get(f"/datasets/{dataset['id']}/report")["report"]
    finding = next(finding for finding in report["findings"] if finding["code"] == "encoding")
    assert (finding["severity"], finding["rows"], finding["count"]) == ("error", [2, 3, 4], 3)
    assert finding["fix"]
    body = {"dataset": dataset["id"], "register_as": "never"}
    document = problem(service.client.http.post("/finetune", json=body), 422, "dataset_invalid")
    assert document["errors"][0]["code"] == "encoding"


@pytest.mark.parametrize(
    ("filename", "content", "code"),
    [
        ("data.csv", b"", "empty_input"),
        ("data.bin", bytes(range(256)) * 8, "dataset_invalid"),
        ("data.parquet", b"PAR1 this is none", ""),
        ("data.jsonl", b'{"text": "a"\n', ""),
        ("data.csv", b"text,label\n", ""),
    ],
)
def test_files_that_hold_no_table(service: Service, filename: str, content: bytes, code: str) -> None:
    response = service.client.http.post("/datasets", files={"file": (filename, content)})
    if code:
        problem(response, 400 if code == "empty_input" else 422, code)
        return
    assert response.status_code == 201
    assert response.json()["status"] == "invalid"
    assert response.json()["errors"][0]["code"] == "parse_error"
    problem(service.client.http.get(f"/datasets/{response.json()['id']}/preview"), 409, "dataset_not_ready")


def test_rows_that_nothing_can_be_learned_from_are_refused_at_once(service: Service) -> None:
    for name, (content, code) in FILES.items():
        dataset = service.client.upload(content)
        assert dataset["status"] == "ready", dataset
        body = {"dataset": dataset["id"], "register_as": "never", "hyperparameters": {"method": "baseline"}}
        document = problem(service.client.http.post("/finetune", json=body), 422, "dataset_invalid")
        told = service.client.http.post("/finetune?dry_run=true", json=body).json()
        assert [one["code"] for one in told["findings"] if one["severity"] == "error"] == [
            one["code"] for one in document["errors"]
        ], "a dry run tells the same"
        findings = {finding["code"]: finding for finding in document["errors"]}
        assert findings[code]["severity"] == "error", name
        assert findings[code]["fix"], name
        if name == "scores, not classes":
            assert "regression" in findings[code]["fix"]
    problem(service.client.http.get("/models/never"), 404, "model_not_found")


def test_test_data_of_another_task_is_refused(service: Service, service_words: tuple[str, str]) -> None:
    other = service.client.upload("text,label\n" + "".join(f"text {number},sports\n" for number in range(20)))
    body = {"dataset": service_words[0], "test_dataset": other["id"], "register_as": "never"}
    document = problem(service.client.http.post("/finetune", json=body), 422, "dataset_invalid")
    assert "unknown_label" in {finding["code"] for finding in document["errors"]}


def test_a_weight_on_a_label_that_the_rows_lack_is_refused_at_once(
    service: Service, service_words: tuple[str, str]
) -> None:
    body = {"dataset": service_words[0], "register_as": "never"}
    body["hyperparameters"] = {"class_weights": {"nobody": 2.0}}  # type: ignore[assignment]
    for query in ("", "?dry_run=true"):
        document = problem(service.client.http.post(f"/finetune{query}", json=body), 422, "invalid_request")
        assert "'nobody', which the data does not have" in document["detail"]


def test_a_damaged_version_never_serves_and_the_champion_goes_on(
    service: Service, service_words: tuple[str, str]
) -> None:
    client = service.client
    for _ in range(2):
        client.train(service_words[0], "damaged", method="linear_probe")
    assert client.wait_served("damaged", "a good film", within_s=10)["version"] == 1
    assert client.get("/models/damaged/versions/2")["state"] == "unloaded"
    (head,) = (service.home.data / "store").glob("**/damaged/2/head.safetensors")
    head.chmod(0o644)
    head.write_bytes(head.read_bytes()[:-100])

    problem(client.move_alias("damaged", 2, 1), 409, "artifact_invalid")
    version = client.get("/models/damaged/versions/2")
    assert version["state"] == "failed"
    assert "head.safetensors" in version["reason"]
    assert client.get("/models/damaged")["aliases"] == {"champion": 1}
    assert client.predict("damaged", ["a good film"]).json()["version"] == 1
    # The server hears of new versions by its poll; from then on it knows this one as failed.
    until(lambda: client.predict("damaged:2", ["a good film"]).status_code != 404, within_s=5, what="the poll")
    document = problem(client.predict("damaged:2", ["a good film"]), 503, "model_not_ready")
    assert "head.safetensors" in document["detail"]


def test_a_locked_database_stops_writes_and_no_prediction(service: Service, service_words: tuple[str, str]) -> None:
    client, body = service.client, {"dataset": service_words[0], "backbone": "tiny", "register_as": "locked-out"}
    body["hyperparameters"] = {"method": "baseline"}  # type: ignore[assignment]
    lock = sqlite3.connect(service.home.data / "polyhead.db", timeout=10, isolation_level=None)
    try:
        lock.execute("BEGIN IMMEDIATE")
        refused: list[Any] = []
        submission = threading.Thread(target=lambda: refused.append(client.http.post("/finetune", json=body)))
        submission.start()
        predictions = 0
        lock_ends = time.monotonic() + 4.0
        while time.monotonic() < lock_ends:
            assert client.predict("tiny", ["a good film"], return_embedding=True).status_code == 200
            predictions += 1
        submission.join()
        assert predictions > 5
        document = problem(refused[0], 503, "database_unavailable")
        assert document["retry_after_ms"] > 0
        assert int(refused[0].headers["retry-after"]) > 0
        assert client.http.get("/readyz").status_code == 200
        lock.execute("ROLLBACK")
    finally:
        lock.close()
    job = client.http.post("/finetune", json=body)
    assert job.status_code == 202, job.text
    client.wait(job.json()["id"])


def test_over_long_text_is_cut_or_refused_as_asked(service: Service, words: tuple[Table, Table]) -> None:
    text = " ".join(words[0].texts)
    cut = service.client.predict("tiny", [text], return_embedding=True)
    assert cut.json()["usage"]["input_tokens"] <= 66
    problem(service.client.predict("tiny", [text], return_embedding=True, truncate=False), 422, "input_too_long")


def test_routes_and_methods_that_are_not_there(service: Service) -> None:
    problem(service.client.http.get("/no-such-route"), 404, "not_found")
    problem(service.client.http.get("/predict"), 405, "method_not_allowed")
