"""Training methods: one file each, each a function `train(run) -> Candidate`."""

from __future__ import annotations

from collections.abc import Callable

from finetune.methods import baseline, bottleneck, full, ia3, linear_probe, lora, prompt_tuning, setfit
from finetune.methods.candidate import Candidate
from finetune.run import Run

METHODS: dict[str, Callable[[Run], Candidate]] = {
    "baseline": baseline.train,
    "linear_probe": linear_probe.train,
    "setfit": setfit.train,
    "ia3": ia3.train,
    "prompt_tuning": prompt_tuning.train,
    "bottleneck": bottleneck.train,
    "lora": lora.train,
    "qlora": lora.train_qlora,
    "full": full.train,
}
