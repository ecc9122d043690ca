"""Planning is pure: unknown names are refused with advice, every `auto` becomes a number."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.plan import (
    COST_ORDER,
    NOT_YET,
    DatasetProfile,
    Hyperparameters,
    PlanError,
    TrainingPlan,
    WorkerProfile,
    parse_hyperparameters,
    resolve,
)

DATA = DatasetProfile(train_rows=1000, validation_rows=150, test_rows=150, labels=4, max_length_p99=101)


def plan(*, worker: WorkerProfile | None = None, parameters: int = 22_000_000, **values: Any) -> TrainingPlan:
    wanted = parse_hyperparameters(values)
    return resolve(wanted, data=DATA, worker=worker or WorkerProfile(), parameters=parameters, model_max_length=256)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("learning_rat", "learning_rate"), ("lr_scheduler", "scheduler"), ("epoch", "epochs"), ("batchsize", "batch_size"),
     ("early_stop", "early_stopping"), ("maxlength", "max_length")],
)  # fmt: skip
def test_an_unknown_name_gets_the_nearest_one(typed: str, meant: str) -> None:
    with pytest.raises(PlanError, match=f"did you mean {meant}"):
        parse_hyperparameters({typed: 1})


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_what_is_not_built_yet_is_refused_by_name(name: str) -> None:
    with pytest.raises(PlanError, match="not available yet"):
        parse_hyperparameters({name: 1})


@pytest.mark.parametrize(
    "values",
    [{"epochs": 0}, {"epochs": "many"}, {"learning_rate": 2}, {"batch_size": 0}, {"seed": -1}, {"max_seconds": 0},
     {"method": "magic"}, {"lora": {"r": 0}}, {"lora": {"rank": 4}}, {"split": {"validation": 0.5, "test": 0.5}},
     {"class_weights": {"a": -1}}, {"class_weights": "heavy"}, {"metric": "vibes"}, {"max_length": 2},
     {"label_smoothing": 1.0}, {"early_stopping": {"patience": 0}}, {"dropout": float("nan")}],
)  # fmt: skip
def test_values_out_of_bounds_are_refused_with_their_place(values: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as refused:
        parse_hyperparameters(values)
    assert refused.value.errors[0]["loc"][0] == "hyperparameters"
    assert next(iter(values)) in str(refused.value)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(PlanError) as refused:
        parse_hyperparameters({"epochz": 1, "augment": "light"})
    assert len(refused.value.errors) == 2


def test_auto_tries_methods_in_order_of_cost() -> None:
    assert tuple(item.method for item in plan().methods) == COST_ORDER
    assert [item.method for item in plan(method="lora").methods] == ["lora"]


def test_no_auto_is_left() -> None:
    assert "auto" not in str(plan().model_dump(exclude={"is_auto"}))


def test_lengths_are_rounded_up_and_bounded_by_the_model() -> None:
    assert plan().max_length == 104
    assert plan(max_length=8192).max_length == 256


def test_rates_follow_the_backbone_s_size_and_an_explicit_one_holds_for_all() -> None:
    small = {item.method: item.learning_rate for item in plan().methods}
    large = {item.method: item.learning_rate for item in plan(parameters=110_000_000).methods}
    assert (small["full"], large["full"]) == (1e-4, 3e-5)
    assert (small["lora"], large["lora"]) == (5e-4, 2e-4)
    (full,) = plan(method="full", learning_rate=2e-5).methods
    assert (full.learning_rate, full.head_learning_rate) == (2e-5, 2e-5)


@pytest.mark.parametrize(
    ("worker", "precision"),
    [(WorkerProfile(), "fp32"), (WorkerProfile(has_bf16=True), "bf16"), (WorkerProfile(device="cuda"), "fp16"),
     (WorkerProfile(device="cuda", has_bf16=True), "bf16")],
)  # fmt: skip
def test_precision_follows_the_device(worker: WorkerProfile, precision: str) -> None:
    assert plan(worker=worker).precision == precision
    assert plan(worker=worker, precision="fp32").precision == "fp32"


@given(st.integers(1, 10_000_000), st.integers(1, 4096), st.integers(1, 8))
def test_steps_cover_the_epochs(rows: int, batch: int, accumulation: int) -> None:
    wanted = Hyperparameters(method="full", epochs=3, batch_size=batch, gradient_accumulation=accumulation)
    data = DATA.model_copy(update={"train_rows": rows})
    (full,) = resolve(wanted, data=data, worker=WorkerProfile(), parameters=1, model_max_length=256).methods
    assert full.total_steps * batch * accumulation >= 3 * rows
    assert (full.total_steps - 3) * batch * accumulation < 3 * rows
