"""Moving the champion while clients predict: no request fails, and none gets a version that was not the champion."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import httpx
import pytest

from tests.acceptance.conftest import Service, Table
from tests.acceptance.processes import Client, problem

CLIENTS = 16
MOVES = 20


@pytest.fixture(scope="module")
def promoted(service: Service, service_words: tuple[str, str]) -> str:
    """A model with a linear probe as version 1, the champion, and a LoRA adapter as version 2."""
    client, (data, held_out) = service.client, service_words
    client.train(data, "promoted", test=held_out, method="linear_probe")
    client.train(data, "promoted", test=held_out, method="lora", epochs=2, learning_rate=3e-3)
    return "promoted"


@dataclass
class Reigns:
    """When which version may have been champion, as far as a client can know: a move holds somewhere in its request."""

    intervals: list[tuple[int, float, float]] = field(default_factory=list)

    def was_champion(self, version: int, since: float, until: float) -> bool:
        return any(own == version and begin <= until and since <= end for own, begin, end in self.intervals)


def test_no_request_fails_while_the_champion_moves_twenty_times(
    service: Service, words: tuple[Table, Table], promoted: str
) -> None:
    is_over = threading.Event()
    answers: list[tuple[int, float, float]] = []  # version, start, end
    refused: list[httpx.Response] = []

    def predict_until_over(number: int) -> None:
        texts = words[1].texts[number : number + 3]
        with Client(service.server.url) as client:
            while not is_over.is_set():
                started = time.monotonic()
                response = client.predict(promoted, texts)
                ended = time.monotonic()
                if response.status_code == 200:
                    answers.append((response.json()["version"], started, ended))
                else:
                    refused.append(response)

    reigns, champion, since = Reigns(), 1, 0.0
    with ThreadPoolExecutor(CLIENTS) as clients:
        loops = [clients.submit(predict_until_over, number) for number in range(CLIENTS)]
        try:
            for _ in range(MOVES):
                successor, begun = 3 - champion, time.monotonic()
                response = service.client.move_alias(promoted, successor, champion)
                assert response.status_code == 200, response.text
                reigns.intervals.append((champion, since, time.monotonic()))
                champion, since = successor, begun
                time.sleep(0.1)
        finally:
            is_over.set()
        for loop in loops:
            loop.result()
    reigns.intervals.append((champion, since, float("inf")))

    assert len(answers) > CLIENTS * MOVES / 2
    refusals = [response.text for response in refused]
    assert refusals == []
    assert {version for version, *_ in answers} == {1, 2}  # or nothing was shown
    wrong = [answer for answer in answers if not reigns.was_champion(*answer)]
    assert wrong == []


def test_only_one_of_two_moves_from_the_same_version_wins(service: Service, promoted: str) -> None:
    client = service.client
    champion = client.get("/models/promoted")["aliases"]["champion"]
    with ThreadPoolExecutor(2) as both:
        moves = list(both.map(lambda _: client.move_alias(promoted, 3 - champion, champion), range(2)))
    assert sorted(move.status_code for move in moves) == [200, 409]
    loser = next(move for move in moves if move.status_code == 409)
    assert f"version {3 - champion}" in problem(loser, 409, "alias_conflict")["detail"]
    new = client.move_alias(promoted, 1, None, alias="candidate")
    assert (new.status_code, new.json()["from_version"]) == (200, None)
    problem(client.move_alias(promoted, 2, None, alias="candidate"), 409, "alias_conflict")
    assert client.wait_served("promoted@candidate", "a good film", within_s=5)["version"] == 1


def test_every_move_is_in_the_history_and_can_be_rolled_back(service: Service, promoted: str) -> None:
    client = service.client
    first = client.get("/models/promoted")["aliases"]["champion"]
    assert client.move_alias(promoted, 3 - first, first).status_code == 200
    undone = client.http.post("/models/promoted/rollback", json={"reason": "it was worse"})
    assert (undone.status_code, undone.json()["version"]) == (200, first)
    assert client.predict(promoted, ["a good film"]).json()["version"] == first
    history = client.get("/models/promoted/aliases/champion/history", limit=1000)["data"]
    latest, before = history[:2]
    assert (latest["action"], latest["reason"]) == ("rollback", "it was worse")
    assert (latest["from_version"], latest["version"]) == (3 - first, first)
    assert (before["action"], before["actor"], before["from_version"]) == ("set", "local", first)
    assert (history[-1]["from_version"], history[-1]["version"]) == (None, 1)
    for newer, older in pairwise(history):
        assert newer["from_version"] == older["version"]
        assert newer["epoch"] > older["epoch"]
    everything = client.get("/models/promoted/history", limit=1000)["data"]
    assert [change for change in everything if change["alias"] == "champion"] == history


def test_an_alias_cannot_point_at_what_is_not_there(service: Service, promoted: str) -> None:
    client = service.client
    champion = client.get("/models/promoted")["aliases"]["champion"]
    problem(client.move_alias(promoted, 99, champion), 404, "model_not_found")
    problem(client.move_alias("no-such-model", 1, None), 404, "model_not_found")
    problem(client.move_alias(promoted, 1, None, alias="latest"), 422, "invalid_request")
    assert client.get("/models/promoted")["aliases"]["champion"] == champion
