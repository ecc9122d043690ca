"""Twice what a server can do, at a constant rate: how much of its capacity is left, and how long the admitted wait.

Our service runs with its default admission: what could not start within `max_queue_delay_ms` is refused at once. The
bound on the admitted is that delay and one batch. The peers refuse nothing; for all alike, an answer later than
`--timeout` has no reader any more.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import Any

from benchmarks import mixes, rate
from benchmarks.arguments import add_mixes, add_servers, add_shared
from benchmarks.figures import shown
from benchmarks.open_loop import CONNECTIONS, peak
from benchmarks.servers import BACKBONE, Server, describe, rounds, started
from benchmarks.service import Service, write_results

FACTOR = 2.0
RAMP_S = 5.0  # until the queues are full


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="overload", seconds=20)
    add_servers(parser)
    add_mixes(parser)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds after which a client gives up")
    parser.add_argument(
        "--connections",
        type=int,
        default=CONNECTIONS,
        help="that measure the capacity; fewer where a machine is so slow that these are refused",
    )


def run(options: Namespace) -> None:
    rows = []
    with started(options.servers, options.peers) as servers:
        for mix in options.mixes:
            bodies = mixes.embedding_bodies(mixes.texts(mix, options.data), BACKBONE)
            for number, server in rounds(servers, options.repeats):
                capacity = peak(server, server.url, bodies, options.seconds, connections=options.connections)
                server.settle()
                batches, processor_s, started_at = _Batches(server), time.process_time(), time.monotonic()
                samples = rate.drive(
                    server.url,
                    bodies,
                    rate=FACTOR * capacity,
                    seconds=RAMP_S + options.seconds,
                    timeout_s=options.timeout,
                )
                client_cores = (time.process_time() - processor_s) / (time.monotonic() - started_at)
                seen = rate.summarise(samples, RAMP_S, RAMP_S + options.seconds)
                rows.append(
                    {
                        "server": server.label,
                        "mix": mix,
                        "round": number,
                        "peak": capacity,
                        **asdict(seen),
                        "client_cores": client_cores,
                        **batches.bound(),
                    }
                )
                print(
                    f"{mix} {server.label}: peak {capacity:.1f}/s, offered {seen.offered:.1f}/s, "
                    f"goodput {seen.goodput / capacity:.2f} of the peak, p99 {shown(seen.p99_ms)} ms, {seen.outcomes}, "
                    f"{batches.bound()}, {client_cores:.2f} cores for this client",
                    flush=True,
                )
        about = describe(servers, options.peers)
    write_results(options.name, {"benchmark": "overload", "factor": FACTOR, "servers": about, "rows": rows})


class _Batches:
    """Mean seconds of a batch between the start and `bound`, of a server that tells."""

    def __init__(self, server: Server) -> None:
        self._service = Service(server.base_url) if server.is_ours else None
        self._before = self._seen()

    def bound(self) -> dict[str, Any]:
        if self._service is None:
            return {}
        seconds, count = (after - before for after, before in zip(self._seen(), self._before, strict=True))
        limits = self._service.http.get("/info").json()["limits"]
        return {"max_queue_delay_ms": limits["max_queue_delay_ms"], "batch_ms": 1e3 * seconds / max(1, count)}

    def _seen(self) -> tuple[float, float]:
        if self._service is None:
            return 0.0, 0.0
        totals = (self._service.metric(f"inference_duration_seconds_{part}") for part in ("sum", "count"))
        seconds, count = (sum(values.values()) for values in totals)
        return seconds, count
