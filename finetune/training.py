"""The training loop on Accelerate: step, evaluate, checkpoint, emit, stop early, restore the best.

Everything a resumed run needs is in its checkpoint: weights, optimiser, random state, the position
in the epoch, the best so far and the patience left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from finetune.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from finetune.errors import Cancelled, NonFiniteLoss, Stopped
from finetune.evaluation import score, summary
from finetune.losses import class_weights
from finetune.optimizers import build_optimizer, schedule
from finetune.plan import MethodPlan
from finetune.run import Run, length_batches
from modeling.engines.protocol import pad
from modeling.preprocess import Encoded
from modeling.weights import FloatArray, IntArray

_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_CHECKPOINT_EVERY_S = 60.0
_WINDOW_BATCHES = 50
_EVALUATION_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Trained:
    """The best model is in place; `details` says how the run went."""

    validation_logits: FloatArray
    details: dict[str, Any]


@dataclass(slots=True)
class _Progress:
    """The part of a run's state that is not tensors."""

    step: int = 0
    best_value: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    stopped: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_steps: int = 0


def run_training(run: Run, method: str, model: torch.nn.Module) -> Trained:
    """Trains `model` in place and leaves its best weights in it (the last ones without `restore_best`).

    Raises `Cancelled` (without keep_best), `Stopped` (after saving a checkpoint), `NonFiniteLoss`.
    """
    loop = _Loop(run, method, model)
    loop.restore()
    while loop.progress.stopped is None:
        loop.one_step()
    return loop.finish()


class _Loop:
    def __init__(self, run: Run, method: str, model: torch.nn.Module) -> None:
        plan: MethodPlan = run.plan_of(method)
        self.run, self.plan, self.method = run, plan, method
        self.folder = run.work_dir / method
        self.accelerator = Accelerator(
            mixed_precision=_MIXED_PRECISION[run.plan.precision], cpu=run.plan.device == "cpu"
        )
        self.raw = model
        optimizer = build_optimizer(
            model,
            learning_rate=plan.learning_rate,
            head_learning_rate=plan.head_learning_rate,
            weight_decay=run.plan.weight_decay,
            device=run.plan.device,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        factor = schedule(run.plan.scheduler, total_steps=plan.total_steps, warmup_ratio=run.plan.warmup_ratio)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.factor = factor
        self.train_rows = run.preprocessor.encode(run.train.texts)
        self.validation_rows = run.preprocessor.encode(run.validation.texts)
        self.rows_per_step = plan.batch_size * plan.gradient_accumulation
        self.steps_per_epoch = max(1, -(-len(self.train_rows) // self.rows_per_step))
        self.evaluate_every = max(1, round(self.steps_per_epoch * run.plan.eval_every))
        weights = class_weights(run.plan.class_weights, run.train.labels, run.labels)
        self.class_weights = None if weights is None else torch.from_numpy(weights).to(self.accelerator.device)
        self.progress = _Progress()
        self.best: dict[str, torch.Tensor] = {}
        self.started = self.saved = time.monotonic()
        self.first_step = 0
        self.epoch_batches: tuple[int, list[IntArray]] | None = None

    # One step

    def one_step(self) -> None:
        if self._should_end():
            return
        progress = self.progress
        self.model.train()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.factor(progress.step)
        rows = self._rows_of(progress.step)
        for part in np.array_split(rows, max(1, -(-len(rows) // self.plan.batch_size))):
            loss = self._loss(part) * (len(part) / len(rows))
            if not torch.isfinite(loss):
                raise NonFiniteLoss(progress.step)
            self.accelerator.backward(loss)
            progress.loss_sum += float(loss.detach())
        progress.loss_steps += 1
        self.accelerator.clip_grad_norm_(self.raw.parameters(), self.run.plan.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        self._report()
        if progress.step % self.evaluate_every == 0 or progress.step >= self.plan.total_steps:
            self._evaluate()
        elif time.monotonic() - self.saved > _CHECKPOINT_EVERY_S:
            self._save()

    def _should_end(self) -> bool:
        left = self.run.seconds_left()
        if left is not None and left <= 0:
            self._end("max_seconds is used up")
        try:
            self.run.link.check_cancelled()
        except Stopped:
            self._save()
            raise
        except Cancelled as request:
            if not request.keep_best:
                raise
            self.run.is_winding_down = True
            self._end("cancelled")
        return self.progress.stopped is not None

    def _end(self, reason: str) -> None:
        if self.progress.best_value is None:
            self._evaluate()
        self.progress.stopped = reason

    def _loss(self, rows: IntArray) -> torch.Tensor:
        logits = self._forward([self.train_rows[row] for row in rows])
        labels = torch.from_numpy(self.run.train.labels[rows]).to(logits.device)
        return F.cross_entropy(logits, labels, weight=self.class_weights, label_smoothing=self.run.plan.label_smoothing)

    def _forward(self, inputs: Sequence[Encoded]) -> torch.Tensor:
        arrays = (
            torch.from_numpy(array).to(self.accelerator.device) for array in pad(inputs, pad_id=_pad_id(self.raw))
        )
        logits: torch.Tensor = self.model(*arrays)
        return logits.float()

    def _rows_of(self, step: int) -> IntArray:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.epoch_batches is None or self.epoch_batches[0] != epoch:
            lengths = [item.length for item in self.train_rows]
            batches = list(
                epoch_order(lengths, rows_per_batch=self.rows_per_step, seed=self.run.plan.seed, epoch=epoch)
            )
            self.epoch_batches = (epoch, batches)
        return self.epoch_batches[1][position]

    # Evaluation and early stopping

    @torch.inference_mode()
    def _validation_logits(self) -> FloatArray:
        self.model.eval()
        logits = np.zeros((len(self.validation_rows), len(self.run.labels)), dtype=np.float32)
        for indices in length_batches(self.validation_rows, tokens=_EVALUATION_TOKENS):
            logits[indices] = self._forward([self.validation_rows[index] for index in indices]).cpu().numpy()
        return logits

    def _evaluate(self) -> None:
        progress, plan, link = self.progress, self.run.plan, self.run.link
        logits = self._validation_logits()
        value = score(plan.metric, logits, self.run.validation.labels)
        values = summary(logits, self.run.validation.labels)
        train_loss = progress.loss_sum / max(1, progress.loss_steps)
        progress.loss_sum, progress.loss_steps = 0.0, 0
        entry = {"step": progress.step, "epoch": self._epoch(), "train_loss": train_loss, **values}
        progress.history.append(entry)
        for split, numbers in (("train", {"loss": train_loss}), ("validation", values)):
            data = {
                "split": split,
                "step": progress.step,
                "epoch": self._epoch(),
                "values": numbers,
                "method": self.method,
            }
            link.event("metrics", f"{self.method} step {progress.step}: {split}", data)
        if progress.best_value is None or value > progress.best_value + plan.early_stopping.min_delta:
            progress.best_value, progress.best_step = value, progress.step
            progress.evaluations_without_gain = 0
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in _trainable(self.raw).items()}
            best = {"metric": plan.metric, "value": value, "step": progress.step, "method": self.method}
            link.event("best_updated", f"{self.method}: {plan.metric} {value:.4f} at step {progress.step}", best)
        else:
            progress.evaluations_without_gain += 1
        if progress.step >= self.plan.total_steps:
            progress.stopped = "all epochs are done"
        elif progress.evaluations_without_gain >= plan.early_stopping.patience:
            progress.stopped = "early stopping"
            message = f"{self.method}: no gain in {plan.early_stopping.patience} evaluations"
            link.event("early_stopped", message, {"step": progress.step, "best_step": progress.best_step})
        self._save()
        if self.run.on_evaluation is not None:
            self.run.on_evaluation(len(progress.history), value)

    def finish(self) -> Trained:
        progress = self.progress
        if self.run.plan.restore_best and self.best:
            with torch.no_grad():
                for name, tensor in _trainable(self.raw).items():
                    tensor.copy_(self.best[name])
        self.raw.eval()
        details = {
            "steps": progress.step,
            "epochs": self._epoch(),
            "best_step": progress.best_step,
            "stopped": progress.stopped,
            "history": progress.history,
        }
        return Trained(self._validation_logits(), details)

    # Progress and checkpoints

    def _epoch(self) -> float:
        return round(self.progress.step / self.steps_per_epoch, 3)

    def _report(self) -> None:
        progress, total = self.progress, self.plan.total_steps
        done = progress.step - self.first_step
        eta_s = (time.monotonic() - self.started) / max(1, done) * (total - progress.step)
        self.run.link.progress(
            percent=round(100 * progress.step / total, 1), step=progress.step, total_steps=total, epoch=self._epoch(),
            eta_seconds=round(eta_s, 1), method=self.method,
        )  # fmt: skip

    def _save(self) -> None:
        self.saved = time.monotonic()
        try:
            save_checkpoint(self.folder, self._checkpoint(), step=self.progress.step)
        except OSError as error:
            message = (
                f"the checkpoint at step {self.progress.step} was not written ({error.strerror}); the last is kept"
            )
            self.run.link.event("data_warning", message, {"code": "checkpoint_not_saved"}, level="warn")
        else:
            data = {"method": self.method, "step": self.progress.step}
            self.run.link.event("checkpoint_saved", f"{self.method}: step {self.progress.step} saved", data)

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"model.{name}": value for name, value in _trainable(self.raw).items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors["rng.torch"] = torch.get_rng_state()
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
        fields = {name: getattr(self.progress, name) for name in _Progress.__dataclass_fields__}
        return Checkpoint(tensors, {"method": self.method, "seed": self.run.plan.seed, "progress": fields})

    def restore(self) -> None:
        """Goes on from the newest checkpoint of this run, if there is one."""
        folders = [self.folder, *(folder / self.method for folder in self.run.earlier_work_dirs)]
        found = next((checkpoint for folder in folders if (checkpoint := load_checkpoint(folder))), None)
        if found is None or found.state["seed"] != self.run.plan.seed:
            return
        with torch.no_grad():
            for name, parameter in _trainable(self.raw).items():
                parameter.copy_(found.tensors[f"model.{name}"])
        self.best = {k.removeprefix("best."): v for k, v in found.tensors.items() if k.startswith("best.")}
        torch.set_rng_state(found.tensors["rng.torch"])
        state = self.optimizer.state_dict()
        state["state"] = {}
        for key, value in found.tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)
        self.progress = _Progress(**found.state["progress"])
        self.first_step = self.progress.step
        message = f"{self.method}: continues from step {self.progress.step}"
        self.run.link.event("resumed", message, {"method": self.method, "step": self.progress.step})


def epoch_order(lengths: Sequence[int], *, rows_per_batch: int, seed: int, epoch: int) -> Iterator[IntArray]:
    """Shuffled batches of similar length: rows are shuffled, sorted by length within windows, batches shuffled again.

    A function of its arguments alone, so a resumed run sees the same batches.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    window = rows_per_batch * _WINDOW_BATCHES
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort([lengths[row] for row in part], kind="stable")]
        batches += [part[at : at + rows_per_batch] for at in range(0, len(part), rows_per_batch)]
    for index in random.permutation(len(batches)):
        yield batches[index].astype(np.int64)


def _trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _pad_id(model: Any) -> int:
    return int(model.encoder.config.pad_token_id or 0)
