"""Closed loop: wrk keeps a number of connections busy, each with its next request as soon as it has its answer."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = Path(__file__).with_name("wrk.lua")
_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """What wrk saw. Every request was answered with 2xx.

    `requests_per_s` is connections / mean latency (Little's law): what was under way at the end counts neither as a
    request nor as time. A plain count is coarse where a batch answers all connections at once: 10 s of batches of a
    second are 9 or 10 of them. `counted_per_s` is that count.
    """

    requests: int
    requests_per_s: float
    counted_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


def drive(
    url: str, bodies: Path, *, connections: int, seconds: float, settle: Callable[[], None], warm_up_s: float = 2.0
) -> ClosedLoop:
    """Exits where any request fails: a server that refuses quickly is not fast.

    `settle` returns once the server has done with what the warm-up left under way.
    """
    _run(url, bodies, connections, warm_up_s)
    settle()
    output = _run(url, bodies, connections, seconds)
    while '"requests": 0,' in output and seconds < _TIMEOUT_S:  # one batch took longer than the run
        seconds *= 2
        settle()
        output = _run(url, bodies, connections, seconds)
    return parse(output, connections=connections, url=url)


def parse(output: str, *, connections: int, url: str = "") -> ClosedLoop:
    line = next((line for line in output.splitlines() if line.startswith("{")), None)
    if line is None:
        raise SystemExit(f"wrk printed no figures for {url}:\n{output[-2000:]}")
    figures = json.loads(line)
    if figures["refused"] or figures["broken"] or not figures["requests"]:
        raise SystemExit(
            f"{url}: of {figures['requests']} requests {figures['refused']} were not answered with 2xx, "
            f"{figures['broken']} failed or timed out"
        )
    return ClosedLoop(
        figures["requests"],
        connections / figures["mean_us"] * 1e6,
        figures["requests"] / figures["duration_us"] * 1e6,
        *(figures[f"{name}_us"] / 1e3 for name in ("p50", "p95", "p99", "max")),
    )


def _run(url: str, bodies: Path, connections: int, seconds: float) -> str:
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; on Debian: apt-get install wrk")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={_TIMEOUT_S}s"]
    done = subprocess.run(
        [*command, "-s", str(_SCRIPT), url, "--", str(bodies)], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr
