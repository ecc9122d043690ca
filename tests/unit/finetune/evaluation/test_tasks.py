"""Several labels and numbers: figures against scikit-learn's, thresholds, intervals, the way a metric points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    hamming_loss,
    log_loss,
    mean_absolute_error,
    precision_recall_fscore_support,
    r2_score,
    root_mean_squared_error,
)

from finetune.data.targets import TARGETS, metric_of
from finetune.evaluation import bootstrap
from finetune.evaluation.calibration import fit_binary_temperature, mean_binary_log_loss
from finetune.evaluation.intervals import wilson
from finetune.evaluation.tasks import rules_of
from finetune.evaluation.tasks.class_weights import positive_weights
from finetune.evaluation.tasks.multi_label import LabelSetRules
from finetune.evaluation.tasks.regression import NumberRules
from finetune.evaluation.tasks.rules import Contest, Scale, Side
from finetune.evaluation.tasks.thresholds import fit_thresholds
from finetune.jobs.hyperparameters import EarlyStopping, GateOptions, PlanError, check_task, parse_hyperparameters
from finetune.training.checkpoints import Progress
from finetune.training.losses import bce, focal_of_labels
from finetune.training.methods.linear import fit_one_vs_rest
from modeling.heads import DenseLayer, TaskHead, sigmoid
from modeling.tasks import TASKS, Calibration
from modeling.weights import FloatArray

NAMES = ("a", "b", "c", "d")


def drawn(rows: int = 400, seed: int = 0, strength: float = 1.5) -> tuple[FloatArray, FloatArray]:
    """Logits and targets of labels that differ in how often they are due."""
    draw = np.random.default_rng(seed)
    chances = np.array([0.5, 0.3, 0.1, 0.02])
    targets = (draw.random((rows, 4)) < chances).astype(np.float32)
    logits = (strength * (2 * targets - 1) + draw.normal(size=targets.shape) + np.log(chances)).astype(np.float32)
    return logits, targets


def numbers(rows: int = 300, seed: int = 0, noise: float = 2.0) -> tuple[FloatArray, FloatArray]:
    draw = np.random.default_rng(seed)
    targets = draw.normal(20, 5, rows).astype(np.float32)
    return (targets + draw.normal(0, noise, rows)).astype(np.float32)[:, None], targets


def side(
    outputs: FloatArray, targets: Any, metric: str, *, answering: Calibration | None = None, **extras: Any
) -> Side:
    names = NAMES if targets.ndim == 2 else ()
    return Side(outputs, targets, names, extras, answering or Calibration(), metric_of(metric), 3)


# Figures


def test_figures_of_labels_are_scikit_learns() -> None:
    logits, targets = drawn()
    said, found = logits >= 0, LabelSetRules().summary(logits, targets)
    wanted = {
        "micro_f1": f1_score(targets, said, average="micro"),
        "macro_f1": f1_score(targets, said, average="macro"),
        "subset_accuracy": accuracy_score(targets, said),
        "hamming_loss": hamming_loss(targets, said),
        "loss": np.mean([log_loss(targets[:, i], sigmoid(logits)[:, i], labels=[0, 1]) for i in range(4)]),
        "rows": 400,
    }
    assert found == pytest.approx(wanted, rel=1e-5)
    assert set(LabelSetRules.figures) == set(found)


def test_figures_of_numbers_are_scikit_learns() -> None:
    values, targets = numbers()
    found = NumberRules().summary(values, targets)
    r2 = r2_score(targets, values[:, 0])
    wanted = {
        "rmse": root_mean_squared_error(targets, values[:, 0]),
        "mae": mean_absolute_error(targets, values[:, 0]),
        "r2": r2,
        "loss": 1 - r2,
        "rows": 300,
    }
    assert found == pytest.approx(wanted, rel=1e-4)
    assert set(NumberRules.figures) == set(found)


def test_a_label_without_rows_does_not_count_in_macro_f1() -> None:
    logits, targets = drawn()
    with_it, without = targets.copy(), targets.copy()
    without[:, 3] = 0
    assert LabelSetRules().summary(logits, without)["macro_f1"] == pytest.approx(
        f1_score(without[:, :3], logits[:, :3] >= 0, average="macro")
    )
    assert LabelSetRules().summary(logits, with_it) != LabelSetRules().summary(logits, without)


def test_the_report_of_each_label_is_scikit_learns_at_its_threshold() -> None:
    logits, targets = drawn()
    answering = Calibration(1.3, (0.3, 0.5, 0.7, 0.5))
    report = LabelSetRules().report(side(logits, targets, "micro_f1", answering=answering))
    task = TASKS["text-multi-label"]
    said = task.answers(task.scores(logits, answering), answering)
    wanted = precision_recall_fscore_support(targets, said, zero_division=0.0)
    for place, row in enumerate(report["per_class"]):
        assert (row["label"], row["threshold"]) == (NAMES[place], answering.thresholds[place])
        assert [row["precision"], row["recall"], row["f1"], row["rows"]] == pytest.approx(
            [values[place] for values in wanted]
        )
    assert report["micro_f1"] == pytest.approx(f1_score(targets, said, average="micro"))


@pytest.mark.parametrize(
    ("rules", "made", "metric"), [(LabelSetRules(), drawn, "micro_f1"), (NumberRules(), numbers, "rmse")]
)
def test_bootstrap_intervals_are_those_of_drawn_rows(rules: Any, made: Callable[..., Any], metric: str) -> None:
    outputs, targets = made(200)
    report = rules.report(side(outputs, targets, metric))
    draw = np.random.default_rng(9)
    samples = [draw.integers(0, 200, 200) for _ in range(1000)]
    values = [rules.summary(outputs[rows], targets[rows])[metric] for rows in samples]
    low, high = report["intervals_95"][metric]
    assert [low, high] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=0.1 * (high - low))
    again = rules.report(side(outputs, targets, metric))
    assert again["intervals_95"] == report["intervals_95"], "the same seed"


def test_slices_stand_with_the_worst_first_whichever_way_the_metric_points() -> None:
    values, targets = numbers(200)
    values[100:] += 6
    sites = ["good"] * 100 + ["bad"] * 100
    for metric in ("rmse", "r2"):
        (found,) = NumberRules().report(side(values, targets, metric, site=sites))["slices"]
        assert [row["value"] for row in found["values"]] == ["bad", "good"]
        assert found["values"][0]["rows"] == 100


def test_equal_targets_have_no_r2() -> None:
    found = NumberRules().summary(np.ones((30, 1), np.float32), np.full(30, 2, np.float32))
    assert found["r2"] == 0 and found["rmse"] == pytest.approx(1)


# Answers


def test_thresholds_never_lose_f1_on_the_rows_they_are_fitted_on_and_rare_labels_keep_the_default() -> None:
    logits, targets = drawn(600)
    fitted = LabelSetRules().calibrate(logits, targets, with_temperature=True)
    plain = Calibration(fitted.temperature)
    own, default = (
        LabelSetRules().report(side(logits, targets, "micro_f1", answering=answering))["per_class"]
        for answering in (fitted, plain)
    )
    assert all(one["f1"] >= other["f1"] for one, other in zip(own, default, strict=True))
    assert any(one["f1"] > other["f1"] for one, other in zip(own, default, strict=True))
    few = targets.copy()
    few[:, 2] = 0
    few[:9, 2] = 1
    thresholds = fit_thresholds(sigmoid(logits), few)
    assert thresholds[2] == 0.5 and all(0 < threshold < 1 for threshold in thresholds)


@given(st.integers(0, 10_000))
def test_a_threshold_lies_between_the_probabilities_of_rows(seed: int) -> None:
    logits, targets = drawn(80, seed=seed)
    scores = sigmoid(logits)
    for column, threshold in zip(scores.T, fit_thresholds(scores, targets), strict=True):
        assert threshold == 0.5 or np.abs(column - threshold).min() > 0


def test_a_temperature_is_found_that_was_put_in() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, (4000, 3)).astype(np.float32)
    targets = (draw.random(logits.shape) < sigmoid(logits)).astype(np.float32)
    assert fit_binary_temperature(logits * 3, targets) == pytest.approx(3, rel=0.1)
    assert mean_binary_log_loss(logits, targets) < mean_binary_log_loss(logits * 3, targets)


def test_scales_fold_and_unfold() -> None:
    draw = np.random.default_rng(0)
    head = TaskHead((DenseLayer(draw.normal(size=(1, 5)).astype(np.float32), np.array([0.3], np.float32)),))
    targets = draw.normal(100, 7, 50).astype(np.float32)
    scale = NumberRules().scale(targets)
    standard = scale.standard(targets)
    assert abs(standard.mean()) < 1e-4 and standard.std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(scale.raw(standard), targets, rtol=1e-5)
    x = draw.normal(size=(9, 5)).astype(np.float32)
    np.testing.assert_allclose(scale.folded(head).logits(x), scale.raw(head.logits(x)), rtol=1e-5)
    np.testing.assert_allclose(scale.unfolded(scale.folded(head)).logits(x), head.logits(x), atol=1e-4)
    assert Scale().folded(head) is head


# Models and losses


class _Run:
    labels = NAMES

    def __init__(self, weights: Any = "none") -> None:
        self.plan: Any = type("Plan", (), {"class_weights": weights})


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_all_labels_at_once_are_each_label_by_itself(weights: str) -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(300, 6)).astype(np.float32) * 2 + 1
    truth = features @ draw.normal(size=(6, 4)).astype(np.float32)
    targets = (truth + draw.normal(size=truth.shape) > np.array([0, 2, 4, 3])).astype(np.float32)
    targets[:, 3] = 0
    run: Any = _Run(weights)
    got = fit_one_vs_rest(run, features, targets, strength=0.5).head.logits(features)
    standard = (features - features.mean(0)) / features.std(0)
    for label in range(3):
        ratio = (targets[:, label] == 0).sum() / targets[:, label].sum()
        own = None if weights == "none" else {0: 1.0, 1: float(ratio)}
        model = LogisticRegression(C=0.5, class_weight=own, tol=1e-6).fit(standard, targets[:, label])
        np.testing.assert_allclose(got[:, label], model.decision_function(standard), atol=0.05)
    assert (got[:, 3] == got[0, 3]).all() and got[0, 3] < -4, "a label that no row has is never given"


def test_positive_weights_make_either_side_of_a_label_weigh_the_same() -> None:
    _, targets = drawn()
    weights = positive_weights("balanced", targets, NAMES)
    assert weights is not None
    np.testing.assert_allclose(weights * targets.sum(0), (targets == 0).sum(0), rtol=1e-5)
    assert positive_weights({"b": 3.0}, targets, NAMES) == pytest.approx([1, 3, 1, 1])
    assert positive_weights("none", targets, NAMES) is None


def test_losses_of_labels() -> None:
    logits, targets = (torch.from_numpy(array) for array in drawn(50))
    torch.testing.assert_close(focal_of_labels(logits, targets, gamma=0.0), bce(logits, targets))
    weight = torch.tensor([2.0, 1.0, 1.0, 5.0])
    torch.testing.assert_close(
        focal_of_labels(logits, targets, gamma=0.0, weight=weight), bce(logits, targets, weight=weight)
    )
    assert (focal_of_labels(logits, targets, gamma=2.0) < bce(logits, targets)).all()


# The way a metric points


def test_lower_is_better_for_errors_everywhere() -> None:
    rmse, f1 = metric_of("rmse"), metric_of("macro_f1")
    assert (rmse.best([3, 1, 2, 1]), f1.best([3, 1, 3])) == (1, 0)
    assert (rmse.direction, f1.direction) == ("minimize", "maximize")
    assert rmse.reaches(1.0, 1.0) and not rmse.reaches(1.1, 1.0) and f1.reaches(0.9, 0.8)
    progress = Progress()
    rule = EarlyStopping(patience=2, min_delta=0.1)
    gains = [progress.observe(value, rule, rmse) for value in (5.0, 4.0, 3.95, 4.5)]
    assert gains == [True, True, False, False]
    assert (progress.best_value, progress.stopped) == (4.0, "early stopping")


def test_auto_is_the_first_metric_of_each_task() -> None:
    assert [target.metrics[0].name for target in TARGETS.values()] == ["macro_f1", "micro_f1", "rmse", "entity_f1"]


@pytest.mark.parametrize(
    ("values", "task", "place"),
    [
        ({"metric": "rmse"}, "text-classification", "metric"),
        ({"metric": "accuracy"}, "text-multi-label", "metric"),
        ({"method": "setfit"}, "text-multi-label", "method"),
        ({"method": "bottleneck"}, "text-regression", "method"),
        ({"loss": "bce"}, "text-regression", "loss"),
        ({"class_weights": "balanced"}, "text-regression", "class_weights"),
        ({"gate": {"min_metric": 1.5}}, "text-multi-label", "gate"),
        ({"abstain": {"target_accuracy": 0.9}}, "text-multi-label", "abstain"),
    ],
)
def test_what_makes_no_sense_with_a_task_is_refused_by_name(values: Any, task: Any, place: str) -> None:
    with pytest.raises(PlanError) as raised:
        check_task(parse_hyperparameters(values), task)
    assert [error["loc"] for error in raised.value.errors] == [["hyperparameters", place]]


def test_a_minimum_of_an_error_may_be_any_number() -> None:
    check_task(parse_hyperparameters({"gate": {"min_metric": 12.5}}), "text-regression")


# The gate


def contest(outputs: Any, champion: Any, targets: Any, metric: str, **changed: Any) -> Contest:
    names = NAMES if targets.ndim == 2 else ()
    values = {
        "targets": targets,
        "names": names,
        "outputs": outputs,
        "answering": Calibration(),
        "champion_outputs": champion,
        "champion_names": names,
        "champion_answering": Calibration(),
        "metric": metric_of(metric),
        "options": GateOptions(),
        "seed": 0,
    }
    return Contest(**(values | changed))


def test_a_clearly_smaller_error_beats_the_champion_and_a_larger_one_does_not() -> None:
    good, targets = numbers(300, noise=1.0)
    bad = good + np.random.default_rng(5).normal(0, 3, good.shape).astype(np.float32)
    rules = rules_of("text-regression")
    (gate, drop) = rules.contest(contest(good, bad, targets, "rmse"))
    assert (gate.name, gate.status, drop.status) == ("paired_bootstrap", "passed", "skipped")
    assert gate.figures["difference"] < 0 < gate.figures["gain"]
    assert rules.contest(contest(bad, good, targets, "rmse"))[0].status == "failed"
    assert rules.contest(contest(good, good, targets, "rmse"))[0].status == "failed"
    few = rules.contest(contest(good[:19], bad[:19], targets[:19], "rmse"))[0]
    assert few.status == "failed" and "19 shared rows are too few" in few.message


def test_labels_that_the_champion_lacks_are_never_given_by_it_and_not_judged() -> None:
    good, targets = drawn(400, strength=3.0)
    rules = rules_of("text-multi-label")
    known = good[:, [2, 0]]
    gate, drop = rules.contest(contest(good, known, targets, "micro_f1", champion_names=("c", "a")))
    assert gate.status == "passed" and drop.status == "passed"
    assert [row["label"] for row in drop.figures["classes"]] == ["a", "c"]
    worse = good.copy()
    worse[:, 0] = -9
    _, drop = rules.contest(contest(worse, good, targets, "micro_f1"))
    assert drop.status == "failed" and drop.message.startswith("a loses 1.0000 of recall") is False
    assert drop.message.startswith("a loses")


def test_the_p_value_of_equal_models_is_spread_evenly() -> None:
    small = 0
    for seed in range(60):
        values, targets = numbers(100, seed=seed)
        noise = np.random.default_rng(seed + 1000).normal(0, 2, values.shape)
        other = (targets[:, None] + noise).astype(np.float32)
        parts, others = (NumberRules().parts(one, targets, Calibration()) for one in (values, other))
        found = bootstrap.paired(parts, others, NumberRules().of_sums, metric=metric_of("rmse"), seed=seed, samples=200)
        small += found["p_value"] < 0.1
    assert small <= 15


# Few rows


@pytest.mark.parametrize("rows", [2, 6, 20])
def test_few_rows_of_labels_without_an_error_prove_little(rows: int) -> None:
    _, targets = drawn(rows)
    report = LabelSetRules().report(side(20 * (2 * targets - 1), targets, "micro_f1"))
    for name, (low, high) in report["intervals_95"].items():
        assert high - low > 0.5 / (rows + 4), name
        assert (low == 0.0) if name == "hamming_loss" else (high == 1.0)
    assert report["intervals_95"]["subset_accuracy"] == wilson(rows, rows)


def test_too_few_numbers_have_no_interval() -> None:
    for rows, has_any in ((9, False), (10, True)):
        report = NumberRules().report(side(*numbers(rows), "rmse"))
        assert bool(report["intervals_95"]) is has_any


def test_few_rows_that_differ_are_no_more_than_tosses_of_a_coin() -> None:
    for rows, is_shown in ((3, False), (5, False), (6, True)):
        targets = np.arange(rows, dtype=np.float32)
        right, wrong = targets[:, None], targets[:, None] + 1
        found = NumberRules().compare(side(right, targets, "rmse"), wrong)
        assert found["gain"] > 0 and (found["p_value"] <= 0.05) is is_shown


def test_the_rows_that_a_perfect_model_would_answer_differently() -> None:
    logits, targets = drawn()
    assert LabelSetRules().misses(logits, targets) == ((logits >= 0) != (targets > 0)).any(1).sum()
    values, wanted = numbers()
    assert NumberRules().misses(values, wanted) == len(wanted)
    outputs = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    assert rules_of("text-classification").misses(outputs, np.asarray([0, 1, 1, 2])) == 2


def test_nothing_is_known_of_f1_where_no_label_is_due() -> None:
    outputs, targets = np.full((30, 4), -4, np.float32), np.zeros((30, 4), np.float32)
    found = rules_of("text-multi-label").report(side(outputs, targets, "micro_f1"))["intervals_95"]
    assert found["micro_f1"] == found["macro_f1"] == [0.0, 1.0]
