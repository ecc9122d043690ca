"""What the tasks share: how close logits must come, and the temperature of a stored calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from modeling.weights import FloatArray


def is_near_in_fp32(wanted: FloatArray, got: FloatArray) -> bool:
    """Within 1e-4 of the wanted logits, relative to their size. Of values that are not finite: no."""
    return bool(np.abs(got - wanted).max() <= 1e-4 * max(1.0, float(np.abs(wanted).max())))


def temperature_of(document: Mapping[str, Any]) -> float:
    """Raises `ValueError` if it is not above 0, `KeyError` if there is none."""
    temperature = float(document["temperature"])
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, and must be above 0")
    return temperature
