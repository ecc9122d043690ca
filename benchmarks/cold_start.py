"""From the start of the process to the first answer, and to the last change of engine.

Without caches our data folder is empty: the backbone is copied in, graphs are exported, engines are compared. With
caches it is the folder that the start before has left. The peers keep nothing. Files come from the page cache.
"""

from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.arguments import add_servers, add_shared
from benchmarks.servers import OURS, Server, Spec, start, wait_for_answer
from benchmarks.service import write_results

_QUIET_S, _STEP_S, _IDLE_SHARE = 5.0, 0.25, 0.25


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="cold-start")
    add_servers(parser)


def run(options: Namespace) -> None:
    rows = []
    about: dict[str, Any] = {}
    for number in range(options.repeats):
        for spec in options.servers:
            with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
                for caches in ("without", "with") if spec.kind == OURS else ("none",):
                    row, about[spec.label] = _start(spec, Path(folder), options.peers)
                    rows.append({"server": spec.label, "caches": caches, "round": number, **row})
                    print(rows[-1], flush=True)
    write_results(options.name, {"benchmark": "cold_start", "servers": about, "rows": rows})


def _start(spec: Spec, folder: Path, environments: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    started = time.monotonic()
    server = start(spec, folder, environments)
    try:
        wait_for_answer(server)
        row: dict[str, Any] = {"first_answer_s": time.monotonic() - started}
        if server.is_ours:
            row |= _settle(server, started)
        return row, server.describe(environments)
    finally:
        server.process.stop()


def _settle(server: Server, started: float) -> dict[str, Any]:
    """Which engine answered first, which serves in the end, and since when, once nothing goes on in the background."""
    first = engine = server.engine
    since = busy = time.monotonic()
    used = server.process.cpu_seconds()
    while time.monotonic() - busy < _QUIET_S:
        time.sleep(_STEP_S)
        before, used = used, server.process.cpu_seconds()
        if not 0 <= used - before < _IDLE_SHARE * _STEP_S:
            busy = time.monotonic()
        if server.engine != engine:
            engine, since = server.engine, time.monotonic()
    return {"first_engine": first, "engine": engine, "engine_s": since - started}
