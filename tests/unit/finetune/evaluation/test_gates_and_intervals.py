"""What is made of a run's figures: intervals, curves, slices, gates. On made-up answers, whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from finetune.evaluation import gates
from finetune.evaluation.classification import report, score_answers
from finetune.evaluation.curves import abstention, at_threshold, precision_recall, reliability, risk_coverage, thinned
from finetune.evaluation.data_curve import data_curve, extrapolated, nested_parts
from finetune.evaluation.gates import Duel, Gate
from finetune.evaluation.intervals import (
    intervals,
    least_discordant,
    p_value,
    paired_difference,
    resampled,
    wilson,
)
from finetune.evaluation.slices import LEAST_ROWS, MOST_VALUES, slices
from modeling.heads import softmax

Pair = tuple[np.ndarray, np.ndarray]


def drawn(rows: int, *, classes: int = 4, right: float = 0.8, seed: int = 0) -> Pair:
    """Labels and answers that are right about so often."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    return labels, np.where(random.random(rows) < right, labels, random.integers(0, classes, rows))


def logits_of(rows: int, *, classes: int = 3, noise: float = 1.0, seed: int = 0) -> Pair:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    logits = 2 * np.eye(classes)[labels] + random.normal(scale=noise, size=(rows, classes))
    return logits.astype(np.float32), labels


# Intervals


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_a_resample_has_the_metrics_that_its_rows_would_have(pairs: list[tuple[int, int]]) -> None:
    """With one kind of cell alone every resample is the data itself, so each metric must be that of the rows."""
    labels, answers = (np.asarray(column) for column in zip(*pairs, strict=True))
    values = resampled(labels, answers, seed=0, samples=5)
    assert set(values) == {"accuracy", "macro_f1", "weighted_f1"}
    for name, found in values.items():
        assert ((found >= 0) & (found <= 1)).all(), name
    measured = {name: score_answers(name, answers, labels) for name in values}
    for name, (low, high) in intervals(labels, answers, samples=50).items():
        assert low - 1e-12 <= measured[name] <= high + 1e-12, name


@pytest.mark.parametrize(("hits", "rows"), [(0, 1), (2, 2), (20, 20), (7, 9), (480, 500), (0, 300)])
def test_a_share_has_wilsons_interval(hits: int, rows: int) -> None:
    wanted = binomtest(hits, rows).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson(hits, rows), [wanted.low, wanted.high], atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_few_rows_without_an_error_prove_little(rows: int) -> None:
    """Nor do few without a right answer."""
    labels = np.arange(rows) % 2
    for answers, is_right in ((labels, True), (1 - labels, False)):
        for low, high in intervals(labels, answers).values():
            assert high - low > 1 / (rows + 3)
            assert (high == 1.0) if is_right else (low == 0.0)


@pytest.mark.parametrize(("rows", "right"), [(10, 0.9), (30, 0.97), (100, 0.8)])
def test_nineteen_of_twenty_intervals_hold_the_truth(rows: int, right: float) -> None:
    """Of models that err alike on two classes, so that accuracy and weighted F1 are the same in truth."""
    held = {"accuracy": 0, "weighted_f1": 0}
    random = np.random.default_rng(0)
    for _ in range(400):
        labels = random.integers(0, 2, rows)
        answers = np.where(random.random(rows) < right, labels, 1 - labels)
        for name in held:
            low, high = intervals(labels, answers, samples=200)[name]
            held[name] += low <= right <= high
    assert min(held.values()) >= 0.92 * 400, held


def test_intervals_agree_with_drawing_the_rows_themselves() -> None:
    labels, answers = drawn(300)
    random = np.random.default_rng(1)
    metrics: dict[str, Callable[[Any], float]] = {
        "accuracy": lambda rows: accuracy_score(labels[rows], answers[rows]),
        "macro_f1": lambda rows: f1_score(labels[rows], answers[rows], average="macro"),
        "weighted_f1": lambda rows: f1_score(labels[rows], answers[rows], average="weighted"),
    }
    resamples = [random.integers(0, 300, 300) for _ in range(1000)]
    for name, metric in metrics.items():
        wanted = np.percentile([metric(rows) for rows in resamples], [2.5, 97.5])
        np.testing.assert_allclose(intervals(labels, answers)[name], wanted, atol=0.012)


def test_intervals_depend_on_the_seed_alone_and_narrow_with_rows() -> None:
    assert intervals(*drawn(200), seed=3) == intervals(*drawn(200), seed=3) != intervals(*drawn(200), seed=4)
    wide, narrow = (intervals(*drawn(rows))["macro_f1"] for rows in (100, 10_000))
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])


def test_no_rows_have_no_interval() -> None:
    assert intervals(np.zeros(0, np.int64), np.zeros(0, np.int64)) == {}


def test_a_paired_difference_knows_that_both_err_on_the_same_rows() -> None:
    right = np.arange(200) % 4 != 0
    better = right.copy()
    better[0:32:4] = True
    difference, (low, high) = paired_difference(better, right)
    assert difference == pytest.approx(0.04)
    assert 0 < low < difference < high < 0.08  # two independent intervals of 200 rows would be six times as wide
    better[8:32:4] = False
    assert paired_difference(better, right)[1][0] <= 0, "two rows that differ show nothing"
    same, (low, high) = paired_difference(right, right)
    assert same == 0.0 and -0.02 < low < 0 < high < 0.02
    _, (low, high) = paired_difference(right[:4], right[:4])
    assert low < -0.1 and high > 0.1, "four rows that both answer right show nothing"


# Curves


def test_average_precision_is_the_usual_one_with_ties_too() -> None:
    logits, labels = logits_of(400)
    logits = logits.round()  # many equal scores
    for index, curve in enumerate(precision_recall(logits, labels, ["a", "b", "c"])):
        wanted = average_precision_score(labels == index, softmax(logits)[:, index])
        assert curve["average_precision"] == pytest.approx(wanted, abs=1e-6)
        assert curve["recall"] == sorted(curve["recall"]) and curve["recall"][-1] == 1.0
        assert len(curve["recall"]) == len(curve["precision"]) == len(curve["threshold"]) <= 100


def test_a_rare_class_keeps_its_points() -> None:
    labels = np.asarray([1] * 5 + [0] * 2000)
    logits = np.asarray([[0.0, 5.0]] * 5 + [[3.0, 0.0]] * 2000, np.float32)
    logits[:, 1] += np.linspace(0.1, 0, len(labels))
    rare = precision_recall(logits, labels, ["common", "rare"])[1]
    assert rare["recall"] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rare["precision"] == [1.0] * 5 and rare["average_precision"] == 1.0


def test_a_class_without_rows_has_no_curve() -> None:
    logits, labels = logits_of(50)
    assert [curve["label"] for curve in precision_recall(logits, labels * 0, ["a", "b", "c"])] == ["a"]


def test_the_bins_of_the_calibration_curve_hold_every_row_once_and_give_the_error_of_the_report() -> None:
    logits, labels = logits_of(500)
    curve = reliability(logits, labels, temperature=2.0)
    rows = np.asarray([one["rows"] for one in curve["bins"]])
    gaps = np.asarray([abs(one["confidence"] - one["accuracy"]) for one in curve["bins"]])
    assert rows.sum() == 500
    document = report(logits, labels, ["a", "b", "c"], temperature=2.0)
    assert float((gaps * rows).sum() / 500) == pytest.approx(document["ece_after"], abs=1e-6)


def test_risk_coverage_ends_at_the_plain_accuracy_and_rewards_a_telling_confidence() -> None:
    logits, labels = logits_of(500)
    curve = risk_coverage(logits, labels, temperature=1.0)
    assert curve["coverage"][-1] == 1.0 and curve["accuracy"][-1] == pytest.approx((logits.argmax(1) == labels).mean())
    scale = np.random.default_rng(0).uniform(0.1, 3, (500, 1)).astype(np.float32)
    shuffled = risk_coverage(logits * scale, labels, temperature=1.0)
    assert curve["aurc"] < shuffled["aurc"]


@given(st.integers(30, 300), st.floats(0.5, 0.99), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_a_threshold_gives_what_it_promises_on_the_rows_it_was_set_on(rows: int, target: float, seed: int) -> None:
    logits, labels = logits_of(rows, seed=seed)
    chosen = abstention(logits, labels, temperature=1.3, target_accuracy=target)
    if chosen["threshold"] is None:
        return
    found = at_threshold(logits, labels, temperature=1.3, threshold=chosen["threshold"])
    assert found["coverage"] == pytest.approx(chosen["coverage"])
    assert found["accuracy"] == pytest.approx(chosen["accuracy"])
    assert chosen["accuracy"] >= target


def test_a_target_out_of_reach_has_no_threshold_and_one_already_met_answers_everything() -> None:
    logits, labels = logits_of(200, noise=3.0)
    assert abstention(logits, labels, temperature=1.0, target_accuracy=1.0)["threshold"] is None
    everything = abstention(logits, labels, temperature=1.0, target_accuracy=0.1)
    assert everything["coverage"] == 1.0


@given(st.integers(0, 1000))
def test_thinning_keeps_both_ends(points: int) -> None:
    kept = thinned(points).tolist()
    assert len(kept) <= 100 and kept == sorted(set(kept))
    assert points == 0 or (kept[0], kept[-1]) == (0, points - 1)


# Slices


def test_slices_stand_lowest_first_and_say_what_is_left_out() -> None:
    labels, answers = drawn(300, right=1.0)
    sites: list[str | None] = ["north"] * 100 + ["south"] * 100 + [None] * 95 + ["rare"] * 5
    answers[100:150] = (labels[100:150] + 1) % 4
    (found,) = slices({"site": sites}, labels, answers, metric="accuracy")
    assert [row["value"] for row in found["values"]] == ["south", "(none)", "north"]
    assert found["values"][0]["accuracy"] == pytest.approx(0.5)
    low, high = found["values"][0]["interval_95"]
    assert low < 0.5 < high
    assert found["left_out"]["too_few_rows"] == {"values": 1, "rows": 5}


def test_at_most_fifty_slices_the_most_frequent() -> None:
    counts = [LEAST_ROWS + number for number in range(MOST_VALUES + 10)]
    values = [f"v{number}" for number, count in enumerate(counts) for _ in range(count)]
    labels, answers = drawn(len(values))
    (found,) = slices({"column": values}, labels, answers, metric="macro_f1")
    assert len(found["values"]) == MOST_VALUES
    assert found["left_out"]["too_many_values"] == {"values": 10, "rows": sum(counts[:10])}
    assert {row["value"] for row in found["values"]} == {f"v{number}" for number in range(10, MOST_VALUES + 10)}


# More data


def test_parts_are_nested_and_hold_every_class() -> None:
    labels = np.asarray([0] * 800 + [1] * 30 + [2])
    eighth, quarter, half = nested_parts(labels, seed=1)
    assert set(eighth) < set(quarter) < set(half)
    assert [len(part) for part in (eighth, quarter, half)] == pytest.approx([104, 208, 416], abs=2)
    assert set(labels[eighth]) == {0, 1, 2}


def test_an_exact_power_law_is_extrapolated_exactly() -> None:
    rows = [125, 250, 500, 1000]
    found = extrapolated(rows, [1 - 0.4 * (count / 125) ** -0.5 for count in rows], validation_rows=10_000)
    assert found["exponent"] == pytest.approx(-0.5)
    assert found["accuracy"] == pytest.approx(1 - 0.4 * 16**-0.5)
    assert found["range"] == pytest.approx([found["accuracy"]] * 2)


def test_too_few_rows_have_no_curve() -> None:
    labels = np.asarray([0, 1] * 20)
    assert data_curve(labels, labels, np.eye(2)[labels], lambda _: np.eye(2)[labels], method="m", seed=0) is None


# The test


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    total = only_first + only_second
    wanted = binomtest(only_first, total, 0.5).pvalue if total else 1.0
    assert p_value(only_first, only_second) == pytest.approx(wanted)


@pytest.mark.parametrize("significance", [0.1, 0.05, 0.01, 0.001])
def test_the_least_number_of_discordant_rows_is_the_first_that_can_pass(significance: float) -> None:
    least = least_discordant(significance)
    assert p_value(least, 0) <= significance < p_value(least - 1, 0)


# Gates


def duel(candidate_right: int, champion_right: int, both: int = 60, neither: int = 0) -> Duel:
    labels = np.zeros(candidate_right + champion_right + both + neither, np.int64)
    own = [0] * candidate_right + [1] * champion_right + [0] * both + [1] * neither
    theirs = [1] * candidate_right + [0] * champion_right + [0] * both + [1] * neither
    return Duel(labels, np.asarray(own), np.asarray(theirs), ["a", "b"], ["a", "b"])


def test_a_clearly_better_candidate_passes() -> None:
    gate = gates.better(duel(15, 2), significance=0.05)
    assert gate.status == "passed"
    assert (gate.figures["only_candidate_right"], gate.figures["only_champion_right"]) == (15, 2)


@pytest.mark.parametrize(("own", "theirs"), [(8, 8), (2, 15), (9, 4)])
def test_an_equal_a_worse_or_a_perhaps_better_one_does_not(own: int, theirs: int) -> None:
    gate = gates.better(duel(own, theirs), significance=0.05)
    assert gate.status == "failed" and "not shown" in gate.message
    needed = gate.figures["rows_needed"]
    if own <= theirs:
        assert needed is None and "not ahead" in gate.message
    else:
        assert f"some {needed} shared rows would show it" in gate.message
        factor = needed / gate.figures["rows"]
        longer = gates.better(duel(round(own * factor) + 1, round(theirs * factor)), significance=0.06)
        assert longer.status == "passed"


def test_too_few_discordant_rows_fail_and_say_so() -> None:
    gate = gates.better(duel(5, 0), significance=0.05)
    assert gate.status == "failed" and "too few rows" in gate.message
    assert gate.figures["least_discordant"] == 6


def test_a_class_that_loses_too_much_blocks_whatever_the_others_gain() -> None:
    labels = np.repeat([0, 1], [100, 25])
    champion, candidate = labels.copy(), labels.copy()
    champion[:30] = 1
    candidate[100:102] = 0
    found = gates.class_drop(Duel(labels, candidate, champion, ["big", "small"], ["big", "small"]), most=0.05)
    assert found.status == "failed" and "small loses 0.0800 of recall" in found.message
    tolerant = gates.class_drop(Duel(labels, candidate, champion, ["big", "small"], ["big", "small"]), most=0.08)
    assert tolerant.status == "passed"


def test_classes_with_few_rows_are_named_but_not_judged() -> None:
    labels = np.repeat([0, 1], [100, 5])
    candidate = labels.copy()
    candidate[100:] = 0
    found = gates.class_drop(Duel(labels, candidate, labels, ["big", "small"], ["big", "small"]), most=0.05)
    assert found.status == "passed" and found.figures["not_judged"] == {"small": 5}


def test_classes_with_few_rows_are_judged_together() -> None:
    """Sixty rows of four classes: none has twenty, and a candidate that is better on them can be promoted."""
    names = ["a", "b", "c", "d"]
    labels = np.repeat(np.arange(4), 15)
    champion = labels.copy()
    champion[::5] = (labels[::5] + 1) % 4
    better = gates.class_drop(Duel(labels, labels, champion, names, names), most=0.05)
    (group,) = better.figures["classes"]
    assert better.status == "passed"
    assert (group["label"], group["rows"]) == ("the group of 4 classes with fewer than 20 rows", 60)
    assert better.figures["not_judged"] == dict.fromkeys(names, 15)
    worse = gates.class_drop(Duel(labels, champion, labels, names, names), most=0.05)
    assert worse.status == "failed" and "loses 0.2000" in worse.message
    few = gates.class_drop(Duel(labels[:4], champion[:4], labels[:4], names, names), most=0.05)
    assert few.status == "failed" and "a single one of these rows counts 0.25" in few.message
    none = gates.class_drop(Duel(labels, labels, labels, names, ["other"]), most=0.05)
    assert none.status == "failed" and "bring a test_dataset" in none.message


def test_a_class_new_to_the_champion_is_not_held_against_anybody() -> None:
    labels = np.repeat([0, 1], [50, 50])
    found = gates.class_drop(Duel(labels, labels * 0, labels * 0, ["old", "new"], ["old"]), most=0.05)
    assert found.status == "passed" and [drop["label"] for drop in found.figures["classes"]] == ["old"]


@pytest.mark.parametrize(
    ("rows", "flips", "cosine", "status"),
    [
        (999, 0, 0.9995, "passed"),
        (999, 1, 0.9995, "failed"),
        (1000, 1, 0.9995, "passed"),
        (1000, 2, 0.9995, "failed"),
        (1000, 0, 0.998, "failed"),
        (1000, 0, -1.0, "failed"),
    ],
)
def test_parity_allows_one_flip_in_a_thousand(rows: int, flips: int, cosine: float, status: str) -> None:
    assert gates.parity("onnx/fp32", rows=rows, flips=flips, least_cosine=cosine).status == status


def test_a_minimum_is_reached_or_not() -> None:
    assert gates.minimum("accuracy", 0.9, least=0.9, side="test").status == "passed"
    assert gates.minimum("accuracy", 0.8999, least=0.9, side="test").status == "failed"


def test_one_failed_gate_is_enough_and_a_skipped_one_is_none() -> None:
    passed, skipped, failed = (Gate("x", status, "") for status in ("passed", "skipped", "failed"))
    assert gates.is_passed([passed, skipped]) and not gates.is_passed([passed, skipped, failed])


def test_only_rows_that_neither_saw_are_shared_and_equal_texts_count_once() -> None:
    rows, dropped = gates.shared_rows(["a", "b", "a", "c", "d"], seen=frozenset("b"), champion_seen=frozenset("c"))
    assert rows.tolist() == [0, 4]
    assert dropped == {"equal": 1, "seen_by_candidate": 1, "seen_by_champion": 1}
    rows, _ = gates.shared_rows(["a", "b"], seen=frozenset(), champion_seen=None)
    assert rows.tolist() == []


def test_answers_are_translated_by_name() -> None:
    assert gates.translated(np.asarray([0, 1, 2]), ["x", "y", "gone"], ["y", "x"]).tolist() == [1, 0, -1]
