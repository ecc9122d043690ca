"""Groups by layer and kind, every optimiser's steps, and the course of the learning rate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from finetune.jobs.hyperparameters import Scheduler, parse_hyperparameters
from finetune.jobs.plan import DatasetProfile, TrainingPlan, WorkerProfile, resolve
from finetune.training.optimizers import build_optimizer, plateau_factor, schedule

DATA = DatasetProfile(train_rows=100, validation_rows=10, test_rows=10, labels=4, max_length_p99=20)
SCHEDULERS: list[Scheduler] = ["cosine", "linear", "constant", "plateau", "cyclic"]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=3)
        self.embeddings = nn.Embedding(10, 4)
        self.layer = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(4, 2)


def plan(**values: object) -> TrainingPlan:
    wanted = parse_hyperparameters({"method": "full", **values})
    return resolve(wanted, data=DATA, worker=WorkerProfile(), parameters=1, model_max_length=64)


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_each_layer_learns_slower_than_the_one_above_it() -> None:
    model, asked = Model(), plan(layer_decay=0.5, learning_rate=0.1)
    found = rates(model, build_optimizer(model, asked, asked.methods[0]))
    order = ["encoder.embeddings.weight", *(f"encoder.layer.{number}.weight" for number in range(3)), "head.weight"]
    assert [found[name][0] for name in order] == pytest.approx([0.1 / 16, 0.1 / 8, 0.1 / 4, 0.1 / 2, 0.1])


def test_matrices_decay_and_biases_do_not_and_what_is_frozen_is_left_out() -> None:
    model, asked = Model(), plan(weight_decay=0.3)
    model.encoder.layer[0].requires_grad_(False)
    found = rates(model, build_optimizer(model, asked, asked.methods[0]))
    assert {name for name in found if "layer.0" in name} == set()
    assert all((decay == 0.3) == name.endswith("weight") for name, (_, decay) in found.items())
    assert found["head.weight"][0] == asked.methods[0].head_learning_rate


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop", "adafactor"])
def test_every_optimiser_goes_downhill(name: str) -> None:
    torch.manual_seed(0)
    model, asked = Model(), plan(optimizer=name, weight_decay=0.0, learning_rate=0.02)
    optimizer = build_optimizer(model, asked, asked.methods[0])
    inputs, wanted = torch.randn(16, 4), torch.randn(16, 2)

    def loss() -> torch.Tensor:
        states = inputs
        for layer in model.encoder.layer:
            states = torch.tanh(layer(states))
        return torch.mean((model.head(states) - wanted) ** 2)

    before = loss().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * before


@given(st.sampled_from(SCHEDULERS), st.integers(1, 500), st.floats(0, 0.9), st.integers(1, 12))
def test_every_course_stays_between_nothing_and_one(name: Scheduler, steps: int, warmup: float, epochs: int) -> None:
    factor = schedule(name, total_steps=steps, warmup_ratio=warmup, epochs=epochs)
    values = [factor(step) for step in range(steps)]
    assert all(0 <= value <= 1 for value in values)
    rising = max(1, round(steps * warmup))
    assert values[:rising] == sorted(values[:rising])


def test_cyclic_rises_once_an_epoch_and_ends_low() -> None:
    factor = schedule("cyclic", total_steps=400, warmup_ratio=0.0, epochs=4)
    values = [factor(step) for step in range(400)]
    tops = [step for step in range(1, 399) if values[step - 1] < values[step] >= values[step + 1]]
    assert len(tops) == 3  # and the start
    assert values[-1] < 0.15


def test_a_plateau_halves() -> None:
    assert [plateau_factor(count) for count in range(3)] == [1.0, 0.5, 0.25]
