"""What a text costs by its length: latency alone and throughput with many, at lengths known exactly."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from benchmarks import mixes, wrk
from benchmarks.arguments import add_servers, add_shared
from benchmarks.servers import BACKBONE, OPEN_ADMISSION, describe, rounds, started
from benchmarks.service import write_results


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="lengths", seconds=5)
    add_servers(parser)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 64])


def run(options: Namespace) -> None:
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        started(options.servers, options.peers, settings=OPEN_ADMISSION) as servers,
    ):
        for tokens in options.tokens:
            bodies = mixes.embedding_bodies(mixes.of_length(tokens), BACKBONE)
            file = mixes.write_bodies(bodies, Path(folder, str(tokens)))
            for connections in options.connections:
                for number, server in rounds(servers, options.repeats):
                    seen = wrk.drive(
                        server.url, file, connections=connections, seconds=options.seconds, settle=server.settle
                    )
                    rows.append(
                        {
                            "server": server.label,
                            "tokens": tokens,
                            "connections": connections,
                            "round": number,
                            **asdict(seen),
                        }
                    )
                    print(
                        f"{tokens} tokens, {connections} connections, {server.label}: {seen.requests_per_s:.1f}/s, "
                        f"p50 {seen.p50_ms:.1f} ms",
                        flush=True,
                    )
        about = describe(servers, options.peers)
    write_results(options.name, {"benchmark": "length_cost", "servers": about, "rows": rows})
