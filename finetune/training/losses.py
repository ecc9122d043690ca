"""Losses: pure functions of torch tensors, and the choice of one by plan and task.

Losses of a head's output give one value a row, so that a step's mean does not depend on how its rows are divided into
passes. Losses of vectors compare the rows of one pass with each other and give one value a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from finetune.jobs.hyperparameters import EMBEDDING_LOSSES
from finetune.jobs.plan import TrainingPlan

# Margins in cosine distance: contrastive as sentence-transformers has it, triplet as FaceNet on vectors of length 1.
CONTRASTIVE_MARGIN, TRIPLET_MARGIN = 0.5, 0.2
_SCALE = 20.0  # of cosines before a softmax: a temperature of 0.05, as MNRL and CoSENT are trained with


# The choice


@dataclass(frozen=True, slots=True)
class Objective:
    """What training minimises: the weighted mean of `of_output` over a step's rows, plus that of `of_vectors`.

    `of_output(output, targets)` gives float32[rows], already weighted; `weights(targets)` what to divide their sum by.
    `of_vectors(vectors, targets)` gives one value for the rows of a pass. `plain(output, targets)` is float32[rows] of
    what validation counts as the loss: no smoothing, no weights, whatever is minimised.
    """

    of_output: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weights: Callable[[torch.Tensor], torch.Tensor]
    plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    of_vectors: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


def build_loss(plan: TrainingPlan, *, kind: str = "single_label", weight: torch.Tensor | None = None) -> Objective:
    """Build the plan's loss for a kind of task. `weight` is float32[classes], of several labels that of their
    positives, or None.

    Targets are class indices int64[rows] for one label, values float[rows] for a number, float[rows, labels] of
    zeros and ones for several labels, or tags int64[rows, width] for entities. Losses of vectors are added to
    cross-entropy, in equal parts (Gunel et al., Supervised contrastive learning for pre-trained language model
    fine-tuning, ICLR 2021).
    """
    if kind == "regression":
        of_values = {"mse": mse, "huber": huber}[plan.loss]
        return Objective(
            lambda output, targets: of_values(output.squeeze(-1), targets.float()),
            _ones,
            plain=lambda output, targets: mse(output.squeeze(-1), targets.float()),
        )
    if kind == "token_labels":
        return Objective(tag_losses, _tagged_words, plain=_mean_tag_loss)
    if kind == "multi_label":
        of_labels = partial(focal_of_labels, gamma=plan.focal_gamma) if plan.loss == "focal" else bce
        return Objective(partial(of_labels, weight=weight), _ones, plain=bce)
    smoothing = plan.label_smoothing
    name = "cross_entropy" if plan.loss in EMBEDDING_LOSSES else plan.loss
    of_output: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = {
        "cross_entropy": partial(cross_entropy, weight=weight, smoothing=smoothing),
        "focal": partial(focal, gamma=plan.focal_gamma, weight=weight, smoothing=smoothing),
        "bce": partial(one_versus_rest, weight=weight, smoothing=smoothing),
    }[name]
    of_vectors = _OF_VECTORS[plan.loss] if plan.loss in EMBEDDING_LOSSES else None
    return Objective(of_output, partial(_class_weight, weight=weight), cross_entropy, of_vectors)


def _ones(targets: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(targets), device=targets.device)


def _class_weight(targets: torch.Tensor, *, weight: torch.Tensor | None) -> torch.Tensor:
    return _ones(targets) if weight is None else weight[targets]


# Of a head's output, one value a row


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, weight: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """float32[rows] of logits [rows, classes] and class indices [rows], each times its class's weight."""
    return F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing, reduction="none")


def tag_losses(logits: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
    """The sum float32[rows] of the cross-entropies of a row's words, of logits [rows, width, tags] and tags [rows,
    width], which are -100 where no word begins."""
    return F.cross_entropy(logits.transpose(1, 2), tags, reduction="none").sum(-1)


def _tagged_words(tags: torch.Tensor) -> torch.Tensor:
    return (tags >= 0).sum(-1).float()


def _mean_tag_loss(logits: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
    return tag_losses(logits, tags) / _tagged_words(tags).clamp(min=1)


def focal(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float,
    weight: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Lin et al., Focal loss for dense object detection, ICCV 2017: -(1 - p)^gamma log p of the true class.

    With `smoothing` the sum over all classes of the smoothed target times that. With gamma 0 it is cross-entropy.
    """
    log_p = logits.log_softmax(-1)
    terms = -((1 - log_p.exp()).clamp(min=0) ** gamma) * log_p
    terms = terms if weight is None else terms * weight
    return (_smoothed(labels, logits.shape[-1], smoothing, terms.dtype) * terms).sum(-1)


def bce(output: torch.Tensor, targets: torch.Tensor, *, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Binary cross-entropy float32[rows], the mean over the labels; `weight` is one a label, of its positives."""
    return F.binary_cross_entropy_with_logits(output, targets.float(), pos_weight=weight, reduction="none").mean(-1)


def focal_of_labels(
    output: torch.Tensor, targets: torch.Tensor, *, gamma: float, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The focal loss as Lin et al. have it, of each label by itself; the mean over the labels."""
    targets = targets.float()
    log_p = F.logsigmoid(torch.where(targets > 0, output, -output))
    terms = -((1 - log_p.exp()).clamp(min=0) ** gamma) * log_p
    return (terms if weight is None else terms * torch.where(targets > 0, weight, 1.0)).mean(-1)


def one_versus_rest(
    logits: torch.Tensor, labels: torch.Tensor, *, weight: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Binary cross-entropy of each class against the others, for rows with one class; a row has its class's weight."""
    losses = bce(logits, _smoothed(labels, logits.shape[-1], smoothing, logits.dtype))
    return losses if weight is None else losses * weight[labels]


def mse(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(values, targets, reduction="none")


def huber(values: torch.Tensor, targets: torch.Tensor, *, delta: float = 1.0) -> torch.Tensor:
    """Huber, 1964: half the squared error up to `delta`, linear beyond."""
    return F.huber_loss(values, targets, reduction="none", delta=delta)


def _smoothed(labels: torch.Tensor, classes: int, smoothing: float, dtype: torch.dtype) -> torch.Tensor:
    one_hot = F.one_hot(labels, classes).to(dtype)
    return one_hot * (1 - smoothing) + smoothing / classes


# Of vectors. Similarity is the cosine.


def contrastive(vectors: torch.Tensor, labels: torch.Tensor, *, margin: float = CONTRASTIVE_MARGIN) -> torch.Tensor:
    """Hadsell, Chopra and LeCun, CVPR 2006, over all pairs of rows: those of one class are drawn together, others
    pushed beyond `margin`. Distance is one minus the cosine; the mean over the pairs."""
    above = torch.ones(len(labels), len(labels), dtype=torch.bool, device=labels.device).triu(1)
    if not above.any():
        return vectors.sum() * 0
    distance = 1 - _cosines(vectors)[above]
    return 0.5 * torch.where(_alike(labels)[above], distance**2, (margin - distance).clamp(min=0) ** 2).mean()


def triplet(vectors: torch.Tensor, labels: torch.Tensor, *, margin: float = TRIPLET_MARGIN) -> torch.Tensor:
    """FaceNet's loss (Schroff, Kalenichenko and Philbin, CVPR 2015) on the hardest of a pass (Hermans, Beyer and Leibe,
    2017): each row with the furthest of its class and the nearest of another, which must be further by `margin`.
    Rows that have no partner of either kind do not count."""
    cosines, alike = _cosines(vectors), _alike(labels)
    others = ~alike
    partners = alike & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    hardest = cosines.masked_fill(~partners, torch.inf).amin(1)
    nearest = cosines.masked_fill(~others, -torch.inf).amax(1)
    counts = partners.any(1) & others.any(1)
    if not counts.any():
        return vectors.sum() * 0
    return (nearest[counts] - hardest[counts] + margin).clamp(min=0).mean()


def mnrl(vectors: torch.Tensor, labels: torch.Tensor, *, scale: float = _SCALE) -> torch.Tensor:
    """In-batch negatives (Henderson et al., Efficient natural language response suggestion, 2017): cross-entropy over
    scaled cosines. Every other row of a class is a positive, those of other classes are the negatives; the mean over
    the positives (Khosla et al., Supervised contrastive learning, 2020, without positives as negatives)."""
    scores, alike = _cosines(vectors) * scale, _alike(labels)
    partners = alike & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    counts = partners.any(1) & (~alike).any(1)
    if not counts.any():
        return vectors.sum() * 0
    negatives = scores.masked_fill(alike, -torch.inf).logsumexp(1, keepdim=True)
    losses = (torch.logaddexp(scores, negatives) - scores)[counts]
    chosen = partners[counts]
    return ((losses.masked_fill(~chosen, 0)).sum(1) / chosen.sum(1)).mean()


def cosent(vectors: torch.Tensor, labels: torch.Tensor, *, scale: float = _SCALE) -> torch.Tensor:
    """CoSENT (Su, 2022) over all pairs of rows: log(1 + sum of exp(scale (s_low - s_high)) over all two pairs of which
    one is of a single class, and wanted nearer, and the other is not.

    The sum over two pairs factors, so it costs no more than the pairs: logsumexp(low) + logsumexp(-high).
    """
    above = torch.ones(len(labels), len(labels), dtype=torch.bool, device=labels.device).triu(1)
    cosines, alike = (_cosines(vectors) * scale)[above], _alike(labels)[above]
    if not alike.any() or alike.all():
        return vectors.sum() * 0
    return F.softplus(cosines[~alike].logsumexp(0) + (-cosines[alike]).logsumexp(0))


_OF_VECTORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "contrastive": contrastive,
    "triplet": triplet,
    "mnrl": mnrl,
    "cosent": cosent,
}


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    normal = F.normalize(vectors.float(), dim=-1)
    return normal @ normal.t()


def _alike(labels: torch.Tensor) -> torch.Tensor:
    return labels[:, None] == labels[None, :]
