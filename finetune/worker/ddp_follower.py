"""A process that computes its share of each step's gradient: `python -m finetune.worker.ddp_follower`.

The job's own process starts it and speaks to it in JSON over its standard pipes (`finetune.training.parallel`).
"""

from __future__ import annotations

import signal
import sys

import numpy as np
import torch
from safetensors.numpy import load_file

from finetune.jobs.link import SilentLink
from finetune.jobs.plan import TrainingPlan
from finetune.training.batches import FeatureRows
from finetune.training.methods import METHODS
from finetune.training.parallel import Assignment, Follower, threads_of
from finetune.training.run_context import Rows, Run
from modeling.backbone import Backbone
from modeling.child_process import die_with_parent, private_stdout
from modeling.inputs import open_preprocessor


def main() -> int:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    follower = Follower(sys.stdin, private_stdout())
    try:
        for assignment in follower.assignments():
            _prepare(assignment.plan)
            METHODS[assignment.method](_run(assignment, follower))
    except Exception as error:
        follower.fail(error)
        raise  # the traceback goes to the job's log
    return 0


def _prepare(plan: TrainingPlan) -> None:
    torch.set_num_threads(threads_of(plan))


def _run(assignment: Assignment, follower: Follower) -> Run:
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
        work_dir=assignment.rows_file.parent,
        follower=follower,
        tokens=FeatureRows(rows, arrays["starts"], open_preprocessor(backbone).collate),
    )


if __name__ == "__main__":
    sys.exit(main())
