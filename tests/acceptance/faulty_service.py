"""`python -m service` with an engine that misbehaves on order: the file named by FAULTS says how, from run to run.

`hang`: a run does not end while the file says so. `raise`, `nan`: what a marked row brings upon its batch, or upon
itself. `fail`: every run fails. `nonsense`: no run gives a number. `slow`: each run takes 50 ms longer.

Files beside the other say what happened: `.hanging` that a run hangs, `.crowded` that a second thread was inside of an
engine, where only one may be.
"""

from __future__ import annotations

import os
import runpy
import threading
import time
from pathlib import Path

import numpy as np

from modeling.engines.protocol import EngineBatch, EngineOutputs
from modeling.engines.torch import TorchEngine
from modeling.errors import EngineFailed
from modeling.inputs import Features

_FAULTS = Path(os.environ["FAULTS"])
_compute = TorchEngine.run
_inside = threading.Semaphore(1)


def is_marked(row: Features) -> bool:
    """One word over and over."""
    return row.cost >= 6 and len(set(row.arrays["input_ids"].tolist())) <= 3


def run(engine: TorchEngine, batch: EngineBatch) -> EngineOutputs:
    is_alone = _inside.acquire(blocking=False)
    if not is_alone:
        _FAULTS.with_suffix(".crowded").touch()
    try:
        return run_on_order(engine, batch, _FAULTS.read_text())
    finally:
        if is_alone:
            _inside.release()


def run_on_order(engine: TorchEngine, batch: EngineBatch, fault: str) -> EngineOutputs:
    if fault == "hang":
        _FAULTS.with_suffix(".hanging").touch()
        while _FAULTS.read_text() == "hang":
            time.sleep(0.02)
    if fault == "slow":
        time.sleep(0.05)
    marked = [number for number, row in enumerate(batch.inputs) if is_marked(row)]
    if fault == "fail" or (fault == "raise" and marked):
        raise EngineFailed("on order")
    outputs = _compute(engine, batch)
    if fault == "nan":
        outputs.pooled[marked] = np.nan
    if fault == "nonsense":
        outputs.pooled[:] = np.nan
    return outputs


if __name__ == "__main__":
    TorchEngine.run = run  # type: ignore[assignment, method-assign]
    runpy.run_module("service", run_name="__main__", alter_sys=True)
