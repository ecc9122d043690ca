"""The client against a real HTTP server: what it sends, what it returns, what it raises."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from polyhead.client import Client, PolyheadError
from tests.unit.polyhead.conftest import Service


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLYHEAD_URL", "POLYHEAD_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def event(seq: int) -> dict[str, Any]:
    return {"seq": seq, "type": "progress", "message": f"step {seq}"}


def page(*events: dict[str, Any], has_more: bool = False) -> tuple[int, Any]:
    return 200, {"object": "list", "data": list(events), "has_more": has_more}


def test_predict_sends_inputs_and_parameters(service: Service) -> None:
    service.on("POST /predict", (200, {"version": 3, "predictions": [{"index": 0, "label": "good"}]}))
    with Client(service.url, api_key="k") as client:
        answer = client.predict("reviews", ["a", "b"], top_k=2)
    assert answer["version"] == 3
    assert service.asked[0].json == {"model": "reviews", "inputs": ["a", "b"], "parameters": {"top_k": 2}}
    assert service.asked[0].headers["authorization"] == "Bearer k"


def test_predict_waits_for_a_model_that_is_being_loaded(service: Service) -> None:
    loading = {"code": "model_not_ready", "detail": "reviews:1 is being loaded", "retry_after_ms": 1}
    service.on("POST /predict", (503, loading), (503, loading), (200, {"version": 1, "predictions": []}))
    with Client(service.url) as client:
        assert client.predict("reviews", "a")["version"] == 1
        service.on("POST /predict", (503, loading | {"retry_after_ms": 60_000}))
        with pytest.raises(PolyheadError) as refused:
            client.predict("reviews", "a")
    assert (refused.value.code, refused.value.retry_after_s) == ("model_not_ready", 60)
    assert len(service.asked) == 4


def test_embeddings_come_in_the_order_of_the_inputs(service: Service) -> None:
    data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]
    service.on("POST /v1/embeddings", (200, {"data": data}))
    with Client(service.url) as client:
        assert client.embeddings("minilm", ["a", "b"]) == [[1.0], [2.0]]
    assert "authorization" not in service.asked[0].headers


def test_upload_is_one_part_named_file_and_waits_for_the_check(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text("text,label\nfine,good\n")
    service.on("POST /datasets", (201, {"id": "ds_1", "status": "validating"}))
    service.on(
        "GET /datasets/ds_1",
        (200, {"id": "ds_1", "status": "validating"}),
        (503, {"code": "database_unavailable", "detail": "away"}),
        (200, {"id": "ds_1", "status": "ready"}),
    )
    with Client(service.url) as client:
        assert client.upload_dataset(file, poll_s=0)["status"] == "ready"
    body = service.asked[0].body
    assert b'name="file"; filename="reviews.csv"' in body
    assert b"text,label\nfine,good\n" in body


def test_an_invalid_dataset_is_returned_with_its_errors(service: Service, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    service.on("POST /datasets", (201, {"id": "ds_1", "status": "invalid", "errors": [{"code": "parse_error"}]}))
    with Client(service.url) as client:
        assert client.upload_dataset(tmp_path / "a.csv")["errors"] == [{"code": "parse_error"}]


def test_finetune_sends_only_what_was_given(service: Service) -> None:
    service.on("POST /finetune", (202, {"id": "ft_1", "status": "queued"}))
    with Client(service.url) as client:
        client.finetune(
            "ds_1", "reviews", task="text-regression", hyperparameters={"method": "lora"}, idempotency_key="once"
        )
    assert service.asked[0].json == {
        "dataset": "ds_1",
        "register_as": "reviews",
        "task": "text-regression",
        "hyperparameters": {"method": "lora"},
    }
    assert service.asked[0].headers["idempotency-key"] == "once"


def test_events_follows_every_page(service: Service) -> None:
    service.on("GET /finetune/ft_1/events", page(event(4), event(5), has_more=True), page(event(6)))
    with Client(service.url) as client:
        assert [item["seq"] for item in client.events("ft_1", 3)] == [4, 5, 6]
    assert ["after=3" in service.asked[0].path, "after=5" in service.asked[1].path] == [True, True]


def test_follow_yields_each_event_once_and_rides_out_a_restart(service: Service) -> None:
    running, done = (200, {"id": "ft_1", "status": "running"}), (200, {"id": "ft_1", "status": "failed"})
    away = (503, {"code": "draining", "detail": "going down"})
    service.on("GET /finetune/ft_1", running, away, done)
    service.on("GET /finetune/ft_1/events", page(event(1)), page(event(2)), page(event(3)))
    with Client(service.url) as client:
        assert [item["seq"] for item in client.follow("ft_1", poll_s=0)] == [1, 2, 3]


def test_wait_returns_the_ended_job_however_it_ended(service: Service) -> None:
    service.on("GET /finetune/ft_1", (200, {"status": "queued"}), (200, {"status": "cancelled"}))
    with Client(service.url) as client:
        assert client.wait("ft_1", poll_s=0) == {"status": "cancelled"}


def test_wait_gives_up(service: Service) -> None:
    service.on("GET /finetune/ft_1", (200, {"status": "queued"}))
    with Client(service.url) as client, pytest.raises(TimeoutError, match="ft_1 has not ended within 0 s"):
        client.wait("ft_1", timeout_s=0, poll_s=0)


def test_wait_does_not_retry_what_will_not_change(service: Service) -> None:
    service.on("GET /finetune/ft_1", (404, {"code": "job_not_found", "detail": "no such job"}))
    with Client(service.url) as client, pytest.raises(PolyheadError, match="job_not_found"):
        client.wait("ft_1", poll_s=0)
    assert len(service.asked) == 1


def test_aliases_move_by_compare_and_swap(service: Service) -> None:
    service.on("PUT /models/reviews/aliases/champion", (200, {"version": 2}))
    service.on("POST /models/reviews/rollback", (200, {"version": 1}))
    with Client(service.url) as client:
        client.set_alias("reviews", "champion", version=2, expected_version=None, reason="better")
        client.rollback("reviews")
    assert service.asked[0].json == {"version": 2, "expected_version": None, "reason": "better"}
    assert service.asked[1].json == {"alias": "champion", "reason": ""}


def test_a_name_is_one_part_of_the_path_whatever_is_in_it(service: Service) -> None:
    service.on("GET /models/..%2Finfo%3Fx", (200, {"id": "strange"}))
    with Client(service.url) as client:
        assert client.model("../info?x") == {"id": "strange"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            (422, {"code": "invalid_request", "detail": "inputs: missing", "errors": [{"loc": ["inputs"]}]}),
            (422, "invalid_request", "inputs: missing", [{"loc": ["inputs"]}]),
        ),
        (
            (404, {"error": {"message": "no model", "code": "model_not_found"}}),
            (404, "model_not_found", "no model", []),
        ),
        ((502, b"<html>"), (502, "http_502", "Bad Gateway", [])),
        ((500, [1]), (500, "http_500", "Internal Server Error", [])),
    ],
)
def test_refusals(service: Service, answer: tuple[int, Any], expected: tuple[Any, ...]) -> None:
    service.on("GET /models", answer)
    with Client(service.url) as client, pytest.raises(PolyheadError) as caught:
        client.models()
    error = caught.value
    assert (error.status, error.code, error.detail, error.errors) == expected


def test_something_else_on_that_port(service: Service) -> None:
    service.on("GET /models", (200, b"<html>"))
    with Client(service.url) as client, pytest.raises(PolyheadError, match="is not this service"):
        client.models()


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with Client(url) as client, pytest.raises(PolyheadError, match="cannot reach") as caught:
            client.models()
    assert (caught.value.status, caught.value.code) == (0, "unreachable")


@pytest.mark.parametrize("url", ["nonsense", "http://[::1", "ftp://127.0.0.1"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(PolyheadError), Client(url) as client:
        client.models()


def test_url_and_key_come_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_URL", service.url + "/")
    monkeypatch.setenv("POLYHEAD_API_KEY", "from-there")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # loopback never goes through it
    service.on("GET /info", (200, {"name": "polyhead"}))
    with Client() as client:
        assert client.info() == {"name": "polyhead"}
    assert service.asked[0].headers["authorization"] == "Bearer from-there"


def test_what_is_deleted_is_named_in_the_path_and_nothing_comes_back(service: Service) -> None:
    for route in (
        "DELETE /models/reviews",
        "DELETE /models/reviews/versions/3",
        "DELETE /models/reviews/aliases/canary",
        "DELETE /finetune/ft_1",
        "DELETE /datasets/ds_1",
    ):
        service.on(route, (204, b""))
    with Client(service.url) as client:
        client.delete_model("reviews", force=True, reason="unused")
        client.delete_version("reviews", 3)
        client.delete_alias("reviews", "canary", expected_version=2)
        client.delete_job("ft_1")
        client.delete_dataset("ds_1")
    assert service.asked[0].path == "/models/reviews?force=true&reason=unused"
    assert service.asked[2].path == "/models/reviews/aliases/canary?reason=&expected_version=2"


def test_a_refused_deletion_says_what_needs_it(service: Service) -> None:
    document = {"code": "version_in_use", "detail": "reviews:3 is needed", "errors": [{"loc": ["aliases", "champion"]}]}
    service.on("DELETE /models/reviews/versions/3", (409, document))
    with Client(service.url) as client, pytest.raises(PolyheadError) as refused:
        client.delete_version("reviews", 3)
    assert (refused.value.status, refused.value.code) == (409, "version_in_use")
    assert refused.value.errors[0]["loc"] == ["aliases", "champion"]
