"""An engine that hangs, fails or gives nonsense, and far too many clients, seen from outside: the contract holds."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
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

from model_registry.db import Database
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.backbone import ingest
from tests.acceptance.conftest import Home
from tests.acceptance.processes import Client, Server, problem, until
from tests.support.world import World

GOOD, MARKED = "a good film", "oil oil oil oil oil oil"


@dataclass
class Faulty:
    """A server whose engine does what `order` says."""

    server: Server
    client: Client
    file: Path
    world: World
    """Publishes further versions: `m` is on the faulty engine, `linear` beside it."""

    @contextmanager
    def order(self, fault: str) -> Iterator[None]:
        self.file.write_text(fault)
        try:
            yield
        finally:
            self.file.write_text("")

    def ask(self, *texts: str) -> httpx.Response:
        return self.client.predict("tiny", list(texts) or [GOOD], return_embedding=True)

    def labelled(self, model: str) -> httpx.Response:
        return self.client.predict(model, [GOOD])

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

    def wait_queued(self, requests: int) -> None:
        """Until so many are under way and, but for the one that runs, in the queue."""
        name = "polyhead_requests_in_progress"
        until(lambda: self.value(name) == requests, within_s=90, what=f"{requests} requests")
        time.sleep(0.5)  # the last may still be tokenised; and the queue's metric lacks a batch that stands ready

    def is_crowded(self) -> bool:
        """Whether a second thread was ever inside of the engine."""
        return self.file.with_suffix(".crowded").exists()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine is inside of a run, which ends with the block."""
        is_hanging = self.file.with_suffix(".hanging")
        is_hanging.unlink(missing_ok=True)
        with ThreadPoolExecutor(1) as pool:
            with self.order("hang"):
                first = pool.submit(self.ask)
                until(is_hanging.exists, within_s=60, what="the run")
                yield
            assert first.result().status_code == 200


@contextmanager
def serving(home: Home, tiny_checkpoint: Path) -> Iterator[Faulty]:
    file = home.folder / "fault"
    file.write_text("")
    with home.server(module="tests.acceptance.faulty_service", FAULTS=str(file)) as server:
        server.wait_ready()
        database, store = Database(f"sqlite:///{home.data / 'polyhead.db'}"), FileStore(home.data / "store")
        backbone = ingest(store, tiny_checkpoint, name="tiny", source=f"file:{tiny_checkpoint}")
        world = World(Registry(database), store, backbone, home.folder)
        world.publish("m")
        world.publish_baseline("linear")
        with Client(server.url) as client:
            for model in ("m", "linear"):
                client.wait_served(model, GOOD, within_s=30)
            yield Faulty(server, client, file, world)
        database.dispose()


@pytest.fixture(scope="module")
def faulty(make_home: Callable[..., Home], tiny_checkpoint: Path) -> Iterator[Faulty]:
    home = make_home(POLYHEAD_ENGINE_TIMEOUT_S="4", POLYHEAD_MAX_QUEUE_DELAY_MS="1000")
    with serving(home, tiny_checkpoint) as found:
        yield found


@pytest.fixture(scope="module")
def patient(make_home: Callable[..., Home], tiny_checkpoint: Path) -> Iterator[Faulty]:
    """No request is refused for lack of room, and no run is soon taken for hung."""
    home = make_home(
        POLYHEAD_ENGINE_TIMEOUT_S="120",
        POLYHEAD_REQUEST_TIMEOUT_S="120",
        POLYHEAD_MAX_QUEUE_DELAY_MS="100000",
        POLYHEAD_MAX_CONCURRENT_REQUESTS="20000",
    )
    with serving(home, tiny_checkpoint) as found:
        yield found


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


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_of_one_batch_the_bad_text_is_named_and_the_others_are_answered(patient: Faulty, fault: str) -> None:
    texts = [*["a dull good plot film good"] * 15, MARKED]
    with ThreadPoolExecutor(17) as pool, patient.held():
        asked = [pool.submit(patient.ask, text) for text in texts] + [pool.submit(patient.ask, *texts)]
        patient.wait_queued(18)
        patient.file.write_text(fault)  # what held it goes on; the fault is for the next batch
        answers = [future.result() for future in asked]
    *others, alone, together = answers
    assert {answer.status_code for answer in others} == {200}
    assert max(int(answer.headers["x-batch-size"]) for answer in others) > 1
    assert not problem(alone, 500, "inference_failed")["detail"].startswith("input ")
    assert problem(together, 500, "inference_failed")["detail"].startswith("input 15: ")


def test_clients_that_send_nothing_but_bad_texts_disturb_nobody(faulty: Faulty) -> None:
    with faulty.order("raise"), ThreadPoolExecutor(4) as pool:
        bad = [pool.submit(faulty.ask, MARKED) for _ in range(200)]
        good = 0
        while good < 20 or not all(future.done() for future in bad):
            assert faulty.ask().status_code == 200
            assert faulty.status("/readyz") == 200
            good += 1
        for future in bad:
            problem(future.result(), 500, "inference_failed")


def test_bad_texts_alone_do_not_take_the_engine_out_of_service(faulty: Faulty) -> None:
    with faulty.order("nan"):
        for _ in range(8):
            problem(faulty.ask(MARKED), 500, "inference_failed")
        assert faulty.ask().status_code == 200
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


def test_beside_an_engine_that_hangs_others_answer_and_nothing_enters_it(faulty: Faulty) -> None:
    """Golden rows of a version to be loaded would enter it, and so would the batch that waits behind the hung one."""
    version = faulty.world.publish("m", seed=1).version
    with faulty.order("hang"), ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(faulty.ask) for _ in range(10)]
        until(lambda: faulty.value("polyhead_requests_in_progress") > 0, within_s=20, what="a request")
        time.sleep(0.2)
        asked += [pool.submit(faulty.labelled, "m") for _ in range(8)]
        move = pool.submit(faulty.client.move_alias, "m", version, 1)
        beside = 0
        while not all(future.done() for future in [*asked, move]):
            assert faulty.labelled("linear").status_code == 200
            beside += 1
        assert beside > 5
        for future in asked:
            problem(future.result(), 503, "model_not_ready")
        moved, pending = move.result(), move.result().json()
        assert (moved.status_code, pending["wanted"], pending["serving"]) == (202, version, 1)
        assert "unhealthy" in pending["reason"]
        assert faulty.labelled("linear").status_code == 200
        assert not faulty.is_crowded()
    until(faulty.served_again, within_s=90, what="the engine to serve again", every_s=0.2)
    until(lambda: faulty.labelled("m").json()["version"] == version, within_s=30, what="the version to serve by itself")
    assert not faulty.is_crowded()


@pytest.mark.parametrize("fault", ["fail", "nonsense"])
def test_an_engine_that_fails_at_everything_is_taken_out_and_checked_until_it_works(faulty: Faulty, fault: str) -> None:
    with faulty.order(fault):
        seen = [faulty.ask() for _ in range(4)]
        problem(seen[0], 500, "inference_failed")
        until(lambda: faulty.status("/readyz") == 503, within_s=30, what="the service to say so")
        problem(faulty.ask(), 503, "model_not_ready")
    until(faulty.served_again, within_s=90, what="the engine to serve again", every_s=0.2)


@pytest.mark.slow
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


@pytest.mark.slow
def test_ten_thousand_clients_may_wait_and_are_all_answered(patient: Faulty) -> None:
    clients = _connections(10_000)
    before = _resident_mb(patient.server.pid)
    with ThreadPoolExecutor(1) as pool:
        with patient.held():
            flood = pool.submit(lambda: asyncio.run(_flood(patient.server.port, clients)))
            patient.wait_queued(clients + 1)
            assert patient.labelled("linear").status_code == 200
            assert patient.status("/livez") == patient.status("/readyz") == 200
        assert flood.result() == {200: clients}
    assert _resident_mb(patient.server.pid) - before < 600
    for metric in ("queue_requests", "queue_tokens", "requests_in_progress"):
        assert patient.value(f"polyhead_{metric}") == 0, metric
    assert patient.served_again()


def test_exactly_those_who_stay_are_computed(patient: Faulty) -> None:
    left = patient.value("polyhead_cancelled_total", stage="queued")
    with ThreadPoolExecutor(5) as pool, patient.held():
        rows = patient.value("polyhead_batch_size_sum")
        staying = [pool.submit(patient.labelled, "m") for _ in range(5)]
        writers = [socket.create_connection(("127.0.0.1", patient.server.port)) for _ in range(300)]
        for writer in writers:
            writer.sendall(_request())
        patient.wait_queued(306)
        for writer in writers:
            writer.close()
        patient.wait_queued(6)
        assert patient.value("polyhead_cancelled_total", stage="queued") - left == 300
        patient.file.write_text("")
        assert [future.result().status_code for future in staying] == [200] * 5
    assert patient.value("polyhead_batch_size_sum") - rows == 6
    assert patient.value("polyhead_queue_tokens") == patient.value("polyhead_requests_in_progress") == 0


def _request(*, text: str = GOOD) -> bytes:
    body = json.dumps({"model": "tiny", "inputs": text, "parameters": {"return_embedding": True}}).encode()
    return (
        b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    ) + body


async def _flood(port: int, clients: int) -> Counter[Any]:
    """The status that each client got; all connect first, then all ask."""
    gate, connected = asyncio.Event(), 0
    open_slots = asyncio.Semaphore(500)  # the backlog of a listening socket is finite

    async def client() -> int | str:
        nonlocal connected
        async with open_slots:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        connected += 1
        if connected == clients:
            gate.set()
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
    return Counter(await asyncio.gather(*tasks))


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
