"""Training methods: one file each, each a function `train(run) -> Candidate`.

Each is imported when it is first called: a probe on vectors that are known already needs neither torch nor
transformers, whose imports take longer than all the rest of its job.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from finetune.training.methods.candidate import Candidate
from finetune.training.run_context import Run

Method = Callable[[Run], Candidate]


def _late(module: str, function: str = "train") -> Method:
    def train(run: Run) -> Candidate:
        found: Method = getattr(importlib.import_module(f"finetune.training.methods.{module}"), function)
        return found(run)

    return train


METHODS: dict[str, Method] = {
    "baseline": _late("baseline"),
    "linear_probe": _late("linear_probe"),
    "setfit": _late("setfit"),
    "prompt_tuning": _late("added_modules", "train_prompt"),
    "bottleneck": _late("added_modules", "train_bottleneck"),
    "lora": _late("lora"),
    "qlora": _late("lora", "train_qlora"),
    "full": _late("full"),
}
