"""What rows weigh by their class. Without torch: methods that are solved rather than trained use it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modeling.weights import FloatArray, IntArray

_LEAST_WEIGHT = 1e-3  # of a label that every row has


def class_weights(wanted: Any, labels: IntArray, names: Sequence[str]) -> FloatArray | None:
    """Weight per class float32[classes] with mean 1 over the rows, or None: `balanced` is inverse to frequency."""
    if wanted == "none":
        return None
    counts: FloatArray = np.bincount(labels, minlength=len(names)).astype(np.float32)
    if wanted == "balanced":
        return (len(labels) / (int((counts > 0).sum()) * np.maximum(counts, 1))).astype(np.float32)
    chosen = np.asarray([float(wanted.get(name, 1.0)) for name in names], dtype=np.float32)
    return np.asarray(chosen * (len(labels) / float((chosen * counts).sum())), dtype=np.float32)


def positive_weights(wanted: Any, targets: FloatArray, names: Sequence[str]) -> FloatArray | None:
    """Weight of each label's positive rows float32[labels] for several labels a row, or None: `balanced` gives them as
    much as the rows without the label; a map gives weights by label."""
    if wanted == "none":
        return None
    if wanted == "balanced":
        due = targets.sum(0)
        ratios = np.where(due > 0, (len(targets) - due) / np.maximum(due, 1), 1)
        return np.maximum(ratios, _LEAST_WEIGHT).astype(np.float32)
    return np.asarray([float(wanted.get(name, 1.0)) for name in names], dtype=np.float32)
