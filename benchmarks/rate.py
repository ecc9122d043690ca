"""Open loop: requests leave at a constant rate, however slowly they are answered.

Latency counts from the moment a request was due. A request that had to wait because the server or this client was
busy has that wait in its figure, so a stall cannot hide the requests that it delayed (coordinated omission).
A request unanswered after `timeout_s` is given up, as a user would, and its connection closed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import uvloop

from benchmarks.figures import percentile

_VERSION_HEADER = b"\r\nx-model-version: "


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times are seconds from the start of the run; `outcome` is an HTTP status, timeout or broken."""

    due: float
    sent: float
    done: float
    outcome: str
    version: int | None = None

    @property
    def latency_s(self) -> float:
        return self.done - self.due


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Figures of one window. Rates are per second; `goodput` counts the answers that arrived in it.

    Latencies are of the requests that were due in it and answered with 200; `refused_p99_ms` of those answered
    otherwise. `lag_ms` is the longest that a request left late: if it is not small, this client was the limit.
    """

    offered: float
    goodput: float
    outcomes: dict[str, int]
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    max_ms: float | None
    refused_p99_ms: float | None
    lag_ms: float


def schedule(rate: float, seconds: float) -> list[float]:
    """When requests are due, in seconds from the start."""
    return [index / rate for index in range(round(rate * seconds))]


def summarise(samples: Sequence[Sample], start: float, end: float) -> OpenLoop:
    """Figures of the window from `start` to `end`; what came before was the way into the steady state."""
    due = [sample for sample in samples if start <= sample.due < end]
    good = [sample.latency_s * 1e3 for sample in due if sample.outcome == "200"]
    refused = [sample.latency_s * 1e3 for sample in due if sample.outcome.isdigit() and sample.outcome != "200"]
    answered = sum(sample.outcome == "200" and start <= sample.done < end for sample in samples)
    return OpenLoop(
        offered=len(due) / (end - start),
        goodput=answered / (end - start),
        outcomes=dict(Counter(sample.outcome for sample in due)),
        p50_ms=percentile(good, 0.5),
        p99_ms=percentile(good, 0.99),
        p999_ms=percentile(good, 0.999),
        max_ms=percentile(good, 1.0),
        refused_p99_ms=percentile(refused, 0.99),
        lag_ms=max(((sample.sent - sample.due) * 1e3 for sample in due), default=0.0),
    )


def drive(
    url: str,
    bodies: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    timeout_s: float = 10.0,
    headers: Mapping[str, str] | None = None,
    alongside: Callable[[float], Awaitable[None]] | None = None,
) -> list[Sample]:
    """Offers `rate` requests a second for `seconds`, then waits for the last answers.

    `alongside(started)` runs meanwhile on the same event loop; `started` is the run's start by `time.monotonic`.
    """
    generator = Generator(url, bodies, timeout_s=timeout_s, headers=headers or {})
    return uvloop.run(_drive(generator, schedule(rate, seconds), alongside))


async def _drive(
    generator: Generator, due: Sequence[float], alongside: Callable[[float], Awaitable[None]] | None
) -> list[Sample]:
    started = time.monotonic()
    other = asyncio.ensure_future(alongside(started)) if alongside else None
    samples = await generator.offer(due, started)
    if other is not None:
        await other
    return samples


class Generator:
    """Sends encoded requests in turn over as many kept-alive connections as are needed."""

    def __init__(self, url: str, bodies: Sequence[bytes], *, timeout_s: float, headers: Mapping[str, str] = {}) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port or 80
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._requests = [head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._samples: list[Sample] = []
        self._is_complete = asyncio.Event()
        self._expected = 0

    async def offer(self, due: Sequence[float], started: float) -> list[Sample]:
        self._expected = len(due)
        for index, offset in enumerate(due):
            await asyncio.sleep(max(0.0, started + offset - time.monotonic()))
            self._send(self._requests[index % len(self._requests)], offset, started)
        await self._is_complete.wait()
        for connection in self._idle:
            connection.close()
        return sorted(self._samples, key=lambda sample: sample.due)

    def _send(self, request: bytes, due: float, started: float) -> None:
        sent = time.monotonic() - started
        loop = asyncio.get_running_loop()

        def end(outcome: str, version: int | None, connection: _Connection) -> None:
            timer.cancel()
            self._samples.append(Sample(due, sent, time.monotonic() - started, outcome, version))
            if connection.is_usable:
                self._idle.append(connection)
            if len(self._samples) == self._expected:
                self._is_complete.set()

        while self._idle and not self._idle[-1].is_usable:
            self._idle.pop()  # the server has closed it meanwhile
        connection = self._idle.pop() if self._idle else _Connection()
        timer = loop.call_later(self._timeout_s, connection.give_up)
        connection.exchange(request, end)
        if connection.connecting is None:
            connection.connecting = loop.create_task(self._connect(connection))

    async def _connect(self, connection: _Connection) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection, *self._address)
        except OSError:
            connection.finish("broken")


class _Connection(asyncio.Protocol):
    """One request at a time; reads no more of an answer than status, length and the model's version."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._pending: tuple[bytes, Callable[[str, int | None, _Connection], None]] | None = None
        self._buffer = b""
        self._size: int | None = None
        self._is_closed = False
        self.connecting: asyncio.Task[None] | None = None

    @property
    def is_usable(self) -> bool:
        return self._transport is not None and not self._is_closed

    def exchange(self, request: bytes, end: Callable[[str, int | None, _Connection], None]) -> None:
        self._pending = request, end
        self._buffer, self._size = b"", None
        if self._transport is not None:
            self._transport.write(request)

    def give_up(self) -> None:
        self.close()
        self.finish("timeout")

    def close(self) -> None:
        self._is_closed = True
        if self._transport is not None:
            self._transport.abort()

    def finish(self, outcome: str, version: int | None = None) -> None:
        if self._pending is not None:
            (_, end), self._pending = self._pending, None
            end(outcome, version, self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if self._is_closed or self._pending is None:
            self.close()  # given up while it was connecting
        else:
            self._transport.write(self._pending[0])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._size is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._size = end + 4 + content_length(self._buffer[:end])
        if len(self._buffer) >= self._size:
            self.finish(self._buffer[9:12].decode(), model_version(self._buffer))

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        self.finish("broken")


def content_length(head: bytes) -> int:
    """Of an answer's head. Exits where there is none: no server measured here streams."""
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    if not found:
        raise SystemExit(f"an answer without Content-Length: {head[:200]!r}")
    return int(rest.partition(b"\r\n")[0])


def model_version(answer: bytes) -> int | None:
    _, found, rest = answer.partition(_VERSION_HEADER)
    value = rest[:12].partition(b"\r\n")[0]
    return int(value) if found and value.isdigit() else None
