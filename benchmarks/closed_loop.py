"""Throughput and latency in a closed loop, against the peers in the same run."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from benchmarks import mixes, wrk
from benchmarks.arguments import add_mixes, add_servers, add_shared
from benchmarks.servers import BACKBONE, OPEN_ADMISSION, describe, rounds, started
from benchmarks.service import write_results


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="closed-loop", seconds=10)
    add_servers(parser)
    add_mixes(parser)
    parser.add_argument(
        "--loads",
        nargs="+",
        type=_load,
        default=[(1, 1), (64, 1), (1, 32), (2, 32)],
        metavar="CONNECTIONSxTEXTS",
        help="connections and texts a request; default: 1x1 64x1 1x32 2x32",
    )


def run(options: Namespace) -> None:
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        started(options.servers, options.peers, settings=OPEN_ADMISSION) as servers,
    ):
        for mix in options.mixes:
            texts = mixes.texts(mix, options.data)
            for connections, per_request in options.loads:
                bodies = mixes.embedding_bodies(texts, BACKBONE, per_request=per_request)
                file = mixes.write_bodies(bodies, Path(folder, f"{mix}-{per_request}"))
                for number, server in rounds(servers, options.repeats):
                    seen = wrk.drive(
                        server.url, file, connections=connections, seconds=options.seconds, settle=server.settle
                    )
                    rows.append(
                        {
                            "server": server.label,
                            "mix": mix,
                            "connections": connections,
                            "texts": per_request,
                            "round": number,
                            "texts_per_s": seen.requests_per_s * per_request,
                            **asdict(seen),
                        }
                    )
                    print(
                        f"{mix} {connections}x{per_request} {server.label}: {seen.requests_per_s:.1f} requests/s, "
                        f"p50 {seen.p50_ms:.1f} ms, p99 {seen.p99_ms:.1f} ms",
                        flush=True,
                    )
        about = describe(servers, options.peers)
    write_results(options.name, {"benchmark": "closed_loop", "servers": about, "rows": rows})


def _load(text: str) -> tuple[int, int]:
    connections, _, texts = text.partition("x")
    return int(connections), int(texts)
