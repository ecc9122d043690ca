"""Sentences from figures: a made-up run for each thing that can be said."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.evaluation.verdict import Figures, Judgement, onset, verdict


def history(validation: list[float], train: list[float], scores: list[float] | None = None) -> list[dict[str, Any]]:
    scores = scores or [0.9] * len(train)
    return [
        {"step": 10 * (index + 1), "epoch": 0.5 * (index + 1), "loss": loss, "train_loss": own, "macro_f1": score}
        for index, (loss, own, score) in enumerate(zip(validation, train, scores, strict=True))
    ]


def figures(**changed: Any) -> Figures:
    side = {
        "rows": 500.0,
        "ece_before": 0.1,
        "ece_after": 0.02,
        "per_class": [{"label": "a", "rows": 250}, {"label": "b", "rows": 250}],
    }
    return Figures(**({"method": "lora", "metric": "macro_f1", "side_name": "test", "side": side} | changed))


def said(found: Figures) -> dict[str, Judgement]:
    return {judgement.code: judgement for judgement in verdict(found)}


FINE = history([0.9, 0.5, 0.4, 0.39, 0.39], [0.8, 0.5, 0.38, 0.37, 0.37])


def test_overfitting_names_the_step_where_it_sets_in_and_the_gap() -> None:
    found = said(figures(history=history([0.9, 0.5, 0.55, 0.7], [0.8, 0.4, 0.2, 0.05])))["overfitting"]
    assert found.severity == "warning"
    assert found.evidence["step"] == 20
    assert found.evidence["gap"] == pytest.approx(0.65)
    for figure in ("step 20", "epoch 1.0", "0.5000", "0.7000", "0.6500"):
        assert figure in found.message


@pytest.mark.parametrize(
    "entries",
    [
        FINE,
        history([0.9, 0.5, 0.51, 0.505], [0.8, 0.4, 0.3, 0.2]),  # a rise within the noise
        history([0.9, 0.5, 0.7], [0.8, 0.4, 0.6]),  # both rise: unstable, not overfitted
        history([0.5, 0.6], [0.4, 0.2]),  # too few evaluations
    ],
)
def test_no_onset_without_a_clear_rise_against_a_falling_training_loss(entries: list[dict[str, Any]]) -> None:
    assert onset(entries) is None
    assert "overfitting" not in said(figures(history=entries))


def test_a_run_that_ends_while_still_improving_is_underfitted() -> None:
    entries = history([1.2, 1.0, 0.8], [1.3, 1.05, 0.85], [0.3, 0.5, 0.6])
    found = said(figures(history=entries, stopped="all epochs are done"))["underfitting"]
    assert "step (30)" in found.message and "0.8000" in found.message
    assert "underfitting" not in said(figures(history=entries, stopped="early stopping"))
    assert "underfitting" not in said(figures(history=FINE, stopped="all epochs are done"))


def test_a_probe_that_cannot_fit_its_own_rows_is_underfitted() -> None:
    found = said(figures(method="linear_probe", train_score=0.61, validation_score=0.6))["underfitting"]
    assert "0.610" in found.message
    assert "underfitting" not in said(figures(method="linear_probe", train_score=0.95, validation_score=0.94))


def test_a_probe_that_only_knows_its_own_rows_is_overfitted() -> None:
    found = said(figures(method="linear_probe", train_score=1.0, validation_score=0.7))["overfitting"]
    assert found.evidence["gap"] == pytest.approx(0.3)


def against(difference: float, p_value: float) -> dict[str, Any]:
    interval = [difference - 0.02, difference + 0.02]
    return {"difference": difference, "interval_95": interval, "p_value": p_value, "rows": 400}


def test_a_baseline_that_is_as_good_is_said_with_the_figures() -> None:
    found = said(figures(against_baseline=against(0.005, 0.6)))["baseline_as_good"]
    assert found.severity == "warning"
    for figure in ("400 validation rows", "+0.0050", "-0.0150 to +0.0250", "0.600"):
        assert figure in found.message
    assert "baseline_as_good" in said(figures(against_baseline=against(-0.03, 0.01)))


def test_beating_the_baseline_is_said_too() -> None:
    found = said(figures(against_baseline=against(0.05, 0.001)))
    assert "beats_baseline" in found and "baseline_as_good" not in found
    assert "baseline_is_best" in said(figures(method="baseline", is_baseline_best=True))
    assert not {"beats_baseline", "baseline_as_good", "baseline_is_best"} & set(said(figures()))


def curve(gain: float, half_width: float, expected: float) -> dict[str, Any]:
    return {
        "method": "linear_probe",
        "points": [{"rows": 500, "accuracy": 0.8 - gain}, {"rows": 1000, "accuracy": 0.8}],
        "last_doubling": {
            "from_rows": 500,
            "to_rows": 1000,
            "gain": gain,
            "interval_95": [gain - half_width, gain + half_width],
        },
        "next_doubling": {"rows": 2000, "accuracy": 0.8 + expected, "range": [0.8, 0.9], "exponent": -0.2},
    }


@pytest.mark.parametrize(
    ("gain", "half_width", "expected", "code"),
    [
        (0.03, 0.01, 0.02, "more_data_would_help"),
        (0.0, 0.004, 0.0, "more_data_would_hardly_help"),
        (0.03, 0.01, 0.001, "more_data_would_hardly_help"),
        (0.01, 0.03, 0.02, "more_data_unclear"),
    ],
)
def test_more_data(gain: float, half_width: float, expected: float, code: str) -> None:
    codes = [name for name in said(figures(data_curve=curve(gain, half_width, expected))) if "data" in name]
    assert codes == [code]


def test_what_more_data_would_bring_is_given_with_its_range() -> None:
    message = said(figures(data_curve=curve(0.03, 0.01, 0.02)))["more_data_would_help"].message
    for figure in ("500 to 1000", "+0.0300", "2000 rows", "0.820", "0.800 to 0.900"):
        assert figure in message


def test_small_classes_are_named_rarest_first() -> None:
    rows = [{"label": "many", "rows": 400}, {"label": "few", "rows": 12}, {"label": "none", "rows": 0}]
    side = {"rows": 412.0, "ece_before": 0.1, "ece_after": 0.02, "per_class": rows}
    found = said(figures(side=side))["classes_too_small"]
    assert "2 of 3 classes" in found.message and "none (0), few (12)" in found.message
    assert found.evidence["rows"] == {"few": 12, "none": 0}
    absent = said(figures(side=side))["classes_not_judged"]
    assert absent.evidence["classes"] == ["none"] and "1 of 3 classes has no test row" in absent.message


def test_figures_of_training_rows_say_so() -> None:
    found = said(figures(side_name="validation", is_on_training_rows=True))
    assert found["nothing_held_out"].severity == "warning" and "no_test_rows" not in found


@pytest.mark.parametrize(
    ("error", "chance", "rows", "code"),
    [
        (0.02, 0.04, 500, "calibrated"),
        (0.05, 0.04, 500, "roughly_calibrated"),
        (0.12, 0.04, 500, "poorly_calibrated"),
        (0.12, 0.15, 120, "calibration_unknown"),  # on so few rows an error of this size is chance
        (0.02, 0.15, 40, "calibration_unknown"),
        (0.48, 0.3, 5, "calibration_unknown"),
    ],
)
def test_calibration(error: float, chance: float, rows: int, code: str) -> None:
    side = {"rows": float(rows), "ece_before": 0.2, "ece_after": error, "ece_by_chance": chance, "per_class": []}
    found = said(figures(side=side))
    assert [name for name in found if "calibrat" in name] == [code]
    assert ("right" in found[code].message) == (code == "roughly_calibrated")


def test_few_validation_rows_support_no_claim_on_the_fit() -> None:
    rising = history([0.9, 0.5, 0.55, 0.7], [0.8, 0.4, 0.2, 0.05])
    falling = history([0.9, 0.7, 0.5], [0.8, 0.6, 0.4], [0.5, 0.6, 0.7])
    probe: dict[str, Any] = {"method": "linear_probe", "train_score": 0.99, "validation_score": 0.8}
    for changed in ({"history": rising}, {"history": falling, "stopped": "all epochs are done"}, probe):
        many, few = (said(figures(validation_rows=rows, **changed)) for rows in (400, 12))
        assert {"overfitting", "underfitting"} & set(many)
        assert not {"overfitting", "underfitting"} & set(few)
    probe["train_score"] = 0.92
    assert "overfitting" not in said(figures(validation_rows=25, **probe)), "a gap that chance explains"
    assert "overfitting" in said(figures(validation_rows=400, **probe))


def test_what_was_cut_short_or_left_out_is_said() -> None:
    cut = {"by": "cancel", "method": "lora", "steps": 1, "total_steps": 18, "not_trained": ["full"]}
    found = said(figures(cut_short=cut))["cut_short"]
    assert found.severity == "warning"
    for part in ("cancelled", "1 of 18 steps", "full was not trained"):
        assert part in found.message
    left = [
        {"method": "full", "reason": "cannot_be_told_apart", "message": "full is left out: why"},
        {"method": "lora", "reason": "cancelled", "message": "lora is left out: the job was cancelled"},
    ]
    assert said(figures(left_out=left))["methods_left_out"].message == "Full is left out: why."
    assert "cut_short" not in said(figures()) and "methods_left_out" not in said(figures())


def test_figures_of_validation_alone_come_with_a_warning() -> None:
    assert "no_test_rows" in said(figures(side_name="validation"))
    assert "no_test_rows" not in said(figures())


def test_warnings_come_first() -> None:
    found = verdict(figures(side_name="validation", against_baseline=against(0.05, 0.001)))
    severities = [judgement.severity for judgement in found]
    assert severities == sorted(severities, key=["warning", "info", "good"].index)
