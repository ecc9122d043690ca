"""Quality through REST: upload, fine-tune, predict every test row on the served version, compare with the report."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.service import Service, running, write_results


def measure(
    name: str, train: Path, test: Path | None, *, methods: list[str], seeds: list[int], metric: str = "accuracy"
) -> dict[str, Any]:
    """One row per method and seed; the means are what the documentation quotes."""
    with running() as service:
        datasets = {"dataset": service.upload(train)}
        if test is not None:
            datasets["test_dataset"] = service.upload(test)
        rows = [
            _one(service, f"{name}-{method.replace('_', '-')}-{seed}", datasets, test, method, seed, metric)
            for method in methods
            for seed in seeds
        ]
    means = {
        method: round(statistics.mean(row["report"] for row in rows if row["method"] == method), 4)
        for method in methods
    }
    document = {"dataset": name, "metric": metric, "mean": means, "runs": rows}
    write_results(f"quality-{name}", document)
    return document


def _one(
    service: Service, model: str, datasets: dict[str, str], test: Path | None, method: str, seed: int, metric: str
) -> dict[str, Any]:
    started = time.monotonic()
    job = service.finetune(
        **datasets, register_as=model, hyperparameters={"method": method, "seed": seed, "metric": metric}
    )
    seconds = time.monotonic() - started
    service.answers(model, ["first"])
    first_answer = time.time() - job["finished_at"]
    evaluation = service.evaluation(job["id"])
    row: dict[str, Any] = {
        "method": method, "seed": seed, "chosen": evaluation["chosen"], "seconds": round(seconds, 1),
        "first_answer_s": round(first_answer, 2),
        "report": evaluation["test"]["accuracy"],
        "validation": {item["method"]: item["validation"]["accuracy"] for item in evaluation["methods"]},
    }  # fmt: skip
    if test is not None:
        rows = [json.loads(line) for line in test.read_text().splitlines()]
        answers = service.answers(model, [item["text"] for item in rows])
        right = sum(answer == item["label"] for answer, item in zip(answers, rows, strict=True))
        row["served"] = right / len(rows)
        if abs(row["served"] - row["report"]) > 1e-9:
            raise SystemExit(f"{model}: served answers score {row['served']}, the report says {row['report']}")
    print(json.dumps(row), flush=True)
    return row
