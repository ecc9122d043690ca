"""Requests per second of pooled models beside a model of entities that is loaded and idle, and with a share of requests
for it, against a server without one."""

from __future__ import annotations

import contextlib
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks import mixes, wrk
from benchmarks.arguments import add_mixes, add_server, add_shared
from benchmarks.open_loop import CONNECTIONS
from benchmarks.servers import OPEN_ADMISSION, Server, started_with_data
from benchmarks.service import write_results
from benchmarks.versions import Publisher

_POOLED, _ENTITIES = "pooled", "entities"
_PARTS = 10


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="mixed-tasks", seconds=10)
    add_server(parser)
    add_mixes(parser, default=("short", "long"))
    parser.add_argument("--parts", type=int, default=1, help="tenths of the requests that ask for entities")


def run(options: Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        servers = {}
        for arm in ("without", "with"):
            data_dir = folder / arm
            publisher = Publisher(data_dir)
            publisher.publish(_POOLED, "head", seed=1)
            if arm == "with":
                publisher.publish(_ENTITIES, "head", seed=2, task="token-classification")
            publisher.close()
            servers[arm] = stack.enter_context(started_with_data(options.server, data_dir, settings=OPEN_ADMISSION))
            servers[arm].process.pause()
        rows = list(_rounds(servers["without"], servers["with"], options, folder))
        with servers["with"].process.running():
            about = servers["with"].describe(Path())
        for server in servers.values():
            server.process.resume()
    write_results(options.name, {"benchmark": "mixed_tasks", "servers": {options.server.label: about}, "rows": rows})


def _rounds(without: Server, beside: Server, options: Namespace, folder: Path) -> Iterator[dict[str, object]]:
    mixed = [_ENTITIES] * options.parts + [_POOLED] * (_PARTS - options.parts)
    arms = (("alone", without, [_POOLED]), ("idle beside", beside, [_POOLED]), ("mixed", beside, mixed))
    for mix in options.mixes:
        texts = mixes.texts(mix, options.data)
        for number in range(options.repeats):
            for arm, server, models in arms:
                file = mixes.write_bodies(mixes.predict_bodies(texts, models), folder / "bodies")
                with server.process.running():
                    seen = wrk.drive(
                        server.predict_url, file, connections=CONNECTIONS, seconds=options.seconds, settle=server.settle
                    )
                print(f"{mix} {arm}: {seen.requests_per_s:.1f} requests/s", flush=True)
                yield {"mix": mix, "round": number, "arm": arm, "requests_per_s": seen.requests_per_s}
