"""What each task answers for a row's scores, which parameters it refuses, and what it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from prometheus_client import CollectorRegistry

from modeling.tasks import NO_CALIBRATION, TASKS, Calibration, FeatureExtraction, Options, RowOutput
from modeling.tasks.regression import Value
from service.api.problems import problem_for
from service.inference.errors import ParameterUnfit
from service.inference.predictor import check_options
from service.metrics import ModelLabels, ServingMetrics

LABELS = ("a", "b", "c", "d")
THRESHOLDS = (0.5, 0.2, 0.9, 0.5)
one, many, value_task, _ = TASKS.values()
CALIBRATION = Calibration(thresholds=THRESHOLDS)
probabilities = arrays(np.float32, 4, elements=st.floats(0, 1, width=32))


def given_by(row: Any, threshold: float | None = None, top_k: int | None = None) -> Any:
    return many.reduce([RowOutput(row)], LABELS, CALIBRATION, Options(threshold=threshold, top_k=top_k))


@given(probabilities, st.none() | st.floats(0, 1, width=32), st.none() | st.integers(1, 6))
def test_labels_are_those_that_reach_their_threshold_best_first(
    row: Any, threshold: float | None, top_k: int | None
) -> None:
    answered = given_by(row, threshold, top_k)
    limits = THRESHOLDS if threshold is None else [threshold] * 4
    assert set(answered.labels) == {
        label for label, p, limit in zip(LABELS, row, limits, strict=True) if p >= np.float32(limit)
    }
    scores = given_by(row, threshold).scores
    assert answered.scores == scores[:top_k]
    assert [score.score for score in scores] == sorted(row.tolist(), reverse=True)
    best_first = [score.label for score in scores]
    assert answered.labels == sorted(answered.labels, key=best_first.index)


def test_no_label_and_every_label() -> None:
    row = np.asarray([0.4, 0.1, 0.8, 0.0], np.float32)
    assert given_by(row).labels == []
    assert given_by(row, 0.0).labels == ["c", "a", "b", "d"]
    assert given_by(row, 0.4).labels == ["c", "a"]
    assert given_by(row, 1.0).labels == []


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_value_is_the_heads_output(value: float) -> None:
    row = value_task.scores(np.asarray([[value]], np.float32), NO_CALIBRATION)[0]
    assert value_task.reduce([RowOutput(row)], (), NO_CALIBRATION, Options()) == Value(0, value)


@pytest.mark.parametrize("parameter", ["top_k", "threshold"])
def test_a_value_has_no_scores_to_bound(parameter: str) -> None:
    values: dict[str, Any] = {parameter: 1}
    options = Options(**values)
    for task in (many, one, FeatureExtraction("feature-extraction", "text")):
        check_options(task, options)
    check_options(value_task, Options(return_embedding=True, truncate=False, max_length=8))
    with pytest.raises(ParameterUnfit, match=parameter) as refused:
        check_options(value_task, options)
    problem = problem_for(refused.value)
    assert problem is not None and (problem.status, problem.code) == (422, "invalid_request")
    assert problem.errors[0]["loc"] == ["body", "parameters", parameter]


# Metrics


def observe(
    metrics: ServingMetrics, labels: ModelLabels, answers: list[Any], calibration: Calibration = NO_CALIBRATION
) -> None:
    series = metrics.of_model(labels).answers
    for histogram, values in zip(series, TASKS[labels[2]].observed(answers, calibration), strict=True):
        for value in values:
            histogram.observe(value)


def samples(metrics: ServingMetrics, name: str) -> dict[str, float]:
    """Cumulative counts by upper bound, of the one model's series; empty where there is none."""
    return {
        sample.labels["le"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"polyhead_{name}_bucket" and sample.labels["model"] == "m"
    }


@pytest.fixture
def metrics() -> ServingMetrics:
    return ServingMetrics(CollectorRegistry())


def test_labels_are_counted_with_the_confidence_of_the_best(metrics: ServingMetrics) -> None:
    labels = ("m", "1", "text-multi-label", "default")
    metrics.start_model(*labels)
    rows = [np.asarray(row, np.float32) for row in ([0.95, 0.3, 0, 0], [0.45, 0, 0, 0])]
    observe(metrics, labels, [given_by(row) for row in rows])
    confidence, count = samples(metrics, "prediction_confidence"), samples(metrics, "prediction_labels")
    assert (confidence["0.4"], confidence["0.5"], confidence["0.9"], confidence["1.0"]) == (0, 1, 1, 2)
    assert (count["0.0"], count["1.0"], count["2.0"]) == (1, 1, 2)
    assert samples(metrics, "prediction_quantile") == {}


def test_values_are_counted_by_their_place_among_those_of_validation(metrics: ServingMetrics) -> None:
    labels = ("m", "1", "text-regression", "default")
    metrics.start_model(*labels)
    calibration = Calibration(value_shares=((10, 0.0), (20, 0.25), (40, 0.5), (80, 0.75), (160, 1.0)))
    for value in (-5.0, 10.0, 30.0, 79.0, 160.0, 1e9):
        observe(metrics, labels, [Value(0, value)], calibration)
    counted = samples(metrics, "prediction_quantile")
    assert (counted["0.0"], counted["0.3"], counted["0.4"], counted["0.8"]) == (2, 2, 3, 4)
    assert (counted["0.999"], counted["1.0"]) == (4, 6)
    assert samples(metrics, "prediction_confidence") == {}


def test_without_a_reference_values_are_not_counted(metrics: ServingMetrics) -> None:
    labels = ("m", "1", "text-regression", "default")
    observe(metrics, labels, [Value(0, 1.0)])
    assert set(samples(metrics, "prediction_quantile").values()) == {0.0}


@pytest.mark.parametrize("task", ["text-classification", "text-multi-label", "text-regression"])
def test_a_stopped_model_leaves_no_series(metrics: ServingMetrics, task: str) -> None:
    before = metrics.render()[0]
    metrics.start_model("m", "1", task, "default")
    metrics.of_model(("m", "1", task, "default"))
    assert b'model="m"' in metrics.render()[0]
    metrics.stop_model("m", "1", task, "default")
    assert b'model="m"' not in metrics.render()[0] and b'model="m"' not in before
