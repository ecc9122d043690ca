"""An engine that hangs, fails or gives nonsense, and far too many clients, seen from outside: the contract holds."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import Home
from tests.acceptance.processes import Client, Server, problem, until

GOOD, MARKED = "a good film", "oil oil oil oil oil oil"


@dataclass
class Faulty:
    """A server whose engine does what `order` says."""

    server: Server
    client: Client
    file: Path

    @contextmanager
    def order(self, fault: str) -> Iterator[None]:
        self.file.write_text(fault)
        try:
            yield
        finally:
            self.file.write_text("")

    def ask(self, *texts: str) -> httpx.Response:
        return self.client.predict("tiny", list(texts) or [GOOD], return_embedding=True)

    def status(self, path: str) -> int:
        return self.client.http.get(path).status_code

    def value(self, metric: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.client.http.get("/metrics").text.splitlines():
            if line.startswith((f"{metric} ", f"{metric}{{")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    def served_again(self) -> bool:
        return self.ask().status_code == 200 and self.status("/readyz") == 200


@pytest.fixture(scope="module")
def faulty(make_home: Callable[..., Home], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    file = tmp_path_factory.mktemp("faults") / "fault"
    file.write_text("")
    home = make_home(POLYHEAD_ENGINE_TIMEOUT_S="4", POLYHEAD_MAX_QUEUE_DELAY_MS="1000")
    with home.server(module="tests.acceptance.faulty_service", FAULTS=str(file)) as server:
        server.wait_ready()
        with Client(server.url) as client:
            yield Faulty(server, client, file)


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_one_bad_text_among_32_fails_alone(faulty: Faulty, fault: str) -> None:
    texts = [GOOD, "dull plot"] * 16
    with faulty.order(fault):
        texts[7] = MARKED
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(faulty.ask, texts))
        assert [number for number, answer in enumerate(answers) if answer.status_code != 200] == [7]
        problem(answers[7], 500, "inference_failed")
        problem(faulty.ask(*texts), 500, "inference_failed")  # one client's batch is one answer
    assert faulty.ask(*texts).status_code == 200
    assert faulty.status("/readyz") == 200


def test_bad_texts_alone_do_not_take_the_engine_out_of_service(faulty: Faulty) -> None:
    with faulty.order("nan"):
        for _ in range(8):
            problem(faulty.ask(MARKED), 500, "inference_failed")
        until(lambda: faulty.ask().status_code == 200, within_s=30, what="an answer")
        assert faulty.status("/readyz") == 200


def test_an_engine_that_hangs_is_given_up_in_time_and_serves_again_when_it_comes_back(faulty: Faulty) -> None:
    faulty.ask()
    with faulty.order("hang"):
        with ThreadPoolExecutor(8) as pool:
            started = time.monotonic()
            answers = list(pool.map(lambda _: faulty.ask(), range(8)))
            took = time.monotonic() - started
        for answer in answers:
            problem(answer, 503, "model_not_ready")
            assert int(answer.headers["retry-after"]) >= 1
        assert took < 30
        assert faulty.status("/readyz") == 503
        assert faulty.status("/livez") == 200, "it may come back, and a restart would lose the other models"
        problem(faulty.ask(), 503, "model_not_ready")
        assert faulty.status("/models") == 200
    until(faulty.served_again, within_s=90, what="the engine to serve again", every_s=0.2)
    assert faulty.value("polyhead_worker_restarts_total") >= 1


def test_an_engine_that_fails_at_everything_is_taken_out_and_checked_until_it_works(faulty: Faulty) -> None:
    with faulty.order("fail"):
        seen = [faulty.ask() for _ in range(4)]
        problem(seen[0], 500, "inference_failed")
        until(lambda: faulty.status("/readyz") == 503, within_s=30, what="the service to say so")
        problem(faulty.ask(), 503, "model_not_ready")
    until(faulty.served_again, within_s=90, what="the engine to serve again", every_s=0.2)


def test_ten_thousand_clients_at_once_are_answered_or_sent_away(faulty: Faulty) -> None:
    clients = _connections(10_000)
    before = _resident_mb(faulty.server.pid)
    with faulty.order("slow"):
        started = time.monotonic()
        outcomes = asyncio.run(_flood(faulty.server.port, clients))
        took = time.monotonic() - started
    assert set(outcomes) <= {200, 429}, outcomes
    assert outcomes[200] > 0 and outcomes[429] > 0
    assert sum(outcomes.values()) == clients
    assert took < 120
    assert _resident_mb(faulty.server.pid) - before < 600
    until(faulty.served_again, within_s=30, what="the service after the flood")
    assert faulty.value("polyhead_queue_requests") == 0
    assert faulty.value("polyhead_requests_in_progress") == 0


def test_clients_that_leave_are_not_computed(faulty: Faulty) -> None:
    asked, computed = "polyhead_cancelled_total", "polyhead_batch_size_sum"
    left, rows = faulty.value(asked, stage="queued"), faulty.value(computed)
    with faulty.order("hang"):
        asyncio.run(_leave(faulty.server.port, 300))
    until(lambda: faulty.value("polyhead_requests_in_progress") == 0, within_s=60, what="all requests to end")
    until(faulty.served_again, within_s=90, what="the engine to serve again", every_s=0.2)
    assert faulty.value(asked, stage="queued") - left > 200
    assert faulty.value(computed) - rows < 100


def _request(*, text: str = GOOD) -> bytes:
    body = json.dumps({"model": "tiny", "inputs": text, "parameters": {"return_embedding": True}}).encode()
    return (
        b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    ) + body


async def _flood(port: int, clients: int) -> Counter[Any]:
    """The status that each client got; all connect first, then all ask."""
    gate = asyncio.Event()
    open_slots = asyncio.Semaphore(500)  # the backlog of a listening socket is finite

    async def client() -> int | str:
        async with open_slots:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await gate.wait()
            writer.write(_request())
            answer = await asyncio.wait_for(reader.read(), 100)
            status = int(answer.split(b" ", 2)[1])
            if status == 429 and b"retry-after:" not in answer.lower():
                return "no Retry-After"
            return status
        finally:
            writer.close()

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    while sum(task.done() for task in tasks) == 0 and open_slots.locked():
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)
    gate.set()
    return Counter(await asyncio.gather(*tasks))


async def _leave(port: int, clients: int) -> None:
    """As many ask and go before an answer can be there."""
    writers = []
    for _ in range(clients):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_request())
        writers.append(writer)
    await asyncio.sleep(0.5)
    for writer in writers:
        writer.close()
    await asyncio.sleep(0.3)


def _connections(wanted: int) -> int:
    """As many as the limit on open files allows here; the server has the same limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + 500:
        soft = min(hard, wanted + 500) if hard != resource.RLIM_INFINITY else wanted + 500
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = min(wanted, soft - 500)
    assert found >= 500, f"{soft} open files are too few for this test"
    return found


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")
