"""Latency while versions are loaded and swapped, against the same server left alone, at the same constant rate.

Every swap moves `champion` to a version that the process has not loaded yet, so it is read, checked, warmed and then
takes over. Rounds with swaps and without go in turn. A request sent after a promotion was answered must meet the new
version; those that meet an older one are counted as stale. Requests due from a promotion's PUT to 2 s after its answer
are also looked at alone, and at the end of a round a rollback is timed.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from benchmarks import mixes, rate
from benchmarks.arguments import add_mixes, add_server, add_shared
from benchmarks.figures import percentile
from benchmarks.open_loop import peak
from benchmarks.servers import OPEN_ADMISSION, Server, started_with_data
from benchmarks.service import write_results
from benchmarks.versions import Publisher
from model_registry.manifest import VersionKind

KINDS: tuple[VersionKind, ...] = ("head", "lora", "full")
RAMP_S = 2.0
AFTER_S = 2.0  # how long after a promotion's answer requests count as near it
_TIMEOUT_S = 30.0


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="hot-load", seconds=20)
    add_server(parser)
    add_mixes(parser, default=("long",))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--every", type=float, default=2.0, help="seconds from one swap to the next")
    parser.add_argument(
        "--full-every", type=float, default=10.0, help="the same for versions with weights of their own"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of the capacity that is offered")


def run(options: Namespace) -> None:
    every_s = {kind: options.full_every if kind == "full" else options.every for kind in options.kinds}
    swaps = {kind: max(1, int(options.seconds / every_s[kind])) for kind in options.kinds}
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        data_dir = Path(folder, "data")
        rounds = options.repeats * len(options.mixes)
        _publish(data_dir, {kind: 1 + rounds * swaps[kind] for kind in options.kinds})
        with started_with_data(options.server, data_dir, settings=OPEN_ADMISSION) as server:
            about = server.describe(Path())
            rows = [
                {"kind": kind, "mix": mix, **row}
                for kind in options.kinds
                for mix in options.mixes
                for row in _rounds(server, kind, mix, options, swaps=swaps[kind], every_s=every_s[kind])
            ]
    write_results(options.name, {"benchmark": "hot_load", "servers": {options.server.label: about}, "rows": rows})


def _rounds(
    server: Server, kind: str, mix: str, options: Namespace, *, swaps: int, every_s: float
) -> Iterator[dict[str, object]]:
    """Without swaps and with, in turn. The model has the name of its kind."""
    bodies = mixes.predict_bodies(mixes.texts(mix, options.data), [kind])
    offered = options.share * peak(server, server.predict_url, bodies, options.seconds)
    for number in range(options.repeats):
        for count in (0, swaps):
            row = _round(server, bodies, offered, options.seconds, _Swaps(server, kind, count, every_s))
            print(kind, mix, row, flush=True)
            yield {"round": number, **row}


def stale(samples: Sequence[rate.Sample], promotions: Sequence[tuple[float, int]]) -> int:
    """Answers by a version older than the one whose promotion was answered before the request was sent.

    `promotions` holds the time of each answer, as `Sample.sent` counts, and the version; both rise.
    """
    count = 0
    for sample in samples:
        current = max((version for when, version in promotions if when < sample.sent), default=0)
        count += sample.version is not None and sample.version < current
    return count


def near(samples: Sequence[rate.Sample], windows: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Latencies of the answered requests that were due in one of `windows`, given from start to end."""
    good = [
        sample.latency_s * 1e3
        for sample in samples
        if sample.outcome == "200" and any(start <= sample.due < end for start, end in windows)
    ]
    return {f"near_p{share * 100:.0f}_ms": percentile(good, share) for share in (0.5, 0.99)}


@dataclass(slots=True)
class _Swaps:
    """Moves the champion `count` times, from where it stands, one version at a time; then back and forth once."""

    server: Server
    name: str
    count: int
    every_s: float
    promotions: list[tuple[float, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    windows: list[tuple[float, float]] = field(default_factory=list)
    rollback_s: float | None = None

    async def __call__(self, started: float) -> None:
        async with httpx.AsyncClient(base_url=self.server.base_url, timeout=_TIMEOUT_S) as client:
            model = (await client.get(f"/models/{self.name}")).raise_for_status().json()
            version = int(model["aliases"]["champion"])
            for number in range(self.count):
                await asyncio.sleep(max(0.0, started + RAMP_S + number * self.every_s - time.monotonic()))
                before = time.monotonic()
                await self._promote(client, version)
                version += 1
                answered = time.monotonic()
                self.seconds.append(answered - before)
                self.promotions.append((answered - started, version))
                self.windows.append((before - started, answered - started + AFTER_S))
            if self.count:
                await asyncio.sleep(AFTER_S)
                before = time.monotonic()
                response = await client.post(f"/models/{self.name}/rollback", json={"reason": "benchmark"})
                self.rollback_s = time.monotonic() - before
                if response.raise_for_status().status_code != 200:
                    raise SystemExit(f"a rollback waits: {response.text}")
                await self._promote(client, version - 1)

    async def _promote(self, client: httpx.AsyncClient, version: int) -> None:
        """From `version` to the next."""
        body = {"version": version + 1, "expected_version": version, "reason": "benchmark"}
        (await client.put(f"/models/{self.name}/aliases/champion", json=body)).raise_for_status()


def _round(server: Server, bodies: Sequence[bytes], offered: float, seconds: float, swaps: _Swaps) -> dict[str, object]:
    server.settle()
    samples = rate.drive(
        server.predict_url, bodies, rate=offered, seconds=RAMP_S + seconds, timeout_s=_TIMEOUT_S, alongside=swaps
    )
    seen = rate.summarise(samples, RAMP_S, RAMP_S + seconds)
    ends = [end for _, end in swaps.windows]  # the rollback comes after the last
    return {
        "swaps": swaps.count,
        "swap_s": swaps.seconds,
        "failed": sum(sample.outcome != "200" for sample in samples),
        "stale": stale([sample for sample in samples if sample.sent < max(ends, default=0.0)], swaps.promotions),
        "rollback_s": swaps.rollback_s,
        **near(samples, swaps.windows),
        **asdict(seen),
    }


def _publish(data_dir: Path, versions: dict[VersionKind, int]) -> None:
    publisher = Publisher(data_dir)
    for kind, count in versions.items():
        for seed in range(count):
            publisher.publish(kind, kind, seed=seed)
    publisher.close()
