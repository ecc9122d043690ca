"""Planning is pure: unknown names are refused with advice, every `auto` becomes a number."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.jobs.hyperparameters import (
    NAMES,
    NESTED,
    NOT_YET,
    OTHER_NAMES,
    Hyperparameters,
    PlanError,
    check_labels,
    check_task,
    parse_hyperparameters,
)
from finetune.jobs.plan import COST_ORDER, DatasetProfile, TrainingPlan, WorkerProfile, refuse_unavailable, resolve
from finetune.jobs.search_space import with_values
from modeling.inputs import MODALITIES

DATA = DatasetProfile(train_rows=1000, validation_rows=150, test_rows=150, labels=4, max_length_p99=101)


def plan(*, worker: WorkerProfile | None = None, parameters: int = 22_000_000, **values: Any) -> TrainingPlan:
    wanted = parse_hyperparameters(values)
    return resolve(wanted, data=DATA, worker=worker or WorkerProfile(), parameters=parameters, model_max_length=256)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("lr_scheduler", "scheduler"),
        ("epoch", "epochs"),
        ("batchsize", "batch_size"),
        ("early_stop", "early_stopping"),
        ("maxlength", "max_length"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(typed: str, meant: str) -> None:
    with pytest.raises(PlanError, match=f"did you mean {meant}"):
        parse_hyperparameters({typed: 1})


def test_a_removed_method_is_refused_with_what_to_use_instead() -> None:
    with pytest.raises(PlanError, match="method ia3 was removed; use lora or bottleneck") as raised:
        parse_hyperparameters({"method": "ia3", "epochs": 2})
    assert [error["loc"] for error in raised.value.errors] == [["hyperparameters", "method"]]


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_what_is_not_built_yet_is_refused_by_name(name: str) -> None:
    with pytest.raises(PlanError, match="not available yet"):
        parse_hyperparameters({name: 1})


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"epochs": "many"},
        {"learning_rate": 2},
        {"batch_size": 0},
        {"seed": -1},
        {"max_seconds": 0},
        {"method": "magic"},
        {"lora": {"r": 0}},
        {"lora": {"rank": 4}},
        {"split": {"validation": 0.5, "test": 0.5}},
        {"class_weights": {"a": -1}},
        {"class_weights": "heavy"},
        {"metric": "vibes"},
        {"max_length": 2},
        {"label_smoothing": 1.0},
        {"unfreeze_layers": 0},
        {"unfreeze_layers": "some"},
        {"bottleneck": {"size": 0}},
        {"prompt": {"tokens": 1000}},
        {"early_stopping": {"patience": 0}},
        {"dropout": float("nan")},
    ],
)
def test_values_out_of_bounds_are_refused_with_their_place(values: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as refused:
        parse_hyperparameters(values)
    assert refused.value.errors[0]["loc"][0] == "hyperparameters"
    assert next(iter(values)) in str(refused.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, 'method must be auto or one of baseline, linear_probe, setfit, .*, not "magic"'),
        ({"epochs": "many"}, 'epochs must be auto or a number from 0.01 to 1000, not "many"'),
        ({"batch_size": 16.5}, "batch_size must be auto or a whole number from 1 to 4096, not 16.5"),
        ({"lora": {"r": 9999}}, "lora.r must be a whole number from 1 to 256, not 9999"),
        ({"lora.r": "auto"}, 'lora.r must be a whole number from 1 to 256, not "auto"'),
        ({"gate.p_value": 0}, "gate.p_value must be a number above 0 to 1, not 0"),
        ({"lora": {"dropout": 1}}, "lora.dropout must be a number from 0 and below 1, not 1"),
        ({"seed": 1 << 40}, "seed must be a whole number from 0 to 2147483647, not 1099511627776"),
        ({"oversample": "maybe"}, 'oversample must be true or false, not "maybe"'),
        ({"max_seconds": "long"}, 'max_seconds must be a number above 0 to 604800 or null, not "long"'),
        ({"lora": 3}, "lora must be an object with r, alpha, dropout, .*, not 3"),
        ({"export": ["x"]}, r'export must be a list of onnx, not \["x"\]'),
        ({"class_weights": {"a": "x"}}, "class_weights must be none or balanced or an object of names and numbers"),
        ({"split": {"strategy": "group"}}, "split: strategy group needs group_column"),
        ({"space": {"lr": 3}, "trials": 2, "method": "lora"}, "space.lr must be a range such as .*, not 3"),
    ],
)
def test_a_value_that_does_not_fit_is_told_in_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}") as refused:
        parse_hyperparameters(values)
    (error,) = refused.value.errors
    assert not set(".".join(error["loc"])) & set("[]'"), "a place names hyperparameters alone"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_words_of_the_validator_reach_a_caller(name: str) -> None:
    """Every hyperparameter, given an object where none fits and a text that means nothing."""
    values: list[Any] = [{"no": {"such": "thing"}}, "\u2603", [[]]]
    for value in values:
        with pytest.raises(PlanError) as refused:
            parse_hyperparameters({name: value})
        told = json.dumps(refused.value.errors)
        for word in ("Input should", "literal[", "validation error", "function-", "valid ", "dict[", "Extra inputs"):
            assert word not in told, told


def test_dotted_names_mean_the_object() -> None:
    plain = parse_hyperparameters({"lora": {"r": 4, "alpha": 8}, "early_stopping": {"patience": 7}})
    assert parse_hyperparameters({"lora.r": 4, "lora": {"alpha": 8}, "early_stopping.patience": 7}) == plain
    assert parse_hyperparameters({"lora.r": 4, "lora.alpha": 8, "early_stopping": {"patience": 7}}) == plain
    assert with_values({"lora.r": 4, "lora.alpha": 8}, {"lora.r": 32}) == {"lora": {"r": 32, "alpha": 8}}
    with pytest.raises(PlanError, match=r"lora\.r is given twice, with two values"):
        parse_hyperparameters({"lora.r": 4, "lora": {"r": 8}})
    with pytest.raises(PlanError, match="lora is no object"):
        parse_hyperparameters({"lora.r": 4, "lora": 8})


def test_every_documented_name_is_taken() -> None:
    for name, model in NESTED.items():
        for inner, field in model.model_fields.items():
            if name != "split":
                assert parse_hyperparameters({f"{name}.{inner}": field.default})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "learning_rate"),
        ("Learning-Rate", "learning_rate"),
        ("num_train_epochs", "epochs"),
        ("epochz", "epochs"),
        ("rank", "lora.r"),
        ("lora.rank", "lora.r"),
        ("lora.alhpa", "lora.alpha"),
        ("patience", "early_stopping.patience"),
        ("test_size", "split.test"),
        ("metrics", "metric"),
    ],
)
def test_an_unknown_name_gets_the_one_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(PlanError, match=f"unknown hyperparameter '{name}'; did you mean {meant}\\?"):
        parse_hyperparameters({name: 1})


def test_other_libraries_names_lead_to_known_ones_and_are_none() -> None:
    assert set(OTHER_NAMES.values()) <= set(NAMES)
    assert not set(OTHER_NAMES) & set(NAMES)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(PlanError) as refused:
        parse_hyperparameters({"epochz": 1, "augment": "light"})
    assert len(refused.value.errors) == 2


def test_auto_tries_methods_in_order_of_cost() -> None:
    assert tuple(item.method for item in plan().methods) == COST_ORDER
    assert [item.method for item in plan(method="lora").methods] == ["lora"]


def test_auto_adds_pairs_after_the_probe_where_classes_have_few_rows() -> None:
    wanted = parse_hyperparameters({})
    for rows, has_pairs in ((4 * 32, True), (4 * 32 + 1, False)):
        data = DATA.model_copy(update={"train_rows": rows})
        found = resolve(wanted, data=data, worker=WorkerProfile(), parameters=1, model_max_length=256).methods
        expected = ["baseline", "linear_probe", *(["setfit"] if has_pairs else []), "lora", "full"]
        assert [item.method for item in found] == expected


@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        (None, "no worker"),
        (WorkerProfile(), "trains on cpu"),
        (WorkerProfile(device="cuda"), "no bitsandbytes"),
        (WorkerProfile(has_bitsandbytes=True), "trains on cpu"),
    ],
)
def test_qlora_is_refused_where_the_worker_cannot_run_it(worker: WorkerProfile | None, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        refuse_unavailable(Hyperparameters(method="qlora"), worker)
    refuse_unavailable(Hyperparameters(method="lora"), worker)


GPUS = WorkerProfile(device="cuda", devices=4, cpu_threads=16)


@pytest.mark.parametrize(
    ("worker", "values", "processes"),
    [
        (WorkerProfile(cpu_threads=8), {}, 1),
        (WorkerProfile(cpu_threads=8), {"processes": 2}, 2),
        (GPUS, {}, 4),
        (GPUS, {"devices": 3}, 3),
        (GPUS, {"batch_size": 16}, 2),
        (GPUS, {"batch_size": 4}, 1),
        (GPUS, {"batch_size": 4, "gradient_accumulation": 4}, 2),
        (GPUS, {"loss": "mnrl"}, 1),
    ],
)
def test_a_run_takes_the_devices_that_get_enough_rows(
    worker: WorkerProfile, values: dict[str, Any], processes: int
) -> None:
    assert plan(worker=worker, method="lora", **values).processes == processes


@pytest.mark.parametrize(
    ("worker", "values", "reason"),
    [
        (GPUS, {"devices": 5}, "the worker has 4"),
        (WorkerProfile(cpu_threads=8), {"devices": 2}, "trains on cpu"),
        (GPUS, {"processes": 2}, "use devices"),
        (WorkerProfile(cpu_threads=1), {"processes": 2}, "1 threads"),
        (GPUS, {"devices": 2, "loss": "triplet"}, "compares the rows"),
        (GPUS, {"devices": 2, "method": "setfit"}, "no effect with method setfit"),
    ],
)
def test_devices_that_cannot_be_had_are_refused_by_name(
    worker: WorkerProfile, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PlanError, match=reason) as refused:
        plan(worker=worker, **({"method": "full"} | values))
    assert refused.value.errors[0]["loc"][1] in {"devices", "processes"}


def test_half_precision_is_refused_without_a_gpu() -> None:
    with pytest.raises(PlanError, match="fp16 needs a GPU"):
        refuse_unavailable(Hyperparameters(precision="fp16"), WorkerProfile())
    refuse_unavailable(Hyperparameters(precision="fp16"), GPUS)
    refuse_unavailable(Hyperparameters(precision="fp16", devices=4), None)


def test_the_estimate_counts_trials_and_the_refit_and_ends_with_the_budget() -> None:
    auto = plan()
    seconds = {method.method: method.estimated_seconds or 0.0 for method in auto.methods}
    assert auto.estimated_seconds == pytest.approx(sum(seconds.values()) + max(seconds["lora"], seconds["full"]))
    assert plan(refit=False).estimated_seconds == pytest.approx(sum(seconds.values()))
    assert plan(method="full", trials=3).estimated_seconds == pytest.approx(3 * seconds["full"])
    assert plan(max_seconds=7).estimated_seconds == 7


def test_qlora_is_planned_where_the_worker_can_run_it() -> None:
    able = WorkerProfile(device="cuda", has_bitsandbytes=True)
    assert [item.method for item in plan(method="qlora", worker=able).methods] == ["qlora"]


def test_virtual_tokens_take_their_place_from_the_text() -> None:
    assert plan(method="prompt_tuning", max_length=256, prompt={"tokens": 20}).max_length == 236
    assert plan(method="lora", max_length=256).max_length == 256


def test_the_cap_on_pairs_gives_the_steps() -> None:
    (capped,) = plan(method="setfit", setfit={"max_pairs": 1000}).methods
    assert capped.total_steps == 3  # of 496 pairs
    (more,) = plan(method="setfit").methods
    assert more.total_steps > capped.total_steps
    assert (more.estimated_seconds or 0) > (capped.estimated_seconds or 0)


def test_estimates_follow_the_worker_s_measured_speed() -> None:
    slow, fast = (plan(worker=WorkerProfile(forward_rows_per_s=speed)) for speed in (10, 100))
    for ours, theirs in zip(slow.methods[1:], fast.methods[1:], strict=True):
        assert (ours.estimated_seconds or 0) > (theirs.estimated_seconds or 0)


def test_no_auto_is_left() -> None:
    assert "auto" not in str(plan().model_dump())


def test_oversampling_lengthens_an_epoch() -> None:
    data = DATA.model_copy(update={"train_rows": 1000, "labels": 4, "largest_class": 700})

    def steps(**values: Any) -> int:
        wanted = parse_hyperparameters({"method": "full", "epochs": 2, **values})
        (method,) = resolve(wanted, data=data, worker=WorkerProfile(), parameters=1, model_max_length=256).methods
        return method.total_steps

    assert steps() == 2 * -(-1000 // 32)
    assert steps(oversample=True) == 2 * -(-2800 // 32)
    with pytest.raises(PlanError, match=r"^oversample and class_weights .* use one of them$"):
        parse_hyperparameters({"oversample": True, "class_weights": "balanced"})
    with pytest.raises(PlanError, match="oversample is for one label per row"):
        check_task(parse_hyperparameters({"oversample": True}), "text-multi-label")


def test_only_auto_refits_unasked() -> None:
    assert plan().refit is True
    assert plan(method="full").refit is False
    assert (plan(refit=False).refit, plan(method="lora", refit=True).refit) == (False, True)


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
    [
        (WorkerProfile(), "fp32"),
        (WorkerProfile(has_bf16=True), "bf16"),
        (WorkerProfile(device="cuda"), "fp16"),
        (WorkerProfile(device="cuda", has_bf16=True), "bf16"),
    ],
)
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


def test_a_modality_without_a_baseline_is_planned_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODALITIES["text"], "has_baseline", False, raising=False)
    assert [method.method for method in plan().methods] == ["linear_probe", "lora", "full"]
    with pytest.raises(PlanError, match="there is no baseline for texts; use auto or linear_probe"):
        plan(method="baseline")


def test_weights_on_labels_that_the_data_lacks_are_refused() -> None:
    check_labels(parse_hyperparameters({"class_weights": {"good": 2.0}}), {"good", "bad"})
    check_labels(parse_hyperparameters({"class_weights": "balanced"}), set())
    with pytest.raises(PlanError, match="'goood', which the data does not have; it has bad, good"):
        check_labels(parse_hyperparameters({"class_weights": {"goood": 2.0}}), {"good", "bad"})
