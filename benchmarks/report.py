"""Puts the results into docs/benchmarks.md, so that no figure there is typed by hand.

A block of the page is the table of one file in benchmarks/results/:

    <!-- figures: closed-loop -->
    …
    <!-- /figures -->

A block whose file is missing stays as it is. A plot of the same name in docs/images/ stands below the table.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping
from typing import Any

from benchmarks.processes import ROOT
from benchmarks.service import RESULTS
from benchmarks.tables import TABLES, claims

PAGE = ROOT / "docs" / "benchmarks.md"
CLAIMS = "claims"  # the block that draws on all files
_BLOCK = re.compile(r"(<!-- figures: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is not up to date")


def run(options: Namespace) -> None:
    page = PAGE.read_text()
    rendered = render(page, load(), plots())
    if not options.check:
        PAGE.write_text(rendered)
    elif rendered != page:
        raise SystemExit("docs/benchmarks.md is not what benchmarks/results/ say; run python -m benchmarks report")


def load() -> dict[str, dict[str, Any]]:
    """Every result by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def plots() -> set[str]:
    return {path.stem for path in (PAGE.parent / "images").glob("*.svg")}


def render(page: str, results: Mapping[str, Mapping[str, Any]], plots: Collection[str] = ()) -> str:
    """The page with every block made anew whose result is there."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name == CLAIMS and results:
            body = claims(results)
        elif name in results:
            plot = f"![{name}](images/{name}.svg)\n\n" if name in plots else ""
            body = f"{TABLES[results[name]['benchmark']](results[name])}\n{plot}{about(results[name])}\n"
        else:
            return match[0]
        return f"{match[1]}{body}{match[3]}"

    return _BLOCK.sub(block, page)


def about(result: Mapping[str, Any]) -> str:
    """When, where and with what a result was measured."""
    machine, versions = result["machine"], result["versions"]
    gemm = machine["gemm_gflops"]
    return (
        f"{result['date']}, commit {result['revision']}. {machine['cpu']}, {machine['cores']} cores "
        f"({', '.join(machine['flags'])}), {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"Python {machine['python']}, {', '.join(f'{name} {version}' for name, version in versions.items())}. "
        f"Matrix products: {gemm['float32']:,} GFLOP/s in fp32, {gemm['bfloat16']:,} in bf16."
    )
