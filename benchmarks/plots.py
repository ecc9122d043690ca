"""Draws the results into docs/images/ as SVG, the same bytes for the same figures. Needs the extra `bench`."""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT
from benchmarks.report import load

FOLDER = ROOT / "docs" / "images"
_WIDTH, _HEIGHT = 8.0, 3.4


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=FOLDER)


def run(options: Namespace) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "polyhead",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    results = load()
    for name, draw in _PLOTS.items():
        if name in results:
            target = options.folder / f"{name}.svg"
            figure = draw(results[name])
            figure.savefig(target, metadata={"Date": None})
            print(f"drew {target}", flush=True)


def closed_loop(result: Mapping[str, Any]) -> Any:
    """Texts per second of one text a request, at the most connections measured."""
    rows = [row for row in result["rows"] if row["texts"] == 1]
    connections = max(row["connections"] for row in rows)
    rows = [row for row in rows if row["connections"] == connections]
    return _bars(rows, "texts_per_s", title=f"texts, {connections} connections", label="texts/s", fmt="%.0f")


def open_loop(result: Mapping[str, Any]) -> Any:
    """p99 against the rate offered."""
    rows = [row for row in result["rows"] if row["p99_ms"] is not None]
    figure, axes = _panels(list(dict.fromkeys(row["mix"] for row in rows)))
    for axis, mix in zip(axes, dict.fromkeys(row["mix"] for row in rows), strict=True):
        _lines(axis, [row for row in rows if row["mix"] == mix], "share", "p99_ms")
        axis.set(title=f"{mix} texts", xlabel="rate offered ÷ best peer's most", ylabel="p99, ms")
        _logarithmic(axis)
    return figure


def length_cost(result: Mapping[str, Any]) -> Any:
    """Latency alone and throughput with many, against the length."""
    rows = result["rows"]
    figure, axes = _panels(sorted({row["connections"] for row in rows}))
    for axis, connections in zip(axes, sorted({row["connections"] for row in rows}), strict=True):
        value, label = ("p50_ms", "p50, ms") if connections == 1 else ("requests_per_s", "requests/s")
        _lines(axis, [row for row in rows if row["connections"] == connections], "tokens", value)
        axis.set(title=f"{connections} connection{'s' * (connections > 1)}", xlabel="tokens a text", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["tokens"] for row in rows}))
        _logarithmic(axis)
    return figure


def overload(result: Mapping[str, Any]) -> Any:
    """Goodput at twice the capacity as a share of the peak."""
    rows = [{**row, "share": row["goodput"] / row["peak"]} for row in result["rows"]]
    return _bars(
        rows, "share", title="texts at twice the capacity", label="answered in time, as a share of the peak", fmt="%.2f"
    )


_PLOTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "closed-loop": closed_loop,
    "open-loop": open_loop,
    "lengths": length_cost,
    "overload": overload,
}


def _logarithmic(axis: Any) -> None:
    """A logarithmic scale whose ticks are plain numbers, and the legend."""
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter("{x:,g}")
        scale.set_minor_formatter("")
    axis.legend()


def _panels(names: list[Any]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, len(names), squeeze=False)[0])


def _bars(rows: list[Any], value: str, *, title: str, label: str, fmt: str) -> Any:
    """A panel for each mix, in it a bar for each server: the median of its rounds."""
    mixes = _by(rows, "mix", "server", value)
    figure, axes = _panels(list(mixes))
    for axis, (mix, servers) in zip(axes, mixes.items(), strict=True):
        bars = axis.barh(list(servers), [statistics.median(values) for values in servers.values()], color="tab:blue")
        axis.bar_label(bars, fmt=fmt, padding=3)
        axis.invert_yaxis()
        axis.set(title=f"{mix} {title}", xlabel=label)
    return figure


def _lines(axis: Any, rows: list[Mapping[str, Any]], x: str, y: str) -> None:
    """A line for each server through the medians of its rounds."""
    for server, points in _by(rows, "server", x, y).items():
        axis.plot(list(points), [statistics.median(values) for values in points.values()], marker="o", label=server)


def _by(rows: list[Any], outer: str, inner: str, value: str) -> dict[Any, dict[Any, list[float]]]:
    found: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        found.setdefault(row[outer], {}).setdefault(row[inner], []).append(row[value])
    return found
