"""What idle event streams cost: the latency of requests with and without them, in turns within one run.

Each key opens as many streams as it may, on a queued job that no worker takes. Clients read nothing: what the server
sends now and then stays in the kernel.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import socket
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks import mixes, rate
from benchmarks.arguments import add_server, add_shared
from benchmarks.servers import BACKBONE, OURS, Server, start
from benchmarks.service import Service, wait_until_ready, write_results

PER_KEY = 50
IDLE_S = 5.0
_CSV = b"text,label\n" + b"".join(b"text %d,%d\n" % (number, number % 2) for number in range(40))


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="event-streams", seconds=20)
    add_server(parser)
    parser.add_argument("--keys", type=int, default=40, help=f"each opens {PER_KEY} streams")
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second, short texts of a file of our own")


def run(options: Namespace) -> None:
    if options.server.kind != OURS:
        raise SystemExit(f"{options.server.label}: only {OURS} has event streams")
    keys = [f"sk-bench-{number:04d}" for number in range(options.keys)]
    bodies = mixes.embedding_bodies(mixes.of_length(24), BACKBONE)
    rows = []
    with _started(options, keys) as server:
        jobs = _queued_jobs(server, keys)
        for number in range(options.repeats):
            for count in (0, PER_KEY):
                with _streams(server, keys, jobs, count) as opened:
                    rows.append({"round": number, "streams": opened, **_measured(server, bodies, keys[0], options)})
                    print(rows[-1], flush=True)
        about = {server.label: server.describe(options.peers)}
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    write_results(options.name, {"benchmark": "event_streams", "descriptors": limit, "servers": about, "rows": rows})


@contextlib.contextmanager
def _started(options: Namespace, keys: list[str]) -> Iterator[Server]:
    named = [
        {"name": key, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scopes": ["admin"], "tenant": "default"}
        for key in keys
    ]
    settings = {"api_keys": json.dumps(named), "max_event_streams": str(PER_KEY)}
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        server = start(options.server, Path(folder), options.peers, settings=settings)
        try:
            wait_until_ready(Service(server.base_url), [server.process])
            server.process.wait_until_idle()
            yield server
        finally:
            server.process.stop()


def _queued_jobs(server: Server, keys: list[str]) -> list[str]:
    """A job for each key."""
    with httpx.Client(base_url=server.base_url, headers={"X-API-Key": keys[0]}, timeout=60) as client:
        dataset = client.post("/datasets", files={"file": ("rows.csv", _CSV)}).raise_for_status().json()["id"]
        bodies = [{"dataset": dataset, "register_as": "bench", "backbone": BACKBONE} for _ in keys]
        return [client.post("/finetune", json=body).raise_for_status().json()["id"] for body in bodies]


@contextlib.contextmanager
def _streams(server: Server, keys: list[str], jobs: list[str], per_key: int) -> Iterator[int]:
    """`per_key` open streams of every key. Exits unless the next one is refused."""
    with contextlib.ExitStack() as stack:
        opened = 0
        for key, job in zip(keys, jobs, strict=True):
            for _ in range(per_key):
                connection, status = _opened(server, key, job)
                stack.callback(connection.close)
                opened += status == 200
            if per_key:
                connection, status = _opened(server, key, job)
                connection.close()
                if status != 429:
                    raise SystemExit(f"stream {per_key + 1} of one key got {status} instead of 429")
        if opened != per_key * len(keys):
            raise SystemExit(f"only {opened} of {per_key * len(keys)} streams could be opened")
        time.sleep(1)
        yield opened


def _opened(server: Server, key: str, job: str) -> tuple[socket.socket, int]:
    address = urlsplit(server.base_url)
    connection = socket.create_connection((address.hostname or "", address.port or 80), timeout=30)
    head = f"GET /finetune/{job}/events HTTP/1.1\r\nHost: {address.netloc}\r\nX-API-Key: {key}\r\n"
    connection.sendall(f"{head}Accept: text/event-stream\r\n\r\n".encode())
    return connection, int(connection.recv(4096).split(b" ", 2)[1])


def _measured(server: Server, bodies: list[bytes], key: str, options: Namespace) -> dict[str, Any]:
    before = server.process.cpu_seconds()
    time.sleep(IDLE_S)
    idle_cores = (server.process.cpu_seconds() - before) / IDLE_S
    samples = rate.drive(server.url, bodies, rate=options.rate, seconds=2 + options.seconds, headers={"X-API-Key": key})
    seen = rate.summarise(samples, 2, 2 + options.seconds)
    return {**asdict(seen), "idle_cores": idle_cores, "memory_mb": _resident_mb(server)}


def _resident_mb(server: Server) -> float:
    values = httpx.get(f"{server.base_url}/metrics", timeout=30).text.splitlines()
    return next(float(line.split()[1]) for line in values if line.startswith("process_resident_memory_bytes ")) / 1e6
