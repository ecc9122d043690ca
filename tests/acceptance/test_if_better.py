"""`promote: if_better` over HTTP: a better version takes over by itself, an equal one does not, and both say why."""

from __future__ import annotations

import random
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.acceptance.conftest import Service

Job = dict[str, Any]

BOTH = {"up": ["great", "superb"], "down": ["awful", "dreadful"]}
FIRST = {label: words[:1] for label, words in BOTH.items()}


def table(words: dict[str, list[str]], rows: int, *, seed: int) -> str:
    """csv with as many texts of each label; a telling word in each."""
    draw = random.Random(seed)
    filler = "film plot actor movie story it was the and a".split()
    lines = [
        f"{draw.choice(words[label])} {' '.join(draw.sample(filler, 5))} {label}{seed}n{number},{label}"
        for label in words
        for number in range(rows)
    ]
    return "\n".join(["text,label", *lines]) + "\n"


@pytest.fixture(scope="module")
def test_rows(service: Service) -> str:
    return str(service.client.upload(table(BOTH, 60, seed=2))["id"])


def train(service: Service, test: str, words: dict[str, list[str]], *, seed: int, promote: str, **more: object) -> Job:
    body = {
        "dataset": service.client.upload(table(words, 120, seed=seed))["id"],
        "test_dataset": test,
        "backbone": "tiny",
        "register_as": "judged",
        "promote": promote,
        "hyperparameters": {"method": "baseline", **more},
    }
    response = service.client.http.post("/finetune", json=body)
    assert response.status_code == 202, response.text
    return service.client.wait(response.json()["id"])


@pytest.fixture(scope="module")
def jobs(service: Service, test_rows: str) -> list[Job]:
    """A first version, one as good, and a better one."""
    return [
        train(service, test_rows, FIRST, seed=10, promote="manual"),
        train(service, test_rows, FIRST, seed=10, promote="if_better"),
        train(service, test_rows, BOTH, seed=30, promote="if_better", gate={"min_metric": 0.8}),
    ]


def test_only_the_better_version_becomes_champion_and_serves(service: Service, jobs: list[Job]) -> None:
    assert [job["result"]["is_champion"] for job in jobs] == [True, False, True]
    assert service.client.get("/models/judged")["aliases"] == {"champion": 3}
    served = service.client.wait_served("judged:3", "superb", within_s=10)
    assert served["version"] == 3
    history = service.client.get("/models/judged/aliases/champion/history")["data"]
    assert [(move["from_version"], move["version"]) for move in history] == [(1, 3), (None, 1)]
    assert history[0]["reason"] == "passed every gate against version 1"


def test_every_gate_is_an_event_with_its_figures(service: Service, jobs: list[Job]) -> None:
    def gates(job: Job) -> dict[str, str]:
        events = [event for event in service.client.events(job["id"]) if event["type"].startswith("gate_")]
        assert all(event["data"]["message"] in event["message"] for event in events)
        return {event["data"]["gate"]: event["data"]["status"] for event in events}

    assert gates(jobs[0]) == {}
    assert gates(jobs[1])["mcnemar"] == "failed"
    assert gates(jobs[2]) == {
        "min_metric": "passed",
        "mcnemar": "passed",
        "class_drop": "passed",
        "engine_parity": "skipped",
    }
    report = service.client.get(f"/finetune/{jobs[1]['id']}/evaluation")
    assert report["promotion"]["champion"] == 1 and report["promotion"]["is_passed"] is False
    assert {one["code"] for one in report["verdict"]} & {"calibrated", "roughly_calibrated", "poorly_calibrated"}


def test_a_version_shows_its_pictures_and_nothing_beside_its_files(service: Service, jobs: list[Job]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra finetune")
    files = {file["path"] for file in service.client.get("/models/judged/versions/3")["files"]}
    pictures = {path for path in files if path.endswith(".svg")}
    assert pictures == {
        f"eval/{name}.svg" for name in ("confusion_matrix", "precision_recall", "calibration", "risk_coverage")
    }
    card = service.client.http.get("/models/judged/versions/3/card").text
    for path in pictures:
        response = service.client.http.get(f"/models/judged/versions/3/files/{path}")
        assert (response.status_code, response.headers["content-type"]) == (200, "image/svg+xml")
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert ElementTree.fromstring(response.text).tag.endswith("svg")
        assert f"({path})" in card
    for path in ("../2/labels.json", "eval/../../2/labels.json", "manifest.json", "eval/none.svg"):
        response = service.client.http.get(f"/models/judged/versions/3/files/{path.replace('..', '%2e%2e')}")
        assert response.status_code == 404, path
    assert "## Verdict" in card and "Gates, against version 1: all passed" in card
