"""Losses against each other, against slow definitions, and at their ends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from finetune.data.targets import TARGETS
from finetune.evaluation.tasks import RULES
from finetune.jobs.hyperparameters import parse_hyperparameters
from finetune.jobs.plan import DatasetProfile, TrainingPlan, WorkerProfile, resolve
from finetune.training import losses

DATA = DatasetProfile(train_rows=100, validation_rows=10, test_rows=10, labels=4, max_length_p99=20)


def plan(**values: object) -> TrainingPlan:
    wanted = parse_hyperparameters(dict(values))
    return resolve(wanted, data=DATA, worker=WorkerProfile(), parameters=1, model_max_length=64)


def drawn(seed: int, rows: int = 12, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=random), torch.randint(0, width, (rows,), generator=random)


seeds = st.integers(0, 1000)


@given(seeds, st.sampled_from([0.0, 0.1]), st.booleans())
def test_focal_with_gamma_0_is_cross_entropy(seed: int, smoothing: float, is_weighted: bool) -> None:
    logits, labels = drawn(seed)
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0]) if is_weighted else None
    focal = losses.focal(logits, labels, gamma=0.0, weight=weight, smoothing=smoothing)
    torch.testing.assert_close(focal, losses.cross_entropy(logits, labels, weight=weight, smoothing=smoothing))


@given(seeds, st.floats(0.5, 5))
def test_focal_takes_from_the_rows_that_are_right(seed: int, gamma: float) -> None:
    logits, labels = drawn(seed)
    ratio = losses.focal(logits, labels, gamma=gamma) / losses.cross_entropy(logits, labels)
    p = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(ratio, (1 - p) ** gamma, rtol=1e-4, atol=1e-5)


@given(seeds)
def test_one_versus_rest_is_binary_cross_entropy_of_one_hot_rows(seed: int) -> None:
    logits, labels = drawn(seed)
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 4).float(), reduction="none").mean(1)
    torch.testing.assert_close(losses.one_versus_rest(logits, labels), expected)


@given(seeds)
def test_huber_is_half_of_mse_near_and_linear_far(seed: int) -> None:
    values, _ = drawn(seed)
    near = losses.huber(values[:, 0] * 0.1, torch.zeros(12))
    torch.testing.assert_close(near[:3], 0.5 * losses.mse(values[:, 0] * 0.1, torch.zeros(12))[:3])
    far = losses.huber(torch.tensor([10.0, 11.0]), torch.zeros(2))
    assert float(far[1] - far[0]) == pytest.approx(1.0)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "focal"])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 3.0]])
def test_how_a_step_is_divided_does_not_change_its_mean(loss: str, weights: list[float] | None) -> None:
    logits, labels = drawn(3)
    objective = losses.build_loss(plan(loss=loss), weight=None if weights is None else torch.tensor(weights))
    whole = objective.of_output(logits, labels).sum() / objective.weights(labels).sum()
    total = objective.weights(labels).sum()
    parts = sum(objective.of_output(logits[a:b], labels[a:b]).sum() / total for a, b in ((0, 1), (1, 7), (7, 12)))
    torch.testing.assert_close(parts, whole)
    if loss == "cross_entropy":
        weight = None if weights is None else torch.tensor(weights)
        torch.testing.assert_close(whole, F.cross_entropy(logits, labels, weight=weight, label_smoothing=0.05))


def test_every_kind_builds_each_of_its_losses() -> None:
    logits, labels = drawn(0)
    targets = {"single_label": labels, "regression": logits[:, 0], "multi_label": (logits > 0).float()}
    targets["token_labels"] = labels[:, None]
    for kind, target in TARGETS.items():
        for name in target.losses:
            asked = plan() if kind != "single_label" else plan(loss=name)
            objective = losses.build_loss(asked.model_copy(update={"loss": name}), kind=kind)
            output = logits[:, :1] if kind == "regression" else logits
            output = logits[:, None] if kind == "token_labels" else output  # a word a row
            values = objective.of_output(output, targets[kind])
            assert values.shape == (12,) and torch.isfinite(values).all()
            assert objective.weights(targets[kind]).shape == (12,)


def test_the_plain_loss_is_validations_whatever_is_minimised() -> None:
    logits, labels = drawn(0)
    values = logits[:, 0] - logits[:, 0].mean()
    cases: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        "single_label": (logits, labels),
        "multi_label": (logits, (drawn(1)[0] > 0).float()),
        "regression": (logits[:, 1:2], values / values.std(correction=0)),  # as training has them
    }
    for kind, (output, targets) in cases.items():
        expected = RULES[kind].loss(output.numpy(), targets.numpy())
        for name in TARGETS[kind].losses:
            asked = plan(label_smoothing=0.3).model_copy(update={"loss": name})
            weight = None if kind == "regression" else torch.tensor([0.5, 1.0, 2.0, 3.0])
            objective = losses.build_loss(asked, kind=kind, weight=weight)
            assert float(objective.plain(output, targets).mean()) == pytest.approx(expected, rel=1e-4)


# Losses of vectors


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


@settings(max_examples=20)
@given(seeds)
def test_contrastive_by_its_definition(seed: int) -> None:
    vectors, labels = drawn(seed)
    found = []
    for i, j in itertools.combinations(range(12), 2):
        distance = 1 - cosine(vectors[i], vectors[j])
        far = max(0.0, losses.CONTRASTIVE_MARGIN - distance)
        found.append(0.5 * (distance**2 if labels[i] == labels[j] else far**2))
    assert float(losses.contrastive(vectors, labels)) == pytest.approx(sum(found) / len(found), abs=1e-5)


@settings(max_examples=20)
@given(seeds)
def test_triplet_takes_the_hardest_of_each_kind(seed: int) -> None:
    vectors, labels = drawn(seed)
    found = []
    for i in range(12):
        alike = [cosine(vectors[i], vectors[j]) for j in range(12) if j != i and labels[i] == labels[j]]
        others = [cosine(vectors[i], vectors[j]) for j in range(12) if labels[i] != labels[j]]
        if alike and others:
            found.append(max(0.0, max(others) - min(alike) + losses.TRIPLET_MARGIN))
    assert float(losses.triplet(vectors, labels)) == pytest.approx(sum(found) / len(found), abs=1e-5)


@settings(max_examples=20)
@given(seeds)
def test_mnrl_by_its_definition(seed: int) -> None:
    vectors, labels = drawn(seed)
    means = []
    for i in range(12):
        negatives = [math.exp(20 * cosine(vectors[i], vectors[j])) for j in range(12) if labels[i] != labels[j]]
        positives = [
            math.exp(20 * cosine(vectors[i], vectors[j])) for j in range(12) if j != i and labels[i] == labels[j]
        ]
        if positives and negatives:
            means.append(sum(-math.log(p / (p + sum(negatives))) for p in positives) / len(positives))
    assert float(losses.mnrl(vectors, labels)) == pytest.approx(sum(means) / len(means), rel=1e-3, abs=1e-4)


@settings(max_examples=20)
@given(seeds)
def test_cosent_by_its_definition(seed: int) -> None:
    vectors, labels = drawn(seed)
    near: list[float] = []
    far: list[float] = []
    for i, j in itertools.combinations(range(12), 2):
        (near if labels[i] == labels[j] else far).append(cosine(vectors[i], vectors[j]))
    if near and far:
        expected = math.log1p(sum(math.exp(20 * (low - high)) for low, high in itertools.product(far, near)))
        assert float(losses.cosent(vectors, labels)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["contrastive", "triplet", "mnrl", "cosent"])
@pytest.mark.parametrize("labels", [[0], [1, 1, 1], [0, 1, 2], [0, 0, 1]])
def test_a_pass_without_pairs_to_compare_gives_a_gradient_of_nothing(name: str, labels: list[int]) -> None:
    of_vectors = losses.build_loss(plan(loss=name)).of_vectors
    assert of_vectors is not None
    vectors = torch.randn(len(labels), 4, requires_grad=True)
    value = of_vectors(vectors, torch.tensor(labels))
    value.backward()
    assert torch.isfinite(value) and vectors.grad is not None and torch.isfinite(vectors.grad).all()


@pytest.mark.parametrize("name", ["contrastive", "triplet", "mnrl", "cosent"])
def test_following_the_gradient_brings_classes_together(name: str) -> None:
    of_vectors = losses.build_loss(plan(loss=name)).of_vectors
    assert of_vectors is not None
    vectors, labels = drawn(5)
    vectors.requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=0.05)

    def spread() -> float:
        with torch.no_grad():
            normal = F.normalize(vectors, dim=-1)
            cosines, alike = normal @ normal.t(), labels[:, None] == labels[None, :]
            return float(cosines[alike].mean() - cosines[~alike].mean())

    before = spread()
    for _ in range(60):
        optimizer.zero_grad()
        of_vectors(vectors, labels).backward()
        optimizer.step()
    assert spread() > before + 0.5


def test_words_count_alike_however_long_their_texts_are() -> None:
    """The sum over a step's rows, divided by its words, is the mean over all words."""
    torch.manual_seed(0)
    logits, tags = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    tags[0, 2:], tags[1] = -100, -100  # a row of two words, and one without any
    objective = losses.build_loss(plan(), kind="token_labels")
    mean = objective.of_output(logits, tags).sum() / objective.weights(tags).sum()
    torch.testing.assert_close(mean, F.cross_entropy(logits.reshape(-1, 7), tags.reshape(-1)))
    assert objective.plain(logits, tags)[1] == 0
