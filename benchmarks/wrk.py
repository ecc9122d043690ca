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
_LONGEST_S = 80.0
_SPANNED = 0.8


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """What wrk saw. Every request was answered with 2xx.

    `requests_per_s` is the slope of a line through the answers, their number against their time. A plain count,
    `counted_per_s`, is coarse where one batch answers all connections at once: ten seconds of batches of 1.1 s hold
    nine of them, whatever had been done of the tenth.
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

    `settle` returns once the server has done with what a run left under way. A run in which there was no answer for
    a fifth of the time holds too few batches and is repeated at twice the length.
    """
    _run(url, bodies, connections, warm_up_s)
    while True:
        settle()
        figures = read(_run(url, bodies, connections, seconds), url)
        if spans(figures) or seconds >= _LONGEST_S:
            return as_closed_loop(figures)
        seconds *= 2


def read(output: str, url: str = "") -> dict[str, float]:
    """wrk.lua's line among wrk's own."""
    line = next((line for line in output.splitlines() if line.startswith("{")), None)
    if line is None:
        raise SystemExit(f"wrk printed no figures for {url}:\n{output[-2000:]}")
    figures: dict[str, float] = json.loads(line)
    if figures["refused"] or figures["broken"]:
        raise SystemExit(
            f"{url}: of {figures['requests']} requests {figures['refused']} were not answered with 2xx, "
            f"{figures['broken']} failed or timed out"
        )
    return figures


def spans(figures: dict[str, float]) -> bool:
    """Whether answers came over most of the run, from the first to the last."""
    return figures["t_last"] - figures["t_first"] >= _SPANNED * figures["duration_us"] / 1e6


def as_closed_loop(figures: dict[str, float]) -> ClosedLoop:
    if not figures["requests"]:
        raise SystemExit(f"not one answer in {figures['duration_us'] / 1e6:.0f} s")
    counted = figures["requests"] / figures["duration_us"] * 1e6
    return ClosedLoop(
        int(figures["requests"]),
        slope(figures) if spans(figures) else counted,
        counted,
        *(figures[f"{name}_us"] / 1e3 for name in ("p50", "p95", "p99", "max")),
    )


def slope(figures: dict[str, float]) -> float:
    """Least squares of the answers' numbers 1 … n over their times. Bursts of equal size lie on a line exactly."""
    n, sum_t = figures["n"], figures["sum_t"]
    sum_i = n * (n + 1) / 2
    return (n * figures["sum_ti"] - sum_t * sum_i) / (n * figures["sum_tt"] - sum_t**2)


def _run(url: str, bodies: Path, connections: int, seconds: float) -> str:
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; on Debian: apt-get install wrk")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={_TIMEOUT_S}s"]
    done = subprocess.run(
        [*command, "-s", str(_SCRIPT), url, "--", str(bodies)], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr
