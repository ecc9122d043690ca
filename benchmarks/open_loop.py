"""Latency at constant rates, the same for every server: shares of what the best peer can do at most."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import mixes, rate, wrk
from benchmarks.arguments import add_mixes, add_servers, add_shared
from benchmarks.figures import shown
from benchmarks.servers import BACKBONE, Server, describe, rounds, started
from benchmarks.service import write_results

CONNECTIONS = 64
RAMP_S = 3.0


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="open-loop", seconds=20)
    add_servers(parser)
    add_mixes(parser)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5, 0.75, 1.0, 1.5])
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds after which a client gives up")


def run(options: Namespace) -> None:
    rows = []
    with started(options.servers, options.peers) as servers:
        for mix in options.mixes:
            bodies = mixes.embedding_bodies(mixes.texts(mix, options.data), BACKBONE)
            best = best_peer_rate(servers, bodies, options.seconds)
            for share in options.shares:
                for number, server in rounds(servers, options.repeats):
                    samples = rate.drive(
                        server.url,
                        bodies,
                        rate=share * best,
                        seconds=RAMP_S + options.seconds,
                        timeout_s=options.timeout,
                    )
                    seen = rate.summarise(samples, RAMP_S, RAMP_S + options.seconds)
                    rows.append({"server": server.label, "mix": mix, "share": share, "round": number, **asdict(seen)})
                    print(
                        f"{mix} {server.label}: offered {seen.offered:.1f}/s, goodput {seen.goodput:.1f}/s, "
                        f"p50 {shown(seen.p50_ms)} ms, p99 {shown(seen.p99_ms)} ms, {seen.outcomes}",
                        flush=True,
                    )
        about = describe(servers, options.peers)
    write_results(options.name, {"benchmark": "open_loop", "servers": about, "rows": rows})


def best_peer_rate(servers: Sequence[Server], bodies: Sequence[bytes], seconds: float) -> float:
    """Requests a second of the fastest peer in a closed loop; of the first server where there is no peer."""
    candidates = [server for server in servers if not server.is_ours] or servers[:1]
    return max(peak(server, server.url, bodies, seconds) for _, server in rounds(candidates, 1))


def peak(server: Server, url: str, bodies: Sequence[bytes], seconds: float, *, connections: int = CONNECTIONS) -> float:
    """Requests a second at `url` in a closed loop."""
    with tempfile.TemporaryDirectory() as folder:
        file = mixes.write_bodies(bodies, Path(folder, "bodies"))
        return wrk.drive(url, file, connections=connections, seconds=seconds, settle=server.settle).requests_per_s
