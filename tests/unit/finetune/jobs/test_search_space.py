from __future__ import annotations

from typing import Any

import pytest

from finetune.jobs.hyperparameters import PlanError, parse_hyperparameters
from finetune.jobs.plan import DatasetProfile, TrainingPlan, WorkerProfile, resolve
from finetune.jobs.search_space import Range, with_values

DATA = DatasetProfile(train_rows=1000, validation_rows=200, test_rows=200, labels=3, max_length_p99=64)


def plan(**values: Any) -> TrainingPlan:
    wanted = parse_hyperparameters(values)
    return resolve(wanted, data=DATA, worker=WorkerProfile(), parameters=22_000_000, model_max_length=256)


def refused(**values: Any) -> list[dict[str, Any]]:
    with pytest.raises(PlanError) as error:
        parse_hyperparameters(values)
    return error.value.errors


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_default_space_lies_around_the_methods_own_rate(method: str) -> None:
    space, own = plan(method=method, trials=5).space, plan(method=method).methods[0].learning_rate
    rate = space["learning_rate"]
    assert isinstance(rate, Range) and rate.low < own < rate.high and rate.log
    assert ("lora.r" in space) == (method == "lora")


def test_what_was_asked_for_is_not_varied_by_default() -> None:
    space = plan(method="lora", trials=5, learning_rate=1e-3, lora={"r": 4}).space
    assert set(space) == {"batch_size", "label_smoothing"}


def test_a_space_of_ones_own_is_taken_as_it_is() -> None:
    asked = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "lora.r": [4, 8]}
    space = plan(method="lora", trials=5, space=asked).space
    assert space == {"learning_rate": Range(low=1e-4, high=1e-2, log=True), "lora.r": [4, 8]}


def test_no_trials_no_space() -> None:
    assert (plan(method="lora").trials, plan(method="lora").space) == (0, {})


@pytest.mark.parametrize(
    ("values", "place", "part"),
    [
        ({"method": "auto", "trials": 3}, ["trials"], "method is auto"),
        ({"method": "linear_probe", "trials": 3}, ["trials"], "linear_probe"),
        ({"method": "lora", "space": {"batch_size": [8]}}, ["space"], "nothing without trials"),
        ({"method": "lora", "trials": 3, "space": {"epoch": [3]}}, ["space", "epoch"], "did you mean epochs?"),
        ({"method": "lora", "trials": 3, "space": {"seed": [1, 2]}}, ["space", "seed"], "cannot be searched"),
        ({"method": "lora", "trials": 3, "space": {"batch_size": []}}, ["space", "batch_size"], "choices"),
        ({"method": "lora", "trials": 3, "space": {"batch_size": [8, 0]}}, ["space", "batch_size"], "batch_size 0"),
        ({"method": "lora", "trials": 3, "space": {"lora.q": [8]}}, ["space", "lora.q"], "lora.q"),
        (
            {"method": "lora", "trials": 3, "space": {"learning_rate": {"low": 1e-4, "high": 5}}},
            ["space", "learning_rate"],
            "learning_rate 5",
        ),
        (
            {"method": "lora", "trials": 3, "space": {"learning_rate": {"low": 1e-2, "high": 1e-4}}},
            ["space", "learning_rate"],
            "low must be below high",
        ),
    ],
)
def test_a_search_that_cannot_be_run_is_refused_with_its_place(
    values: dict[str, Any], place: list[str], part: str
) -> None:
    errors = refused(**values)
    assert any(error["loc"][1 : 1 + len(place)] == place and part in error["message"] for error in errors), errors


def test_chosen_values_go_into_their_object() -> None:
    merged = with_values({"lora": {"alpha": 8}, "epochs": 2}, {"lora.r": 4, "epochs": 3})
    assert merged == {"lora": {"alpha": 8, "r": 4}, "epochs": 3}
