from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.calibration import expected_calibration_error, fit_temperature, negative_log_likelihood
from finetune.evaluation import report, score
from finetune.losses import class_weights
from finetune.optimizers import schedule
from finetune.training import epoch_order
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
def test_schedules_warm_up_and_end_where_they_should(name: str) -> None:
    factor = schedule(name, total_steps=100, warmup_ratio=0.1)
    values = [factor(step) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == 1.0 == values[10]
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] == (1.0 if name == "constant" else pytest.approx(0.0, abs=0.02))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=400), st.integers(1, 40), st.integers(0, 5))
def test_an_epoch_is_a_partition_of_the_rows(lengths: list[int], batch: int, epoch: int) -> None:
    batches = list(epoch_order(lengths, rows_per_batch=batch, seed=1, epoch=epoch))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(len(rows) for rows in batches) <= batch
    again = list(epoch_order(lengths, rows_per_batch=batch, seed=1, epoch=epoch))
    assert all((one == other).all() for one, other in zip(batches, again, strict=True))


def test_epochs_and_seeds_differ_and_batches_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(4, 256, size=2000).tolist()
    orders = [
        np.concatenate(list(epoch_order(lengths, rows_per_batch=32, seed=seed, epoch=epoch))).tolist()
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    batches = list(epoch_order(lengths, rows_per_batch=32, seed=1, epoch=0))
    padded = sum(max(lengths[row] for row in rows) * len(rows) for rows in batches)
    assert sum(lengths) / padded > 0.9
