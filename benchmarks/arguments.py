"""Options that several measurements share."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from benchmarks.mixes import MIXES
from benchmarks.peers import PEERS
from benchmarks.servers import OURS, parse_spec


def add_shared(parser: ArgumentParser, *, name: str, seconds: float | None = None) -> None:
    parser.add_argument("--name", default=name, help="of the file in benchmarks/results/")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/benchmarks"),
        help="folder of fetched texts; what is there already is used, and short.csv or long.jsonl in place of a mix",
    )
    parser.add_argument("--peers", type=Path, default=Path("data/peers"), help="folder that `setup` made")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; tables show the median and the extremes")
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="length of one measurement")


def add_servers(parser: ArgumentParser, *, with_peers: bool = True) -> None:
    peers = list(PEERS) if with_peers else []
    parser.add_argument(
        "--servers",
        nargs="+",
        type=parse_spec,
        default=[parse_spec(name) for name in (OURS, *peers)],
        help=f"{OURS}[@CHECKOUT][:SETTING=VALUE,…] and names of peers; default: {' '.join((OURS, *peers))}",
    )


def add_server(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--server", type=parse_spec, default=parse_spec(OURS), help=f"{OURS}[@CHECKOUT][:SETTING=VALUE,…]"
    )


def add_mixes(parser: ArgumentParser, *, default: tuple[str, ...] = MIXES) -> None:
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(default))
