"""Few rows per class: the encoder is tuned on pairs, then logistic regression on its vectors (Tunstall et al., 2022).

Pairs are never listed: each step draws rows evenly over the classes and compares all of them with each
other, so 32 rows give 496 pairs for the price of 32 forward passes. There is no checkpoint: a run that
is resumed draws the same pairs from the start, which takes a minute or two.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from finetune.jobs.failures import Cancelled, NonFiniteLoss
from finetune.jobs.records import JobPhase
from finetune.training.methods.candidate import CANCELLED, OUT_OF_TIME, Candidate, Servable
from finetune.training.methods.linear import fit_logistic
from finetune.training.methods.tuned import Classifier, load_network, new_classifier, serve_own
from finetune.training.run_context import Run, embed, length_batches
from modeling.inputs import Example, Features, single
from modeling.weights import FloatArray, IntArray

ROWS_PER_STEP = 32
# Of the head, as in `linear`. Held-out rows are too few to choose it by, and rows that the body was tuned on always
# ask for less regularisation than new ones. Weaker ones, and SetFit's own head, lost on R8 (docs/log.md).
STRENGTH = 0.01
_EVALUATION_TOKENS = 4096


def train(run: Run) -> Candidate:
    started = time.monotonic()
    run.link.phase(JobPhase.TRAINING)
    train_rows = single(run.preprocessor.encode(run.train.examples))
    validation_rows = single(run.preprocessor.encode(run.validation.examples))
    body, steps = _tuned(run, train_rows, run.train.labels, steps=run.plan_of("setfit").total_steps)
    features, held_out = _vectors(run, body, train_rows), _vectors(run, body, validation_rows)

    head = fit_logistic(run, features, run.train.labels, strength=STRENGTH).head

    return Candidate(
        method="setfit",
        kind="full",
        validation_logits=head.logits(held_out),
        finish=partial(_servable, run, body, steps, [*train_rows, *validation_rows]),
        seconds=time.monotonic() - started,
        details={"steps": steps, "stopped": _stopped(run, steps)},
    )


def _stopped(run: Run, steps: int) -> str | None:
    if steps == run.plan_of("setfit").total_steps:
        return None
    return CANCELLED if run.is_winding_down else OUT_OF_TIME


def _servable(run: Run, body: Classifier, steps: int, rows: Sequence[Features]) -> Servable:
    """Tuned again on training and validation rows together: with few rows the held-out ones are many."""
    labels = np.concatenate([run.train.labels, run.validation.labels])
    left = run.seconds_left()
    if not run.is_winding_down and (left is None or left > 0):
        again, done = _tuned(run, rows, labels, steps=steps)
        body = again if done == steps else body
    # Vectors of validation rows that the body has not been tuned on serve the head as well.
    head = fit_logistic(run, _vectors(run, body, rows), labels, strength=STRENGTH).head
    engine, _, write_extra = serve_own(run, body.encoder, method="setfit")

    def logits(examples: Sequence[Example]) -> FloatArray:
        return head.logits(embed(engine, run.preprocessor, examples))

    return Servable(logits=logits, head=head, write_extra=write_extra)


def _tuned(run: Run, rows: Sequence[Features], labels: IntArray, *, steps: int) -> tuple[Classifier, int]:
    """A body tuned on pairs for `steps` steps, or as many as the budget allows. Raises `NonFiniteLoss`."""
    torch.manual_seed(run.plan.seed)
    body = new_classifier(run, load_network(run)).to(run.plan.device)
    start = {name: value.clone() for name, value in body.encoder.state_dict().items()}
    body.encoder.train()
    plan = run.plan_of("setfit")
    optimizer = torch.optim.AdamW(body.encoder.parameters(), lr=plan.learning_rate, weight_decay=run.plan.weight_decay)
    draw = np.random.default_rng(run.plan.seed)
    done = 0
    while done < steps and not _must_end(run):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _rate(done, steps, run.plan.warmup_ratio)
        picked = draw_rows(labels, ROWS_PER_STEP, draw)
        with torch.autocast(run.plan.device, dtype=torch.bfloat16, enabled=run.plan.precision == "bf16"):
            vectors = _forward(run, body, [rows[row] for row in picked])
        loss = pair_loss(vectors, torch.from_numpy(labels[picked]).to(vectors.device))
        if not torch.isfinite(loss):
            raise NonFiniteLoss(done)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(body.encoder.parameters(), run.plan.max_grad_norm)
        optimizer.step()
        done += 1
        run.report(done, steps, method="setfit")
    body.encoder.load_state_dict(half_way(start, body.encoder.state_dict()))
    return body.eval(), done


def half_way(start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean of two sets of weights: a few dozen rows tune an encoder to themselves, and half of the way back keeps
    more of what it knew (Wortsman et al., CVPR 2022)."""
    return {
        name: torch.lerp(start[name], end[name], 0.5) if end[name].is_floating_point() else end[name] for name in end
    }


def draw_rows(labels: IntArray, count: int, draw: np.random.Generator) -> IntArray:
    """Positions of at most `count` rows, evenly over classes: two or more of each class drawn, so that every row has an
    equal and an unequal partner. A class of one row gives it alone."""
    classes = np.unique(labels)
    each = max(2, count // len(classes))
    chosen = draw.permutation(classes)[: max(2, count // each)]
    picked = [draw.permutation(np.flatnonzero(labels == label))[:each] for label in chosen]
    return np.concatenate(picked).astype(np.int64)


def pair_loss(vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each pair's cosine from 1 (same label) or 0, equal and unequal pairs weighing the same.

    SetFit's loss over all pairs of the rows float[rows, hidden] at once.
    """
    unit = F.normalize(vectors.float(), dim=1)
    cosine = unit @ unit.T
    is_same = labels[:, None] == labels[None, :]
    is_pair = torch.triu(torch.ones_like(is_same), diagonal=1)
    parts = []
    for wanted, chosen in ((1.0, is_same & is_pair), (0.0, ~is_same & is_pair)):
        if chosen.any():
            parts.append(((cosine[chosen] - wanted) ** 2).mean())
    return torch.stack(parts).mean() if parts else cosine.sum() * 0.0


def _must_end(run: Run) -> bool:
    left = run.seconds_left()
    if run.is_winding_down or (left is not None and left <= 0):
        return True
    try:
        run.link.check_cancelled()
    except Cancelled as request:
        if not request.keep_best:
            raise
        run.is_winding_down = True
        return True
    return False


def _rate(step: int, steps: int, warmup_ratio: float) -> float:
    """Linear warm-up, then linear decay to zero, as SetFit's."""
    warmup = max(1, round(steps * warmup_ratio))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


@torch.inference_mode()
def _vectors(run: Run, body: Classifier, rows: Sequence[Features]) -> FloatArray:
    """Pooled vectors float32[rows, hidden] in the order of `rows`."""
    body.eval()
    found = np.zeros((len(rows), run.backbone.info.hidden_size), dtype=np.float32)
    for indices in length_batches(rows, tokens=_EVALUATION_TOKENS):
        found[indices] = _forward(run, body, [rows[index] for index in indices]).cpu().numpy()
    return found


def _forward(run: Run, body: Classifier, rows: Sequence[Features]) -> torch.Tensor:
    arrays = run.preprocessor.collate(rows, max(row.cost for row in rows))
    return body.pooled({name: torch.from_numpy(array).to(run.plan.device) for name, array in arrays.items()})
