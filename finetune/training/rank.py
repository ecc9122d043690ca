"""Another process of a training: `python -m finetune.training.rank RANK`.

The job's own process starts it and orders each step on its standard input (`finetune.training.parallel`). On standard
output it says that it has started, and what went wrong with it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from typing import IO

import numpy as np
from safetensors.numpy import load_file

from finetune.jobs.failures import RunError
from finetune.jobs.link import SilentLink
from finetune.training.batches import FeatureRows
from finetune.training.methods import METHODS
from finetune.training.parallel import Assignment, as_rank
from finetune.training.run_context import Rows, Run
from modeling.backbone import Backbone
from modeling.child_process import die_with_parent, private_stdout
from modeling.inputs import open_preprocessor


def main(rank: int) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    sink = private_stdout()
    print("started", file=sink, flush=True)
    try:
        for line in sys.stdin:
            message = json.loads(line)
            if message.pop("kind") == "train":
                _train(rank, Assignment.model_validate(message))
    except Exception as error:
        print(" ".join(f"failed ({type(error).__name__}: {error})".split())[:500], file=sink, flush=True)
        raise  # the traceback goes to the job's log


def _train(rank: int, assignment: Assignment) -> None:
    # A `RunError` is that of all processes, and rank 0 reports it.
    with as_rank(rank, assignment.plan, assignment.group_file), contextlib.suppress(RunError):
        METHODS[assignment.method](_run(assignment))


def _run(assignment: Assignment) -> Run:
    """The run as far as a method needs it for its model: the rows are tokens already, and only those to train on."""
    arrays = load_file(assignment.rows_file)
    rows = {name.removeprefix("rows."): array for name, array in arrays.items() if name.startswith("rows.")}
    backbone = Backbone.open(assignment.backbone_folder)
    none = Rows([], np.empty(0, arrays["labels"].dtype), np.empty(0, np.int64))
    return Run(
        train=Rows([], arrays["labels"], arrays["numbers"]),
        validation=none,
        test=none,
        labels=assignment.labels,
        plan=assignment.plan,
        backbone=backbone,
        link=SilentLink(),
        work_dir=assignment.work_dir,
        earlier_work_dirs=assignment.earlier_work_dirs,
        orders=_orders(sys.stdin),
        tokens=FeatureRows(rows, arrays["starts"], open_preprocessor(backbone).collate),
    )


def _orders(source: IO[str]) -> Iterator[float]:
    """The factors on the learning rates of the steps to take, until the training ends."""
    for line in source:
        message = json.loads(line)
        if message["kind"] == "end":
            return
        yield message["factor"]


if __name__ == "__main__":
    main(int(sys.argv[1]))
