from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluation.calibration import expected_calibration_error, fit_temperature, negative_log_likelihood
from finetune.evaluation.classification import report, score
from finetune.evaluation.tasks import RULES
from finetune.evaluation.tasks.class_weights import class_weights
from finetune.jobs.hyperparameters import Scheduler
from finetune.training.optimizers import schedule
from modeling.heads import softmax


def sampled(temperature: float, rows: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large for the labels drawn from them."""
    draw = np.random.default_rng(0)
    true = draw.normal(scale=1.5, size=(rows, 4)).astype(np.float32)
    labels = np.asarray([draw.choice(4, p=row / row.sum()) for row in softmax(true).astype(np.float64)])
    return true * np.float32(temperature), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found_again(temperature: float) -> None:
    logits, labels = sampled(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)
    assert expected_calibration_error(logits, labels, temperature=temperature) < 0.02


def test_calibration_error_of_the_overconfident_is_large() -> None:
    logits, labels = sampled(5.0)
    assert expected_calibration_error(logits, labels) > 0.1


def test_a_perfect_validation_set_does_not_make_every_answer_certain() -> None:
    logits = np.asarray([[3.0, 0.0], [0.0, 3.0]] * 20, np.float32)
    labels = np.asarray([0, 1] * 20)
    certain = softmax(logits / np.float32(fit_temperature(logits, labels))).max()
    assert 0.9 < certain < 0.999


def test_no_rows_leave_the_temperature_alone() -> None:
    assert fit_temperature(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)) == 1.0


def test_likelihood_is_stable_for_huge_logits() -> None:
    assert negative_log_likelihood(np.asarray([[1e4, 0]], np.float32), np.asarray([1])) == pytest.approx(1e4)


def test_metrics_by_hand() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 1]]
    labels = np.asarray([0, 0, 0, 1, 1])
    assert score("accuracy", logits, labels) == pytest.approx(0.8)
    assert score("macro_f1", logits, labels) == pytest.approx((0.8 + 0.8) / 2)  # the absent third class does not count
    document = report(logits, labels, ["a", "b", "c"], temperature=1.0)
    assert document["confusion_matrix"] == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert [row["rows"] for row in document["per_class"]] == [3, 2, 0]
    assert document["per_class"][2] == {"label": "c", "precision": None, "recall": None, "f1": None, "rows": 0}
    low, high = document["accuracy_interval_95"]
    assert low <= 0.8 <= high


def test_class_weights() -> None:
    labels = np.asarray([0] * 90 + [1] * 10)
    assert class_weights("none", labels, ["a", "b"]) is None
    balanced = class_weights("balanced", labels, ["a", "b"])
    assert balanced is not None
    np.testing.assert_allclose(balanced, [100 / 180, 5.0], rtol=1e-6)
    mapped = class_weights({"b": 3.0}, labels, ["a", "b"])
    assert mapped is not None and mapped[1] / mapped[0] == pytest.approx(3.0)
    assert float(mapped[labels].mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_warm_up_and_end_where_they_should(name: Scheduler) -> None:
    factor = schedule(name, total_steps=100, warmup_ratio=0.1)
    values = [factor(step) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == 1.0 == values[10]
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] == (1.0 if name == "constant" else pytest.approx(0.0, abs=0.02))


def test_the_matrix_of_very_many_classes_is_left_out() -> None:
    for classes, has_matrix in ((1000, True), (1001, False)):
        labels, names = np.arange(20) % classes, [str(number) for number in range(classes)]
        document = report(np.eye(classes, dtype=np.float32)[labels], labels, names, temperature=1.0)
        assert ("confusion_matrix" in document) is has_matrix
        assert len(document["per_class"]) == classes
        assert bool(RULES["single_label"].tables(document, names)) is has_matrix
