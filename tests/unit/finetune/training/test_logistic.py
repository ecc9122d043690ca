"""Which strength is taken: by the metric as far as it can tell, then by the log loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from finetune.training.methods.linear import Fit, Judged, best_of
from modeling.heads import TaskHead

SEEN: list[float] = []


def fits(count: int) -> Iterator[Fit]:
    for number in range(count):
        SEEN.append(float(number))
        yield Fit(TaskHead(()), float(number), np.zeros(0), np.zeros(0))


def chosen(scores: Sequence[float], losses: Sequence[float], *, rows: int) -> float:
    def judge(fit: Fit) -> Judged:
        at = int(fit.strength)
        return Judged(fit, scores[at], losses[at])

    SEEN.clear()
    return best_of(fits(len(scores)), judge, rows=rows).strength


@pytest.mark.parametrize(
    ("scores", "losses", "rows", "wanted"),
    [
        ([0.9658, 0.9635, 0.9658, 0.9647], [0.155, 0.135, 0.126, 0.125], 849, 3),  # all within an error of 0.006
        ([0.90, 0.96, 0.95], [0.1, 0.3, 0.2], 849, 1),  # the loss does not outweigh what the metric can tell
        ([0.90, 0.96, 0.95], [0.1, 0.3, 0.2], 60, 2),  # nor can it tell with few rows
        ([1.0, 1.0, 0.99], [0.2, 0.2, 0.1], 100, 0),  # without any error there is nothing to choose from
    ],
)
def test_the_loss_decides_where_the_metric_cannot(scores: Any, losses: Any, rows: int, wanted: int) -> None:
    assert chosen(scores, losses, rows=rows) == wanted


def test_the_path_ends_where_neither_gains() -> None:
    assert chosen([0.9] * 9, [0.5, 0.4, 0.41, 0.42, 0.43, 0.3, 0.2, 0.1, 0.0], rows=100) == 1
    assert SEEN == [0, 1, 2, 3, 4]
