"""Training methods: one file each, each a function `train(run) -> Candidate`."""

from __future__ import annotations

from collections.abc import Callable

from finetune.methods import baseline, full, linear_probe, lora
from finetune.methods.candidate import Candidate
from finetune.run import Run

METHODS: dict[str, Callable[[Run], Candidate]] = {
    "baseline": baseline.train,
    "linear_probe": linear_probe.train,
    "lora": lora.train,
    "full": full.train,
}
