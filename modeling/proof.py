"""Whether what was taken of a checkpoint computes what transformers computes with the files as they came.

The reference reads every key of the configuration, in fp32, one row at a time and without padding; what was taken runs
as it will be served, its rows in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling.backbone import Backbone
from modeling.encoder import load_encoder
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.errors import CheckpointRefused, GoldenRowsDiffer
from modeling.heads import TaskHead
from modeling.inputs import Example, Features, open_preprocessor, single
from modeling.networks import NETWORKS
from modeling.weights import FloatArray

_NEAR = 1e-4


def check_states(folder: Path, taken: Backbone, probes: Sequence[Example]) -> None:
    """Compare the states of every position. Raises `GoldenRowsDiffer`, `CheckpointRefused` if one is not finite."""
    rows = single(open_preprocessor(taken).encode(probes))
    try:
        wanted = _reference_states(folder, taken, rows)
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointRefused(
            f"{folder.name}: transformers cannot read a plain text with it ({str(error)[:200]}); check the numbers in "
            "its config.json"
        ) from error
    given = TorchEngine(taken).run(EngineBatch(rows, states=range(len(rows)))).states
    for place, states in enumerate(wanted):
        if not np.isfinite(states).all():
            raise CheckpointRefused(
                f"{folder.name}: its states of a plain text are not finite; check its weights and the numbers in its "
                "config.json"
            )
        if not _is_near(given[place], states):
            raise GoldenRowsDiffer("the encoder gives other states than transformers with the checkpoint's own files")


@torch.inference_mode()
def _reference_states(folder: Path, taken: Backbone, rows: Sequence[Features]) -> list[FloatArray]:
    encoder, network = load_encoder(folder, is_whole=True), NETWORKS[taken.info.modality]
    return [network.states(encoder, _alone(taken, row))[0].float().numpy() for row in rows]


@torch.inference_mode()
def check_logits(
    original: Any, taken: Backbone, head: TaskHead, probes: Sequence[Example], *, outputs: Sequence[int] | None = None
) -> None:
    """Compare a classifier's logits with those of the encoder and the head that were made of it.

    `outputs` are for classifiers of tokens: where each output of the head is among the original's, -1 if nowhere.
    Raises `GoldenRowsDiffer`.
    """
    rows = single(open_preprocessor(taken).encode(probes))
    computed = TorchEngine(taken).run(EngineBatch(rows, states=range(len(rows)) if outputs else ()))
    for place, row in enumerate(rows):
        given = head.logits(computed.states[place] if outputs else computed.pooled[place : place + 1])
        wanted = original(**_alone(taken, row)).logits[0].numpy()
        if outputs:
            known = np.flatnonzero(np.asarray(outputs) >= 0)
            given, wanted = given[:, known], wanted[:, np.asarray(outputs)[known]]
        if not _is_near(given, wanted):
            raise GoldenRowsDiffer(
                "taken apart into encoder and head, the checkpoint gives other logits than as a whole"
            )


def _alone(taken: Backbone, row: Features) -> dict[str, torch.Tensor]:
    arrays = open_preprocessor(taken).collate([row], row.cost)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _is_near(given: FloatArray, wanted: FloatArray) -> bool:
    """What is not a number is near nothing."""
    return bool(np.abs(given - wanted).max() <= _NEAR * max(1.0, np.abs(wanted).max()))
