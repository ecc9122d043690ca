"""Streams of events: every event once and in order to each, one look at the database for all, and bounds."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.jobs.errors import JobNotFound
from finetune.jobs.records import JobSpec, JobStatus, Lease
from finetune.jobs.store import JobStore
from model_registry.db import Database
from model_registry.errors import DatabaseUnavailable
from model_registry.migrations import migrate
from service.api import event_streams
from service.api.cancellation import CONNECTION_LOST
from service.api.event_streams import EventStream, EventStreams, Subscription
from service.api.guard import DrainState
from service.api.problems import Problem
from service.metrics import ServingMetrics

SPEC = JobSpec(dataset="ds_1", backbone="tiny", register_as="m")
POLL_S = 0.001
Key = tuple[str, str]
KEY: Key = ("default", "key")


class CountingStore(JobStore):
    """Counts its looks, and is away if told so."""

    looks = pages = 0
    is_away = False

    def changes(self, seen: Any) -> Any:
        self.looks += 1
        if self.is_away:
            raise DatabaseUnavailable("away")
        return super().changes(seen)

    def events(self, *args: Any, **kwargs: Any) -> Any:
        self.pages += 1
        return super().events(*args, **kwargs)


class Running:
    """A hub whose loop turns, and a job with a worker."""

    def __init__(self, jobs: CountingStore, *, per_key: int = 3) -> None:
        self.jobs, self.drain, self.metrics = jobs, DrainState(), ServingMetrics()
        self.streams = EventStreams(jobs, self.drain, self.metrics, per_key=per_key, poll_s=POLL_S)
        self.job_id = jobs.enqueue("default", SPEC, is_data_ready=True).id
        claimed = jobs.claim("w", lease_s=60)
        assert claimed is not None
        self.lease: Lease = claimed[0]

    def say(self, count: int = 1) -> None:
        for number in range(count):
            self.jobs.record(self.lease, "progress", f"step {number}", {"step": number})

    def finish(self) -> None:
        self.jobs.finish(self.lease, JobStatus.SUCCEEDED)

    def last_seq(self) -> int:
        return self.jobs.get("default", self.job_id).last_seq

    async def open(self, *, after: int = 0, key: Key = KEY) -> Subscription:
        return await self.streams.open(key, "default", self.job_id, after=after)

    async def read(self, *, after: int = 0) -> list[int]:
        with await self.open(after=after) as subscription:
            return [seq async for chunk in subscription.chunks(self.streams.is_ending) for seq in seqs(chunk)]


def seqs(chunk: bytes) -> list[int]:
    return [int(seq) for seq in re.findall(rb"^id: (\d+)$", chunk, re.MULTILINE)]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[CountingStore]:
    database = Database(f"sqlite:///{tmp_path / 'jobs.db'}")
    migrate(database)
    yield CountingStore(database)
    database.dispose()


def play(jobs: CountingStore, scenario: Callable[[Running], Any], **options: Any) -> Running:
    async def run() -> Running:
        running = Running(jobs, **options)
        loop = asyncio.create_task(running.streams.run())
        try:
            async with asyncio.timeout(20):
                await scenario(running)
        finally:
            loop.cancel()
        return running

    return asyncio.run(run())


async def seen(chunks: AsyncIterator[bytes], last: int) -> list[int]:
    """The events up to `last`."""
    found: list[int] = []
    while not found or found[-1] < last:
        found += seqs(await anext(chunks))
    return found


def test_every_event_comes_once_and_in_order_wherever_a_reader_begins(jobs: CountingStore) -> None:
    async def scenario(running: Running) -> None:
        running.say(3)
        readers = [asyncio.create_task(running.read(after=after)) for after in (0, 2, 4)]
        await asyncio.sleep(0)
        for _ in range(5):
            running.say()
            await asyncio.sleep(POLL_S * 2)
        late = asyncio.create_task(running.read(after=6))
        running.say(300)  # more than a feed keeps, between two looks
        running.finish()
        last = running.last_seq()
        for after, reader in zip((0, 2, 4, 6), (*readers, late), strict=True):
            assert await reader == list(range(after + 1, last + 1))
        assert await running.read(after=last) == []
        assert await running.read(after=10**6) == []

    running = play(jobs, scenario, per_key=10)
    assert running.metrics.event_streams._value.get() == 0
    assert not running.streams._feeds and not running.streams._open


def test_a_reader_that_fell_behind_goes_on_from_the_database(
    jobs: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_streams, "_KEPT_EVENTS", 4)

    async def scenario(running: Running) -> None:
        with await running.open() as slow, await running.open(after=running.last_seq()) as quick:
            pieces = slow.chunks(running.streams.is_ending)
            first = await seen(pieces, 2)
            ahead = quick.chunks(running.streams.is_ending)
            for _ in range(10):
                running.say()
                await seen(ahead, running.last_seq())
            assert len(running.streams._feeds[running.job_id]._events) == 4
            assert first + await seen(pieces, running.last_seq()) == list(range(1, running.last_seq() + 1))

    play(jobs, scenario)


def test_one_look_serves_all_streams_and_none_is_made_without_one(jobs: CountingStore) -> None:
    async def scenario(running: Running) -> None:
        await asyncio.sleep(POLL_S * 20)
        assert running.jobs.looks == 0
        last = running.last_seq()
        opened = [await running.open(after=last) for _ in range(200)]
        readers = [subscription.chunks(running.streams.is_ending) for subscription in opened]
        waiting = [asyncio.create_task(seen(reader, last + 1)) for reader in readers]
        await asyncio.sleep(POLL_S * 5)
        running.say()
        assert await asyncio.gather(*waiting) == [[last + 1]] * 200
        assert running.jobs.pages == 0, "each from memory"
        for subscription in opened:
            subscription.__exit__()
        await asyncio.sleep(POLL_S * 5)
        looks = running.jobs.looks
        await asyncio.sleep(POLL_S * 20)
        assert running.jobs.looks <= looks + 1

    play(jobs, scenario, per_key=200)


def test_a_key_has_so_many_streams_and_no_more(jobs: CountingStore) -> None:
    async def scenario(running: Running) -> None:
        opened = [await running.open() for _ in range(3)]
        with pytest.raises(Problem) as refused:
            await running.open()
        assert (refused.value.status, refused.value.code) == (429, "too_many_streams")
        assert refused.value.retry_after_s
        other = await running.open(key=("default", "another key"))
        assert running.metrics.event_streams._value.get() == 4
        opened.pop().__exit__()
        opened.append(await running.open())
        with pytest.raises(JobNotFound):
            await running.streams.open(("x", "y"), "x", running.job_id, after=0)
        for subscription in (*opened, other):
            subscription.__exit__()

    play(jobs, scenario, per_key=3)


def test_a_stream_that_waits_says_so_now_and_then_and_survives_a_database_that_is_away(jobs: CountingStore) -> None:
    async def scenario(running: Running) -> None:
        last = running.last_seq()
        with await running.open(after=last) as subscription:
            chunks = subscription.chunks(running.streams.is_ending, ping_s=POLL_S)
            assert (await anext(chunks)).startswith(b":")
            running.jobs.is_away = True
            looks = running.jobs.looks
            while running.jobs.looks < looks + 2:
                assert (await anext(chunks)).startswith(b":")
            running.say()
            running.jobs.is_away = False
            while not (found := seqs(await anext(chunks))):
                pass
            assert found == [last + 1]

    play(jobs, scenario)


def test_streams_end_with_the_server(jobs: CountingStore) -> None:
    async def scenario(running: Running) -> None:
        reader = asyncio.create_task(running.read())
        await asyncio.sleep(POLL_S * 5)
        assert not reader.done()
        running.drain.refusing = True
        assert await reader == list(range(1, running.last_seq() + 1))

    play(jobs, scenario)


def test_a_client_that_leaves_gives_its_place_back_at_once(jobs: CountingStore) -> None:
    async def scenario(running: Running) -> None:
        lost = asyncio.get_running_loop().create_future()
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("nothing is asked")

        stream = EventStream(await running.open(), running.streams.is_ending)
        scope = {"type": "http", "extensions": {CONNECTION_LOST: {"future": lost}}}
        answering = asyncio.create_task(stream(scope, receive, send))
        while len(sent) < 2:
            await asyncio.sleep(POLL_S)
        assert sent[0]["status"] == 200
        headers = dict(sent[0]["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert b"content-length" not in headers
        assert seqs(sent[1]["body"]) == [1, 2]
        lost.set_result(None)
        await answering
        assert running.metrics.event_streams._value.get() == 0

    play(jobs, scenario)


def test_a_client_that_takes_nothing_gives_its_place_back(jobs: CountingStore) -> None:
    async def scenario(running: Running) -> None:
        lost = asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # its buffers are full for good

        async def receive() -> Any:
            raise AssertionError("nothing is asked")

        stream = EventStream(await running.open(), running.streams.is_ending, stall_s=POLL_S)
        await stream({"type": "http", "extensions": {CONNECTION_LOST: {"future": lost}}}, receive, send)
        assert running.metrics.event_streams._value.get() == 0

    play(jobs, scenario)


def test_a_database_that_is_away_is_logged_once(jobs: CountingStore, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(running: Running) -> None:
        with await running.open():
            running.jobs.is_away = True
            looks = running.jobs.looks
            while running.jobs.looks < looks + 4:
                await asyncio.sleep(POLL_S)

    play(jobs, scenario)
    assert len([record for record in caplog.records if "events cannot be read" in record.message]) == 1
