"""Attention in chunks against the formula: outputs and gradients, whatever the chunks and the mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.training import attention

ROWS, HEADS, LENGTH, SIZE = 5, 3, 7, 4
SCORE_BYTES = HEADS * LENGTH * LENGTH * 8  # of one row, in float64
MASKS = {
    "none": None,
    "by row": (ROWS, 1, 1, LENGTH),
    "of all": (1, 1, LENGTH, LENGTH),
    "each": (ROWS, 1, LENGTH, LENGTH),
}


def states(seed: int) -> torch.Tensor:
    made = torch.randn(ROWS, LENGTH, HEADS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.transpose(1, 2).requires_grad_()


def queries_keys_values() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return states(1), states(2), states(3)


def mask(shape: tuple[int, ...] | None) -> torch.Tensor | None:
    if shape is None:
        return None
    is_hidden = torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.3
    is_hidden[..., 0] = False
    return torch.zeros(shape, dtype=torch.float64).masked_fill(is_hidden, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("budget", [1, 2 * SCORE_BYTES, 100 * SCORE_BYTES], ids=["a row", "two rows", "all"])
def test_outputs_and_gradients_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, budget: int, shape: tuple[int, ...] | None
) -> None:
    monkeypatch.setattr(attention, "CHUNK_BYTES", budget)
    found, expected = queries_keys_values(), queries_keys_values()
    hidden, drawn = mask(shape), states(4).detach().transpose(1, 2)

    mixed, _ = attention.attend(nn.Module(), *found, hidden, scaling=0.3)
    mixed.backward(drawn)
    query, key, value = expected
    scores = 0.3 * query @ key.transpose(2, 3)
    formula = ((scores if hidden is None else scores + hidden).softmax(-1) @ value).transpose(1, 2)
    formula.backward(drawn)

    torch.testing.assert_close(mixed, formula)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_dropout_of_the_weights_is_drawn_in_training_alone() -> None:
    module, parts = nn.Module(), queries_keys_values()
    torch.manual_seed(1)
    once, again = (attention.attend(module, *parts, None, dropout=0.5)[0] for _ in range(2))
    assert not torch.equal(once, again)
    once, again = (attention.attend(module.eval(), *parts, None, dropout=0.5)[0] for _ in range(2))
    assert torch.equal(once, again)
