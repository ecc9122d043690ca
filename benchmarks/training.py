"""Rows per second of a LoRA fine-tune against transformers' Trainer, each run in a process of its own, in turns.

`trainer` is written as tutorials write it: every text padded to 256 tokens, fp32. `trainer-bf16` pads to the longest of
a batch and has bf16 and length grouping. All train LoRA with r = 16 on all linear layers of the same backbone, one
epoch of the same rows in batches of 32 at the same learning rates, and answer the same test rows.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks import datasets
from benchmarks.processes import ROOT
from benchmarks.service import write_results

RUNS = ("polyhead", "trainer", "trainer-bf16")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--name", default="training", help="of the file in benchmarks/results/")
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"), help="folder with R8, or for fetching it")
    parser.add_argument("--rows", type=int, default=1500, help="training rows, drawn by seed")
    parser.add_argument("--test-rows", type=int, help="test rows at most; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, each with a seed of its own")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--method", choices=("lora", "full"), default="lora", help="full: polyhead alone")


def run(options: Namespace) -> None:
    train, test = (datasets.r8_rows(options.data, side) for side in ("train", "test"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        for number in range(options.repeats):
            task = _task(train, test[: options.test_rows], rows=options.rows, seed=42 + number, method=options.method)
            file = Path(folder, f"{number}.json")
            file.write_text(json.dumps(task))
            for name in options.runs:
                row = {"run": name, "round": number, **_measure(name, file)}
                print(json.dumps(row), flush=True)
                rows.append(row)
    write_results(
        options.name,
        {"benchmark": "training", "method": options.method, "training_rows": options.rows, "rows": rows},
    )


def _task(
    train: list[dict[str, Any]], test: list[dict[str, Any]], *, rows: int, seed: int, method: str
) -> dict[str, Any]:
    """What a run gets. The validation rows are for polyhead, which evaluates once an epoch, outside of the figure."""
    shuffled = random.Random(seed).sample(train, len(train))
    labels = {row["label"] for row in shuffled[:rows]}
    known = {
        side: [row for row in some if row["label"] in labels] for side, some in (("train", shuffled), ("test", test))
    }
    return {
        "seed": seed,
        "method": method,
        "train": shuffled[:rows],
        "validation": known["train"][-200:],
        "test": known["test"],
    }


def _measure(name: str, file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.training_run", name, str(file)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
