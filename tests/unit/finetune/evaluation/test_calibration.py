"""A temperature is used where it helps rows that it was not fitted on, and an error is judged where rows suffice."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluation.calibration import (
    binary_row_losses,
    error_by_chance,
    expected_calibration_error,
    fit_binary_temperature,
    fit_temperature,
    if_it_helps,
    mean_binary_log_loss,
    negative_log_likelihood,
    row_losses,
)
from modeling.heads import softmax


def answers(rows: int, *, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits `sharpness` times as large as calibrated ones, and the labels."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=1.5, size=(rows, 3)).astype(np.float32)
    labels = np.asarray([random.choice(3, p=row / row.sum()) for row in softmax(logits).astype(np.float64)])
    return logits * np.float32(sharpness), labels


@pytest.mark.parametrize("sharpness", [0.3, 4.0])
def test_a_clear_fault_is_corrected(sharpness: float) -> None:
    logits, labels = answers(300, sharpness=sharpness)
    assert if_it_helps(fit_temperature, row_losses, logits, labels) == fit_temperature(logits, labels)


def test_what_a_few_rows_suggest_is_not_applied() -> None:
    """Of calibrated answers on 12 rows a temperature makes new rows worse; it is used in few cases, if at all."""
    used, harm = 0, []
    for seed in range(60):
        logits, labels = answers(12, sharpness=1.0, seed=seed)
        others, truth = answers(500, sharpness=1.0, seed=1000 + seed)
        used += if_it_helps(fit_temperature, row_losses, logits, labels) != 1.0
        cooled = (others / fit_temperature(logits, labels)).astype(np.float32)
        harm.append(negative_log_likelihood(cooled, truth) - negative_log_likelihood(others, truth))
    assert np.mean(harm) > 0.01
    assert used <= 20


def test_too_few_rows_have_none() -> None:
    logits, labels = answers(9, sharpness=5.0)
    assert if_it_helps(fit_temperature, row_losses, logits, labels) == 1.0


def test_labels_that_are_decided_one_by_one_are_treated_alike() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(300, 4)).astype(np.float32)
    targets = (random.random((300, 4)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    found = if_it_helps(fit_binary_temperature, binary_row_losses, logits * 4, targets)
    assert found == pytest.approx(4, rel=0.3)
    assert binary_row_losses(logits, targets).mean() == pytest.approx(mean_binary_log_loss(logits, targets))


@pytest.mark.parametrize("rows", [20, 100, 1000])
def test_faultless_probabilities_stay_below_the_error_by_chance(rows: int) -> None:
    below = 0
    for seed in range(200):
        logits, labels = answers(rows, sharpness=1.0, seed=seed)
        below += expected_calibration_error(logits, labels) <= error_by_chance(logits)
    assert below >= 0.85 * 200


def test_the_error_by_chance_falls_with_the_rows() -> None:
    few, many = (error_by_chance(answers(rows, sharpness=1.0)[0]) for rows in (30, 3000))
    assert many < 0.03 < few
