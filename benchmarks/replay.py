"""What HTTP, queue and batching leave of the engine: texts per second through the service, against the very batches
that it logged in that run, replayed straight through `Engine.run` in this process.

Service and replay take turns; while one runs, the other is paused. A replayed batch has the shape of the logged one
and random tokens: what a batch costs depends on its shape.
"""

from __future__ import annotations

import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import inprocess, mixes, wrk
from benchmarks.arguments import add_mixes, add_server, add_shared
from benchmarks.open_loop import CONNECTIONS
from benchmarks.servers import BACKBONE, OPEN_ADMISSION, Server, started_with_data
from benchmarks.service import write_results
from modeling.engines.protocol import EngineBatch
from modeling.inputs import Features
from modeling.weights import IntArray


@dataclass(frozen=True, slots=True)
class LoggedBatch:
    """One line of the service's batch log (`POLYHEAD_BATCH_LOG`)."""

    lengths: tuple[int, ...]
    width: int
    adapters: tuple[str | None, ...]
    seconds: float


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="replay", seconds=15)
    add_server(parser)
    add_mixes(parser, default=("long", "short"))


def run(options: Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as name:
        folder = Path(name)
        log = folder / "batches.jsonl"
        settings = {**OPEN_ADMISSION, "batch_log": str(log)}
        with started_with_data(options.server, folder / "data", settings=settings) as server:
            about = server.describe(Path())
            server.process.pause()
            copy = inprocess.copied(folder / "data", folder / "copy")
            with inprocess.opened(options.server, copy, engine=about["info"]["backbones"][BACKBONE]["engine"]) as own:
                for mix in options.mixes:
                    bodies = mixes.embedding_bodies(mixes.texts(mix, options.data), BACKBONE)
                    file = mixes.write_bodies(bodies, folder / mix)
                    for number in range(options.repeats):
                        with server.process.running():
                            seen, batches = _drive_logged(server, file, log, options.seconds)
                        _, seconds = own.run(as_engine_batches(batches))
                        rows.append({"mix": mix, "round": number, **figures(batches, seen, seconds)})
                        print(rows[-1], flush=True)
    write_results(options.name, {"benchmark": "replay", "servers": {options.server.label: about}, "rows": rows})


def _drive_logged(server: Server, bodies: Path, log: Path, seconds: float) -> tuple[wrk.ClosedLoop, list[LoggedBatch]]:
    """The batches are those of the measured run alone."""
    start = 0

    def settle() -> None:
        nonlocal start
        server.settle()
        start = log.stat().st_size

    seen = wrk.drive(server.url, bodies, connections=CONNECTIONS, seconds=seconds, settle=settle)
    server.settle()
    return seen, read_log(log.read_bytes()[start:].decode().splitlines())


def read_log(lines: Iterable[str]) -> list[LoggedBatch]:
    documents = [json.loads(line) for line in lines if line.strip()]
    return [
        LoggedBatch(tuple(row["lengths"]), row["width"], tuple(row["adapters"]), row["seconds"]) for row in documents
    ]


def as_engine_batches(batches: Sequence[LoggedBatch]) -> list[EngineBatch]:
    """The same rows, lengths and adapters; the engine pads them itself, as it did for the service."""
    random = np.random.default_rng(0)
    return [
        EngineBatch(
            [_row(random.integers(1000, 20000, size=length)) for length in batch.lengths],
            batch.adapters if any(batch.adapters) else None,
        )
        for batch in batches
    ]


def figures(batches: Sequence[LoggedBatch], seen: wrk.ClosedLoop, replay_s: float) -> dict[str, float]:
    rows = sum(len(batch.lengths) for batch in batches)
    tokens = sum(sum(batch.lengths) for batch in batches)
    padded = sum(batch.width * len(batch.lengths) for batch in batches)
    return {
        "http_texts_per_s": seen.requests_per_s,
        "replay_texts_per_s": rows / replay_s,
        "ratio": seen.requests_per_s * replay_s / rows,
        "batches": len(batches),
        "mean_rows": rows / len(batches),
        "padding": 1 - tokens / padded,
        # The rest of the time the engine waited for work; replay against log is what sharing the processor cost it.
        "engine_busy": sum(batch.seconds for batch in batches) * seen.requests_per_s / rows,
        "replay_to_logged": replay_s / sum(batch.seconds for batch in batches),
    }


def _row(ids: IntArray) -> Features:
    return Features({"input_ids": ids, "token_type_ids": np.zeros_like(ids)}, len(ids))
