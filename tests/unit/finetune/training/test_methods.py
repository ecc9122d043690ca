"""The parts of methods that can be told apart from training: layers, kept activations, pairs, merged changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.jobs.failures import RunError
from finetune.training.layers import FrozenTrunk, freeze_below, layer_depths, set_trunk, unset_trunk
from finetune.training.methods.setfit import draw_rows, half_way, pair_loss
from modeling.encoder import load_encoder
from modeling.testing import write_tiny_checkpoint

LAYERS = 3
TYPES = ["bert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta"]


def tiny(folder: Path, model_type: str = "bert") -> torch.nn.Module:
    layers: dict[str, Any] = {"n_layers": LAYERS} if model_type == "distilbert" else {"num_hidden_layers": LAYERS}
    return load_encoder(write_tiny_checkpoint(folder / model_type, model_type=model_type, **layers))


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask int64[3, 6] of rows of 6, 4 and 2 tokens."""
    ids = torch.randint(5, 40, (3, 6), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(6)[None] < torch.tensor([[6], [4], [2]])).long()
    return ids * mask, mask


def states(encoder: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return found * mask[..., None]


# Layers


@pytest.mark.parametrize("model_type", TYPES)
def test_depths_rise_from_the_embeddings_to_the_top(tmp_path: Path, model_type: str) -> None:
    encoder = tiny(tmp_path, model_type)
    depths = layer_depths(encoder)
    assert set(depths) == {name for name, _ in encoder.named_parameters()}
    assert set(depths.values()) == set(range(LAYERS + 1))
    for name, depth in depths.items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers:
            assert depth == numbers[0] + 1
        elif "word_embeddings" in name:
            assert depth == 0


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("top", [1, 2, 99])
def test_only_the_topmost_layers_stay_trainable(tmp_path: Path, model_type: str, top: int) -> None:
    encoder = tiny(tmp_path, model_type)
    freeze_below(encoder, top)
    depths = layer_depths(encoder)
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (depths[name] > max(0, LAYERS - top)), name


def test_layers_that_share_their_weights_cannot_be_trained_apart(tmp_path: Path) -> None:
    encoder = tiny(tmp_path, "albert")
    assert set(layer_depths(encoder).values()) <= {0, 1}
    with pytest.raises(RunError, match="unfreeze_layers"):
        freeze_below(encoder, 1)


@pytest.mark.parametrize("model_type", TYPES)
def test_kept_activations_give_the_same_states_and_gradients(tmp_path: Path, model_type: str) -> None:
    plain = tiny(tmp_path, model_type)
    freeze_below(plain, 1)
    kept = copy.deepcopy(plain)
    trunk = set_trunk(kept)
    assert trunk is not None
    ids, mask = rows()
    expected = states(plain, ids, mask)
    expected.square().sum().backward()
    computed = 0
    for turn in range(3):
        order = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 2]][turn])
        kept.zero_grad()
        trunk.expect({"input_ids": ids[order]}, mask[order])
        with _counted(trunk) as calls:
            got = states(kept, ids[order], mask[order])
        computed += len(calls)
        torch.testing.assert_close(got, expected[order], atol=1e-5, rtol=1e-4)
        if turn < 2:
            got.square().sum().backward()
            _same_gradients(kept, plain)
    assert computed == 1, "the frozen layers run for rows they have not seen, and once"


def test_rows_that_are_new_are_computed_among_those_that_are_known(tmp_path: Path) -> None:
    plain = tiny(tmp_path)
    kept = copy.deepcopy(plain)
    freeze_below(kept, 1)
    trunk = set_trunk(kept)
    assert trunk is not None
    for seed in (0, 1, 0):
        ids, mask = rows(seed)
        trunk.expect({"input_ids": ids}, mask)
        torch.testing.assert_close(states(kept, ids, mask), states(plain, ids, mask), atol=1e-5, rtol=1e-4)


def test_beyond_its_budget_nothing_is_kept_and_the_answers_stay(tmp_path: Path) -> None:
    plain = tiny(tmp_path)
    trunk = FrozenTrunk(list(copy.deepcopy(plain).encoder.layer)[:2], budget_bytes=100)  # type: ignore[union-attr, arg-type]
    hidden = torch.randn(3, 6, 32)
    ids, mask = rows()
    first = trunk(hidden, None)
    for _ in range(2):
        trunk.expect({"input_ids": ids}, mask)
        torch.testing.assert_close(trunk(hidden, None), first)
    assert not trunk._kept


def test_layers_come_back_under_their_own_names(tmp_path: Path) -> None:
    encoder = tiny(tmp_path)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    freeze_below(encoder, 1)
    assert set_trunk(encoder) is not None
    depths = layer_depths(encoder)
    assert set(depths.values()) == set(range(LAYERS + 1))
    assert {depths[name] for name, weight in encoder.named_parameters() if weight.requires_grad} == {LAYERS}
    unset_trunk(encoder)
    after = encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


class _counted:
    """Counts how often the lowest layer runs."""

    def __init__(self, trunk: FrozenTrunk) -> None:
        self._layer, self._calls = trunk.layers[0], list[int]()

    def __enter__(self) -> list[int]:
        self._handle = self._layer.register_forward_hook(lambda *_: self._calls.append(1))
        return self._calls

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _same_gradients(kept: torch.nn.Module, plain: torch.nn.Module) -> None:
    gradients = [p.grad for p in kept.parameters() if p.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)
    expected = [p.grad for p in plain.parameters() if p.requires_grad]
    assert len(gradients) == len(expected)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


# Pairs


@given(st.lists(st.integers(0, 5), min_size=2, max_size=200), st.integers(2, 64), st.integers(0, 1000))
def test_drawn_rows_are_distinct_and_even_over_classes(labels: list[int], count: int, seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    picked = draw_rows(array, count, np.random.default_rng(seed))
    assert len(set(picked.tolist())) == len(picked) <= max(count, 4)
    drawn = np.bincount(array[picked], minlength=6)
    there = np.bincount(array, minlength=6)
    full = drawn[(drawn > 0) & (there >= drawn.max())]
    assert len(set(full.tolist())) <= 1, "classes with enough rows give equally many"
    if len(set(labels)) > 1:
        assert (drawn > 0).sum() > 1, "some pair must be of unequal labels"


def test_the_pair_loss_wants_equal_labels_parallel_and_unequal_ones_orthogonal() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    wanted = torch.tensor([[2.0, 0], [5, 0], [0, 1], [0, 3]])
    assert pair_loss(wanted, labels) < 1e-6
    assert pair_loss(wanted, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.5 * (1 + 0.5), abs=1e-6)
    one_class = pair_loss(wanted[:2], labels[:2])
    assert one_class == pytest.approx(0.0, abs=1e-6)
    alone = pair_loss(wanted[:1].requires_grad_(), labels[:1])
    assert alone == 0.0 and alone.requires_grad


def test_half_of_the_way_back_is_the_mean_of_the_weights_and_leaves_whole_numbers_alone() -> None:
    start = {"weight": torch.tensor([0.0, 2.0]), "count": torch.tensor(1)}
    end = {"weight": torch.tensor([2.0, -2.0]), "count": torch.tensor(7)}
    found = half_way(start, end)
    assert found["weight"].tolist() == [1.0, 0.0]
    assert found["count"].item() == 7
