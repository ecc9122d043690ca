"""Many models on one backbone: the same texts spread over n of them, against all to one; and what each adds.

Over HTTP heads and LoRA adapters alike. In process LoRA alone: the same batches through the same engine with an
adapter drawn for each row, with one for all rows, and without.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import inprocess, mixes, wrk
from benchmarks.arguments import add_mixes, add_server, add_shared
from benchmarks.inprocess import batches_by_length
from benchmarks.open_loop import CONNECTIONS
from benchmarks.servers import OPEN_ADMISSION, Server, started_with_data
from benchmarks.service import Service, write_results
from benchmarks.versions import RANK, Publisher
from model_registry.manifest import VersionKind
from modeling.engines.protocol import EngineBatch

Row = dict[str, Any]


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="many-models", seconds=10)
    add_server(parser)
    add_mixes(parser, default=("long",))
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 8, 32])


def run(options: Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        data_dir = Path(folder, "data")
        _publish(data_dir, {"head": max(options.heads), "lora": max(options.adapters)})
        with started_with_data(options.server, data_dir, settings=OPEN_ADMISSION) as server:
            about, engine = server.describe(Path()), server.engine
            memory = {kind: _memory(server, kind) for kind in ("head", "lora")}
            rows = list(_over_http(server, options, Path(folder)))
        rows += _in_process(options, data_dir, engine)
    write_results(
        options.name,
        {
            "benchmark": "many_models",
            "servers": {options.server.label: about},
            "model_memory_bytes": memory,
            "rows": rows,
        },
    )


def _over_http(server: Server, options: Namespace, folder: Path) -> Iterator[Row]:
    arms: list[tuple[VersionKind, int]] = [("head", n) for n in options.heads] + [("lora", n) for n in options.adapters]
    for mix in options.mixes:
        texts = mixes.texts(mix, options.data)
        for number in range(options.repeats):
            for kind, count in arms:
                bodies = mixes.predict_bodies(texts, [f"{kind}-{model}" for model in range(count)])
                file = mixes.write_bodies(bodies, folder / "bodies")
                seen = wrk.drive(
                    server.predict_url, file, connections=CONNECTIONS, seconds=options.seconds, settle=server.settle
                )
                print(f"{mix} {count} {kind}: {seen.requests_per_s:.1f} requests/s", flush=True)
                yield {"where": "http", "kind": kind, "models": count, "mix": mix, "round": number, **asdict(seen)}


def _in_process(options: Namespace, data_dir: Path, engine: str) -> Iterator[Row]:
    with inprocess.opened(options.server, data_dir, engine=engine) as process:
        keys = [process.adapter_key(f"lora-{number}") for number in range(max(options.adapters))]
        for mix in options.mixes:
            plain = batches_by_length(process.encode(mixes.texts(mix, options.data)))
            texts = sum(len(batch.inputs) for batch in plain)
            arms = {0: plain} | {count: _spread_over(plain, keys[:count]) for count in options.adapters}
            for batches in arms.values():
                process.run(batches)  # the first run of a shape does not count
            for number in range(options.repeats):
                for count, batches in arms.items():
                    _, seconds = process.run(batches)
                    print(f"{mix} {count} adapters in process: {texts / seconds:.1f} texts/s", flush=True)
                    yield {
                        "where": "process",
                        "kind": "lora",
                        "models": count,
                        "mix": mix,
                        "round": number,
                        "engine": engine,
                        "texts_per_s": texts / seconds,
                    }


def _spread_over(batches: Sequence[EngineBatch], keys: Sequence[str]) -> list[EngineBatch]:
    """Each key to the same number of rows (±1), in a random order."""
    rows = sum(len(batch.inputs) for batch in batches)
    drawn = [keys[row % len(keys)] for row in range(rows)]
    random.Random(0).shuffle(drawn)
    left = iter(drawn)
    return [EngineBatch(batch.inputs, [next(left) for _ in batch.inputs]) for batch in batches]


def _publish(data_dir: Path, counts: dict[VersionKind, int]) -> None:
    publisher = Publisher(data_dir)
    for kind, count in counts.items():
        for number in range(count):
            publisher.publish(f"{kind}-{number}", kind, seed=number)
    publisher.close()
    print(f"registered {counts}, adapters of rank {RANK}", flush=True)


def _memory(server: Server, kind: str) -> float:
    """What one model of this kind adds, by the service's own metric; the median over all."""
    values = Service(server.base_url).metric("model_memory_bytes")
    return statistics.median(value for labels, value in values.items() if f'model="{kind}-' in labels)
