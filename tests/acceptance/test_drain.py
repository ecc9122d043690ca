"""SIGTERM of the server under load: served through the drain delay, then refused, then gone."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from tests.acceptance.conftest import Service
from tests.acceptance.processes import Client, until

THREADS = 8
DELAY_S = 2.0
GRACE_S = 10.0
SENDING_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """One request. `status` is 0 if no connection was made (`gone`), or if one was and no answer came (`lost`)."""

    started: float
    status: int
    code: str


def test_no_request_fails_that_came_before_the_drain_ended(lone: Service) -> None:
    outcomes: list[Outcome] = []
    is_over = threading.Event()
    with lone.home.server(POLYHEAD_DRAIN_DELAY_S=str(DELAY_S), POLYHEAD_DRAIN_GRACE_S=str(GRACE_S)) as server:
        server.wait_ready()
        with ThreadPoolExecutor(THREADS) as clients:
            loops = [clients.submit(predict_until_gone, server.url, is_over, outcomes) for _ in range(THREADS)]
            try:
                until(lambda: len(outcomes) > 5 * THREADS, within_s=30, what="some load")
                signalled = time.monotonic()
                server.popen.send_signal(signal.SIGTERM)
                with httpx.Client(base_url=server.url, timeout=10) as probe:
                    until(lambda: probe.get("/readyz").status_code == 503, within_s=1, what="/readyz to turn")
                    assert probe.get("/readyz").json()["reason"] == "draining"
                    assert probe.get("/livez").status_code == 200
                assert server.popen.wait(DELAY_S + GRACE_S) == 0
                ended = time.monotonic()
            finally:
                is_over.set()
            for loop in loops:
                loop.result()

    drain_began = signalled + DELAY_S
    # What a thread has only just begun to send may come later than it thinks.
    early = [outcome for outcome in outcomes if outcome.started < drain_began - SENDING_S]
    late = [outcome for outcome in outcomes if outcome.started >= drain_began]
    assert [(o.status, o.code, o.started - drain_began) for o in early if o.status != 200] == []
    assert sum(outcome.started > signalled for outcome in early) > THREADS  # served while unready
    assert {(o.status, o.code) for o in late} <= {(200, ""), (503, "draining"), (0, "gone")}
    assert ended - signalled >= DELAY_S


def test_an_idle_server_without_a_delay_ends_at_once(lone: Service) -> None:
    with lone.home.server() as server:
        server.wait_ready()
        assert server.terminate(within_s=GRACE_S) == 0


def predict_until_gone(url: str, is_over: threading.Event, outcomes: list[Outcome], key: str | None = None) -> None:
    body = {"model": "tiny", "inputs": ["a good film"] * 16, "parameters": {"return_embedding": True}}
    with Client(url, key=key) as client:
        while not is_over.is_set():
            started = time.monotonic()
            try:
                response = client.http.post("/predict", json=body)
            except httpx.TransportError as error:
                outcomes.append(Outcome(started, 0, "gone" if isinstance(error, httpx.ConnectError) else "lost"))
                time.sleep(0.02)
                continue
            code = "" if response.status_code == 200 else response.json()["code"]
            outcomes.append(Outcome(started, response.status_code, code))
