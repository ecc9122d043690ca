"""Event streams of jobs: one look at the database for all of them, and what is new goes from memory to each.

A stream that waits costs a task and a timer. A client that reads slowly holds back its own stream alone: a stream keeps
a position, not a queue, and what has left memory meanwhile it reads from the database again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from finetune.jobs.records import JobEvent
from finetune.jobs.store import JobStore
from model_registry.errors import DatabaseUnavailable
from service.api import schemas
from service.api.cancellation import unless_gone
from service.api.guard import DrainState
from service.api.problems import Problem, dumped
from service.metrics import ServingMetrics
from service.threads import on_database

_log = logging.getLogger("service.event_streams")
POLL_S = 0.3
PING_S = 15.0
"""Proxies close a connection that is silent for long."""
STALL_S = 60.0
"""A client that takes nothing for so long loses its stream; it knows where to go on."""
_KEPT_EVENTS = 256
_PAGE_EVENTS = 100
_PING: Final = b": ping\n\n"

Key = tuple[str, str]
"""Tenant and name of the key that opened a stream."""
Numbered = tuple[int, bytes]
"""An event's `seq`, and the event as it goes over the wire."""


class _Feed:
    """The latest events of one job. `start` is the seq before the oldest that is in memory, `last` that of the newest
    that was read."""

    def __init__(self, last: int, *, is_over: bool) -> None:
        self.start = self.last = last
        self.is_over = is_over
        self.readers = 0
        self._events: deque[Numbered] = deque()
        self._changed = asyncio.Event()

    def add(self, events: Sequence[JobEvent]) -> None:
        for event in events:
            self._events.append((event.seq, encoded(event)))
            self.last = event.seq
        while len(self._events) > _KEPT_EVENTS:
            self.start = self._events.popleft()[0]

    def after(self, seq: int) -> list[Numbered] | None:
        """Events beyond `seq`, in order; None if some of them are no longer in memory."""
        if seq < self.start:
            return None
        return [event for event in self._events if event[0] > seq] if seq < self.last else []

    def wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changes_within(self, seconds: float) -> bool:
        """Whether something changed before the time was over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
                return True
        return False


class Subscription:
    """A place in one feed, and one of the streams that its key may have; both are given back at the end of `with`."""

    def __init__(
        self, feed: _Feed, read: Callable[[int], list[JobEvent]], after: int, close: Callable[[], None]
    ) -> None:
        self._feed, self._read, self._after, self._close = feed, read, after, close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    async def chunks(self, is_ending: Callable[[], bool], *, ping_s: float = PING_S) -> AsyncIterator[bytes]:
        """Every event once, in order, until the job or the server has ended; a comment now and then."""
        while not is_ending():
            events = await self._next()
            if events:
                yield b"".join([chunk for _, chunk in events])
                self._after = events[-1][0]
            elif self._feed.is_over:
                return
            elif not await self._feed.changes_within(ping_s):
                yield _PING

    async def _next(self) -> list[Numbered]:
        events = self._feed.after(self._after)
        if events is not None:
            return events[:_PAGE_EVENTS]
        return [(event.seq, encoded(event)) for event in await on_database(self._read, self._after)]


class EventStreams:
    """All streams of this process. A key may have `per_key` of them."""

    def __init__(
        self, jobs: JobStore, drain: DrainState, metrics: ServingMetrics, *, per_key: int, poll_s: float = POLL_S
    ) -> None:
        self._jobs, self._drain, self._metrics = jobs, drain, metrics
        self._per_key, self._poll_s = per_key, poll_s
        self._feeds: dict[str, _Feed] = {}
        self._open: Counter[Key] = Counter()
        self._is_wanted = asyncio.Event()

    async def open(self, key: Key, tenant: str, job_id: str, *, after: int) -> Subscription:
        """A stream of the events beyond `after`. Raises `JobNotFound`, 429 if the key has as many as it may."""
        if self._open[key] >= self._per_key:
            detail = f"this key has {self._per_key} event streams open; close one, or ask for the events as JSON"
            raise Problem(429, "too_many_streams", detail, retry_after_s=5.0)
        self._open[key] += 1
        self._metrics.event_streams.inc()
        try:
            job = await on_database(self._jobs.get, tenant, job_id)
        except BaseException:
            self._close(key, job_id)
            raise
        feed = self._feeds.setdefault(job_id, _Feed(job.last_seq, is_over=job.status.is_final))
        feed.readers += 1
        self._is_wanted.set()

        def read(seq: int) -> list[JobEvent]:
            return self._jobs.events(tenant, job_id, after=seq, limit=_PAGE_EVENTS)

        return Subscription(feed, read, after, lambda: self._close(key, job_id, feed))

    def is_ending(self) -> bool:
        return self._drain.refusing

    async def run(self) -> None:
        """Looks for what is new, as long as there is a stream, until cancelled."""
        is_away = False
        while True:
            await self._is_wanted.wait()
            try:
                await self._look()
                is_away = False
            except DatabaseUnavailable as error:
                if not is_away:  # once, and not three times a second
                    _log.warning(f"events cannot be read: {error}", extra={"action": "events_unreachable"})
                is_away = True
            except Exception:
                _log.exception("reading events failed", extra={"action": "events_failed"})
            if self._drain.refusing:
                for feed in self._feeds.values():
                    feed.wake()
            if not self._feeds:
                self._is_wanted.clear()
            else:
                await asyncio.sleep(self._poll_s)

    async def _look(self) -> None:
        seen = {job_id: feed.last for job_id, feed in self._feeds.items() if not feed.is_over}
        if not seen:
            return
        changes = await on_database(self._jobs.changes, seen)
        for job_id in seen:
            feed, change = self._feeds.get(job_id), changes.get(job_id)
            if feed is not None and change is not None:
                feed.add([event for event in change.events if event.seq > feed.last])
                feed.is_over = change.is_gone or (change.is_final and feed.last >= change.last_seq)
                feed.wake()

    def _close(self, key: Key, job_id: str, feed: _Feed | None = None) -> None:
        self._metrics.event_streams.dec()
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]
        if feed is not None:
            feed.readers -= 1
            if not feed.readers and self._feeds.get(job_id) is feed:
                del self._feeds[job_id]


class EventStream(Response):
    """A subscription as Server-Sent Events. It ends at once when its client leaves."""

    media_type = "text/event-stream"

    def __init__(self, subscription: Subscription, is_ending: Callable[[], bool], *, stall_s: float = STALL_S) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._subscription, self._is_ending, self._stall_s = subscription, is_ending, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._subscription:
            try:
                await unless_gone(scope, self._send(send))
            except TimeoutError:
                return  # the server closes what is left unfinished
            except Problem as problem:
                if problem.code != "client_closed_request":
                    raise

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with contextlib.suppress(DatabaseUnavailable):  # its client comes back and says what it had last
            async for chunk in self._subscription.chunks(self._is_ending):
                async with asyncio.timeout(self._stall_s):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def event_document(event: JobEvent) -> schemas.Event:
    return {
        "seq": event.seq,
        "object": "finetune.event",
        "job_id": event.job_id,
        "attempt": event.attempt,
        "created_at": event.created_at,
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data,
    }


def encoded(event: JobEvent) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.seq, event.type.encode(), dumped(event_document(event)))
