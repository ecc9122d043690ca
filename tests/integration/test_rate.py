"""The constant-rate generator against a server of a few lines."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from benchmarks.rate import Generator, Sample, schedule

Answers = dict[bytes, bytes]

OK = b"HTTP/1.1 200 OK\r\nx-model-version: 3\r\ncontent-length: 5\r\n\r\nhello"
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n"


async def offer(answers: Answers, *, rate: float, timeout_s: float = 5.0) -> tuple[list[Sample], int]:
    """Ten requests whose bodies are the keys of `answers` in turn; the samples and how many connections were made."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:")
                length = int(head.partition(b"Content-Length: ")[2])
                answer = answers[await reader.readexactly(length)]
                if answer == b"close":
                    break
                writer.write(answer[:20])  # in two parts, as a network may deliver it
                await writer.drain()
                writer.write(answer[20:])
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    generator = Generator(f"http://127.0.0.1:{port}/predict", list(answers), timeout_s=timeout_s)
    samples = await generator.offer(schedule(rate, 10 / rate), asyncio.get_running_loop().time())
    server.close()
    await server.wait_closed()
    return samples, connections


def test_answers_are_counted_by_status_and_connections_kept() -> None:
    samples, connections = asyncio.run(offer({b"a": OK, b"bc": REFUSED}, rate=200.0))
    assert [sample.outcome for sample in samples] == ["200", "429"] * 5
    assert {sample.version for sample in samples} == {3, None}
    assert [sample.due for sample in samples] == pytest.approx([number / 200 for number in range(10)])
    assert all(sample.due <= sample.sent <= sample.done for sample in samples)
    assert connections < 10


def test_a_connection_that_ends_is_a_failure_of_its_request_alone() -> None:
    samples, _ = asyncio.run(offer({b"a": OK, b"b": b"close"}, rate=100.0))
    assert Counter(sample.outcome for sample in samples) == {"200": 5, "broken": 5}


def test_what_is_not_answered_in_time_is_given_up_and_delays_nobody() -> None:
    samples, _ = asyncio.run(offer({b"a": b"", b"b": OK}, rate=200.0, timeout_s=0.2))
    assert [sample.outcome for sample in samples] == ["timeout", "200"] * 5
    assert all(sample.latency_s < 0.15 for sample in samples if sample.outcome == "200")


def test_nobody_there() -> None:
    async def run() -> list[Sample]:
        return await Generator("http://127.0.0.1:9/predict", [b"a"], timeout_s=5.0).offer(
            schedule(100.0, 0.03), asyncio.get_running_loop().time()
        )

    assert [sample.outcome for sample in asyncio.run(run())] == ["broken"] * 3
