"""The main job: upload labels, fine-tune, watch it, and get the new version's answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import Service, Table
from tests.acceptance.processes import Client, Worker, problem, until

HOT_LOAD_S = 2.0
SLACK_S = 2.0  # for a busy machine


@pytest.fixture(scope="module")
def probe(service: Service, movies: tuple[Table, Table]) -> dict[str, Any]:
    """A job on the real backbone with 400 film snippets, and how long after its end the version answered."""
    client, (train, test) = service.client, movies
    data, held_out = client.upload(train.csv, "train.csv"), client.upload(test.csv, "test.csv")
    assert (data["status"], data["rows"], data["format"]) == ("ready", 400, "csv")
    job_id = client.finetune(
        data["id"], "movies", test=held_out["id"], backbone="minilm", method="linear_probe", metric="accuracy"
    )
    job = client.wait(job_id)
    ended = time.monotonic()
    answer = client.wait_served("movies", test.texts[0], within_s=30)
    return {"job": job, "seconds_until_served": time.monotonic() - ended, "answer": answer}


def test_served_answers_score_what_the_report_says(
    service: Service, movies: tuple[Table, Table], probe: dict[str, Any]
) -> None:
    test = movies[1]
    report = service.client.get(f"/finetune/{probe['job']['id']}/evaluation")
    served = test.share_of(service.client.labels("movies", test.texts))
    assert report["object"] == "finetune.evaluation"
    assert report["rows"] == {"train": pytest.approx(340, abs=25), "validation": pytest.approx(60, abs=25), "test": 200}
    assert report["test"]["accuracy"] == pytest.approx(served, abs=1e-9)
    assert served > 0.6  # chance is 0.5; the figure itself belongs to the benchmark


def test_a_new_version_answers_within_two_seconds_of_success(probe: dict[str, Any]) -> None:
    assert probe["job"]["result"] == {"name": "movies", "version": 1, "is_champion": True}
    assert (probe["answer"]["model"], probe["answer"]["version"]) == ("movies", 1)
    assert probe["seconds_until_served"] < HOT_LOAD_S + SLACK_S


def test_a_finished_job_shows_its_plan_progress_and_result(service: Service, probe: dict[str, Any]) -> None:
    job = service.client.job(probe["job"]["id"])
    assert job["hyperparameters"] == {"method": "linear_probe", "metric": "accuracy"}
    assert job["plan"]["metric"] == "accuracy"
    assert [method["method"] for method in job["plan"]["methods"]] == ["linear_probe"]
    assert job["attempt"] == 1
    assert job["error"] is None
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    listed = service.client.get("/finetune", status="succeeded", limit=100)["data"]
    assert job["id"] in [other["id"] for other in listed]


def test_events_tell_the_whole_story_in_order(service: Service, probe: dict[str, Any]) -> None:
    job_id = probe["job"]["id"]
    events = service.client.events(job_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert {(event["object"], event["job_id"]) for event in events} == {("finetune.event", job_id)}
    phases = [event["data"]["phase"] for event in events if event["type"] == "phase_changed"]
    for phase in (
        "preparing_data",  # the backbone is loaded only if the vectors of some row are not there yet
        "embedding",
        "training",
        "evaluating",
        "calibrating",
        "exporting",
        "registering",
    ):
        assert phase in phases
    types = [event["type"] for event in events]
    assert types.index("evaluation_ready") < types.index("model_registered")
    assert events[-1]["data"] == {"status": "succeeded"}
    page = service.client.get(f"/finetune/{job_id}/events", after=2, limit=3)
    assert ([event["seq"] for event in page["data"]], page["has_more"]) == ([3, 4, 5], True)


def test_the_event_stream_ends_with_the_job_and_resumes_where_a_client_left(
    service: Service, probe: dict[str, Any]
) -> None:
    job_id = probe["job"]["id"]
    events = service.client.events(job_id)
    streamed = list(stream(service.client, job_id))
    assert [json.loads(item["data"]) for item in streamed] == events
    assert [(int(item["id"]), item["event"]) for item in streamed] == [(e["seq"], e["type"]) for e in events]
    resumed = list(stream(service.client, job_id, last_event_id=events[-3]["seq"]))
    assert [json.loads(item["data"]) for item in resumed] == events[-2:]


def test_probabilities_are_calibrated_and_sum_to_one(
    service: Service, movies: tuple[Table, Table], probe: dict[str, Any]
) -> None:
    assert probe["job"]["status"] == "succeeded"
    response = service.client.predict("movies", movies[1].texts[:50])
    assert response.headers["x-model-version"] == "1"
    assert response.headers["x-engine"]
    for prediction in response.json()["predictions"]:
        scores = [item["score"] for item in prediction["scores"]]
        assert sum(scores) == pytest.approx(1.0, abs=1e-5)
        assert scores == sorted(scores, reverse=True)
        assert (prediction["label"], prediction["score"]) == tuple(prediction["scores"][0].values())
    calibration = json.loads(service.client.http.get("/models/movies/versions/1/files/calibration.json").content)
    assert calibration["temperature"] > 0
    report = service.client.get(f"/finetune/{probe['job']['id']}/evaluation")
    assert report["temperature"] == calibration["temperature"]


def test_parameters_shape_the_answer(service: Service, movies: tuple[Table, Table], probe: dict[str, Any]) -> None:
    text = movies[1].texts[0]
    whole = service.client.predict("movies@champion", [text]).json()["predictions"][0]
    best = service.client.predict("movies:1", [text], top_k=1, threshold=1.0).json()["predictions"][0]
    assert best["label"] is None
    assert best["scores"] == whole["scores"][:1]
    in_path = service.client.http.post("/v1/models/movies/predict", json={"inputs": text})
    assert in_path.json()["predictions"][0]["scores"] == whole["scores"]


def test_models_are_listed_with_states_labels_and_aliases(service: Service, probe: dict[str, Any]) -> None:
    listed = {model["id"]: model for model in service.client.get("/models")["data"]}
    assert service.client.get("/v1/models")["data"] == list(listed.values())
    assert (listed["minilm"]["state"], listed["minilm"]["owned_by"]) == ("ready", "backbone")
    assert (listed["tiny"]["state"], listed["tiny"]["labels"]) == ("ready", [])
    model = listed["movies"]
    assert model["aliases"] == {"champion": 1}
    assert model["labels"] == ["negative", "positive"]
    assert (model["state"], model["version"], model["parent"]) == ("ready", 1, "minilm")
    assert (model["kind"], model["method"]) == ("head", "linear_probe")
    assert model["bytes"] > 0
    assert model["root"] == listed["minilm"]["digest"]
    version = service.client.get("/models/movies/versions/1")
    assert (version["aliases"], version["status"]) == (["champion"], "ready")
    assert version["job_id"] == probe["job"]["id"]
    report = service.client.get(f"/finetune/{probe['job']['id']}/evaluation")
    assert version["metrics"]["accuracy"] == report["test"]["accuracy"]


def test_the_card_and_small_files_can_be_read_and_nothing_else(service: Service, probe: dict[str, Any]) -> None:
    card = service.client.http.get("/models/movies/versions/1/card")
    assert card.headers["content-type"].startswith("text/markdown")
    assert "movies" in card.text
    labels = service.client.http.get("/models/movies/versions/1/files/labels.json")
    assert json.loads(labels.content) == ["negative", "positive"]
    report = service.client.http.get("/models/movies/versions/1/files/eval/report.json")
    evaluation = service.client.get(f"/finetune/{probe['job']['id']}/evaluation")
    assert json.loads(report.content)["test"] == evaluation["test"]
    for path in ("../manifest.json", "%2e%2e/%2e%2e/polyhead.db", "no-such-file"):
        assert service.client.http.get(f"/models/movies/versions/1/files/{path}").status_code == 404


@pytest.mark.parametrize("method", ["baseline", "lora", "full"])
def test_every_kind_of_version_answers_as_its_report_says(
    service: Service, words: tuple[Table, Table], service_words: tuple[str, str], method: str
) -> None:
    client, (data, held_out), test = service.client, service_words, words[1]
    options = {} if method == "baseline" else {"epochs": 6, "learning_rate": 3e-3}
    job = client.train(data, f"kind-{method}", test=held_out, method=method, **options)
    ended = time.monotonic()
    client.wait_served(f"kind-{method}", test.texts[0], within_s=30)
    waited_s = time.monotonic() - ended
    report = client.get(f"/finetune/{job['id']}/evaluation")
    served = test.share_of(client.labels(f"kind-{method}", test.texts))
    assert report["chosen"] == method
    assert served == pytest.approx(report["test"]["accuracy"], abs=1e-9)
    assert served > 0.8  # the telling words are in the vocabulary
    if method != "full":
        assert waited_s < HOT_LOAD_S + SLACK_S


def test_auto_takes_methods_in_order_of_cost_and_says_what_it_left_out(
    service: Service, words: tuple[Table, Table], service_words: tuple[str, str]
) -> None:
    client, (data, held_out) = service.client, service_words
    job = client.train(data, "auto-words", test=held_out, method="auto", epochs=3, learning_rate=3e-3)
    report = client.get(f"/finetune/{job['id']}/evaluation")
    trained, left_out = [one["method"] for one in report["methods"]], report["left_out"]
    assert trained[:2] == ["baseline", "linear_probe"], "the cheap ones are always trained"
    assert trained + [one["method"] for one in left_out] == ["baseline", "linear_probe", "lora", "full"]
    assert {one["reason"] for one in left_out} <= {"cannot_be_told_apart"}
    scores = {method["method"]: method["validation"]["macro_f1"] for method in report["methods"]}
    assert scores[report["chosen"]] == max(scores.values())
    client.wait_served("auto-words", words[1].texts[0], within_s=30)
    served = words[1].share_of(client.labels("auto-words", words[1].texts))
    assert served == pytest.approx(report["test"]["accuracy"], abs=1e-9)
    assert client.get("/models/auto-words")["method"] == report["chosen"]
    announced = {event["data"].get("method") for event in client.events(job["id"])}  # what is left out, too
    assert {"baseline", "linear_probe", "lora", "full"} <= announced


def test_one_request_may_bring_its_file_and_a_repeat_starts_nothing_new(
    service: Service, words: tuple[Table, Table]
) -> None:
    client = service.client
    fields = {"register_as": "one-shot", "backbone": "tiny", "hyperparameters": '{"method": "baseline"}'}
    sent = {"files": {"file": ("words.csv", words[0].csv)}, "data": fields, "headers": {"Idempotency-Key": "once"}}
    first, second = (client.http.post("/finetune", **sent) for _ in range(2))  # type: ignore[arg-type]
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    assert client.wait(first.json()["id"])["result"] == {"name": "one-shot", "version": 1, "is_champion": True}


def test_a_cancelled_job_may_keep_its_best(service: Service, service_words: tuple[str, str]) -> None:
    client = service.client
    job_id = client.finetune(
        service_words[0],
        "cancelled",
        method="full",
        epochs=1000,
        eval_every=2,
        early_stopping={"patience": 1000},
        export=[],
    )
    client.wait_event(job_id, "checkpoint_saved")
    cancelled = client.http.post(f"/finetune/{job_id}/cancel", json={"keep_best": True})
    assert cancelled.json()["status"] == "cancelling"
    job = client.wait(job_id, status="cancelled")
    assert job["result"] == {"name": "cancelled", "version": 1, "is_champion": False}
    assert (job["cut_short"]["by"], job["cut_short"]["method"]) == ("cancel", "full")
    assert client.wait_served("cancelled:1", "a good film", within_s=30)["version"] == 1
    again = client.http.post(f"/finetune/{job_id}/cancel", json={})
    assert (again.status_code, again.json()["code"]) == (409, "job_not_cancellable")


def stream(client: Client, job_id: str, *, last_event_id: int | None = None) -> Iterator[dict[str, str]]:
    """Server-sent events until the stream ends."""
    headers = {"Accept": "text/event-stream"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = str(last_event_id)
    with client.http.stream("GET", f"/finetune/{job_id}/events", headers=headers) as response:
        assert response.status_code == httpx.codes.OK
        assert response.headers["content-type"].startswith("text/event-stream")
        item: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                item[name] = value
            elif "data" in item:
                yield item
                item = {}
            else:
                item = {}  # a comment that keeps the connection open


def test_a_rerun_gives_the_same_weights_and_shows_it(service: Service, service_words: tuple[str, str]) -> None:
    client = service.client
    first = client.train(service_words[0], "repeated", method="linear_probe", **{"split.test": 0.2})
    assert first["progress"]["percent"] == 100
    assert (first["best"]["method"], first["hyperparameters"]["split"]) == ("linear_probe", {"test": 0.2})
    problem(client.http.post("/finetune/ft_none/rerun"), 404, "job_not_found")
    headers = {"idempotency-key": "rerun once"}
    asked = [client.http.post(f"/finetune/{first['id']}/rerun", headers=headers) for _ in range(2)]
    assert [(one.status_code, one.json()["rerun_of"]) for one in asked] == [(202, first["id"])] * 2
    assert asked[0].json()["id"] == asked[1].json()["id"], "the key makes it one job"
    again = client.wait(asked[0].json()["id"])
    assert again["result"] == {"name": "repeated", "version": 2, "is_champion": False}
    found = client.get(f"/finetune/{again['id']}/evaluation")["rerun"]
    assert (found["of"], found["is_equal"], found["files"]) == (first["id"], True, {"head.safetensors": "equal"})
    heads = [client.http.get(f"/models/repeated/versions/{number}/files/head.safetensors").content for number in (1, 2)]
    assert heads[0] == heads[1]


def test_a_job_that_waits_says_for_what(lone: Service, lone_words: str, start_worker: Callable[[], Worker]) -> None:
    client = lone.client
    job_id = client.finetune(lone_words, "waits", method="baseline")
    waiting = client.job(job_id)
    assert waiting["status"] == "queued" and "worker" in waiting["waiting_for"]
    problem(client.http.post(f"/finetune/{job_id}/rerun"), 409, "job_not_ended")
    for path in ("/info", "/readyz"):
        assert set(client.get(path)["workers"]) == {"live", "last_seen"}
    start_worker()
    done = client.wait(job_id)
    assert (done["waiting_for"], done["queue_position"]) == (None, None)
    seen = until(lambda: client.get("/info")["workers"]["last_seen"], within_s=10, what="the service to see a worker")
    assert seen > 0

    def is_counted() -> bool:  # workers that other tests have killed count for a minute
        live = client.get("/info")["workers"]["live"]
        return live >= 1 and f"\npolyhead_finetune_workers {live:.1f}\n" in client.http.get("/metrics").text

    until(is_counted, within_s=10, what="the metric to count the workers that /info counts")
