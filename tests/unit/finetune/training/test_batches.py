"""Every row once an epoch, passes within their bounds, padding where it belongs."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.training.batches import Ahead, FeatureRows, epoch_order, epoch_size, passes
from modeling.inputs import single
from modeling.inputs.text import TextPreprocessor
from modeling.testing import write_tiny_checkpoint

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(lengths, st.integers(1, 40), st.integers(0, 5))
def test_an_epoch_has_every_row_once_and_is_the_same_when_asked_again(sizes: list[int], rows: int, seed: int) -> None:
    steps = [list(epoch_order(sizes, rows_per_step=rows, seed=seed, epoch=1)) for _ in range(2)]
    assert sorted(np.concatenate(steps[0]).tolist()) == list(range(len(sizes)))
    assert all(np.array_equal(a, b) for a, b in zip(*steps, strict=True))
    assert all(len(step) <= rows for step in steps[0])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 40), st.integers(0, 5))
def test_rows_of_rare_classes_come_again_until_all_classes_have_as_many(
    labels: list[int], rows: int, seed: int
) -> None:
    classes, sizes = np.asarray(labels), [7] * len(labels)
    steps = [list(epoch_order(sizes, rows_per_step=rows, seed=seed, epoch=1, classes=classes)) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*steps, strict=True))
    drawn = np.concatenate(steps[0])
    assert len(drawn) == epoch_size(len(labels), classes)
    times = np.bincount(drawn, minlength=len(labels))
    most = np.bincount(classes).max()
    for label in set(labels):
        own = times[classes == label]
        assert own.sum() == most
        assert own.max() - own.min() <= 1, "each row as often as the others of its class"


@given(lengths, st.integers(1, 40), st.integers(1, 1000))
def test_passes_hold_every_row_once_within_the_bounds(sizes: list[int], most_rows: int, most_tokens: int) -> None:
    array, rows = np.asarray(sizes), np.arange(len(sizes))
    parts = passes(array, rows, most_rows=most_rows, most_tokens=most_tokens)
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    for part in parts:
        assert len(part) <= most_rows
        assert len(part) == 1 or len(part) * array[part].max() <= most_tokens
    assert array[parts[0]].max() == max(sizes)


def test_rows_of_similar_length_go_together() -> None:
    sizes = np.random.default_rng(0).integers(5, 250, 1000)
    padded = sum(len(step) * sizes[step].max() for step in epoch_order(sizes, rows_per_step=32, seed=0, epoch=0))
    assert padded < 1.1 * sizes.sum()


def test_epochs_and_seeds_differ() -> None:
    sizes = np.random.default_rng(0).integers(5, 250, 1000)
    orders = [
        np.concatenate(list(epoch_order(sizes, rows_per_step=32, seed=seed, epoch=epoch))).tolist()
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_rows_kept_end_to_end_make_the_batches_of_the_preprocessor(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    preprocessor = TextPreprocessor(folder, limit=16)
    texts = ["a good film", "", "dull", "the plot of a very long story it was " * 5]
    kept = FeatureRows.encode(preprocessor, texts)
    encoded = single(preprocessor.encode(texts))
    assert kept.lengths.tolist() == [row.cost for row in encoded]
    for rows in ([0, 1, 2, 3], [2], [1, 0], [3, 3]):
        chosen = [encoded[row] for row in rows]
        expected = preprocessor.collate(chosen, max(row.cost for row in chosen))
        batch = kept.batch(np.asarray(rows))
        assert list(batch) == list(expected)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, expected[name])
            assert array.dtype == expected[name].dtype
    assert len(FeatureRows.encode(preprocessor, [])) == 0


def test_the_next_step_is_made_on_another_thread_and_can_be_forgotten() -> None:
    made: list[tuple[int, str]] = []
    offset = 0

    def make(step: int) -> int:
        made.append((step, threading.current_thread().name))
        return step + offset

    ahead = Ahead(make, last=4)
    assert [ahead.get(0), ahead.get(1)] == [0, 1]
    offset = 100
    ahead.forget()
    assert [ahead.get(1), ahead.get(2), ahead.get(3)] == [101, 102, 103]
    ahead.close()
    assert {step for step, name in made if name.startswith("batches")} >= {1, 3}
    assert max(step for step, _ in made) == 3
