"""The training loop: step, evaluate, checkpoint, emit, stop early, restore the best.

A model is anything whose forward takes the encoder's inputs by name and gives the output of its `head`;
`head` takes the rows' vectors.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from finetune.jobs.failures import Cancelled, NonFiniteLoss, ProcessLost, Stopped
from finetune.jobs.hyperparameters import EMBEDDING_LOSSES
from finetune.jobs.plan import MethodPlan
from finetune.training import bf16_cpu
from finetune.training.batches import Ahead, Batch, FeatureRows, epoch_order, epoch_size, make_batch, passes
from finetune.training.checkpoints import (
    Best,
    Progress,
    copied,
    from_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    to_checkpoint,
    trainable,
)
from finetune.training.layers import is_bert_like
from finetune.training.losses import build_loss
from finetune.training.memory import OutOfMemory, PassSize, is_out_of_memory, largest_that_fits, release
from finetune.training.methods.candidate import CANCELLED, OUT_OF_TIME
from finetune.training.optimizers import build_optimizer, plateau_factor, schedule
from finetune.training.parallel import Exchange, seed_of, share_of
from finetune.training.run_context import Run
from finetune.training.windows import UNTAGGED, Windows, in_parts
from modeling.inputs import Features
from modeling.weights import FloatArray, IntArray

_CHECKPOINT_EVERY_S = 60.0
_EVALUATION_TOKENS = 8192
_NAMED_ROWS = 20  # of those whose loss is not finite
_CPU_TOKENS = 2048  # of a pass: larger ones only leave the caches (docs/log.md)


@dataclass(frozen=True, slots=True)
class Trained:
    """The best model is in place; `validation_logits` are its answers, `details` says how the run went."""

    validation_logits: Any
    details: dict[str, Any]


def run_training(run: Run, method: str, model: Any) -> Trained:
    """Train `model` in place and leave its best weights in it (the last ones without `restore_best`).

    In a process that takes orders nothing is to be read from the result. Raises `Cancelled` (without keep_best),
    `Stopped` (after saving a checkpoint), `NonFiniteLoss`, `OutOfMemory`, `ProcessLost`.
    """
    rows = _training_rows(run)
    with _others(run, method, rows):
        loop = _Loop(run, method, model, rows)
        with loop.prepared():
            loop.restore()
            loop.exchange.begin(loop.parameters, step=loop.progress.step)
            if run.orders is not None:
                return loop.follow(run.orders)
            while loop.progress.stopped is None:
                loop.one_step()
            return loop.finish()


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """What is trained on: rows of the encoder, their numbers in the file, and their targets, one a row or, of tasks
    that label words, a tag for each position, int64[positions] end to end."""

    features: FeatureRows
    numbers: IntArray
    targets: Any

    def of(self, rows: IntArray, *, by_position: bool) -> torch.Tensor:
        """The targets of some rows; tags as int64[rows, width], as wide as the longest of the rows."""
        if not by_position:
            return torch.from_numpy(self.targets[rows])
        starts, lengths = self.features.starts[rows], self.features.lengths[rows]
        tags = np.full((len(rows), int(lengths.max(initial=0))), UNTAGGED, np.int64)
        for place, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            tags[place, :length] = self.targets[start : start + length]
        return torch.from_numpy(tags)


def _training_rows(run: Run) -> TrainingRows:
    if run.tokens is not None:
        return TrainingRows(run.tokens, run.train.numbers, run.train.labels)
    if not run.rules.by_position:
        features = FeatureRows.encode(run.preprocessor, run.train.examples)
        return TrainingRows(features, np.asarray(run.train.numbers), run.scale.standard(run.train.labels))
    tags: list[npt.NDArray[np.int16]] = []
    numbers: list[IntArray] = []

    def encoded() -> Iterator[list[Features]]:
        for start, windows in in_parts(run.preprocessor, run.train.examples):
            targets = run.train.labels[start:]
            tags.extend(windows.tags(window, targets) for window in range(len(windows.rows)))
            numbers.append(np.asarray(run.train.numbers)[start:][windows.example_of])
            yield windows.rows

    features = FeatureRows.stacked(run.preprocessor, encoded())
    return TrainingRows(features, np.concatenate(numbers), np.concatenate(tags))


def _others(run: Run, method: str, rows: TrainingRows) -> contextlib.AbstractContextManager[None]:
    """The training in the other processes, if there are any."""
    if run.ranks is None:
        return contextlib.nullcontext()
    assignment = {
        "method": method,
        "plan": run.plan,
        "labels": run.labels,
        "backbone_folder": run.backbone.folder,
        "work_dir": run.work_dir,
        "earlier_work_dirs": run.earlier_work_dirs,
    }
    arrays = {
        **{f"rows.{name}": array for name, array in rows.features.arrays.items()},
        "starts": rows.features.starts,
        "labels": rows.targets,
        "numbers": rows.numbers,
    }
    return run.ranks.training(assignment, arrays)


class _Loop:
    def __init__(self, run: Run, method: str, model: Any, rows: TrainingRows) -> None:
        plan: MethodPlan = run.plan_of(method)
        self.run, self.plan, self.method = run, plan, method
        self.folder = run.work_dir / method
        on_cpu = run.plan.device == "cpu"
        self.has_own_bf16 = on_cpu and run.plan.precision == "bf16" and is_bert_like(model.encoder)
        precision = "no" if self.has_own_bf16 or run.plan.precision == "fp32" else run.plan.precision
        self.accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
        self.exchange = Exchange(self.accelerator, self._lost)
        self.rank, self.processes = self.exchange.rank, self.exchange.processes
        self.raw, self.encoder, self.head = model, model.encoder, model.head
        self.parameters = list(trainable(model).values())
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True)  # `exchange` sums its gradients
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(model, run.plan, plan))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.factor = schedule(
            run.plan.scheduler, total_steps=plan.total_steps, warmup_ratio=run.plan.warmup_ratio, epochs=plan.epochs
        )
        self.rows, self.train_rows = rows, rows.features
        self.held_out: Windows | None = None
        if run.rules.by_position:
            self.held_out = Windows.of(run.preprocessor, run.validation.examples)
            self.validation_rows = FeatureRows.stacked(
                run.preprocessor, [self.held_out.rows] if self.held_out.rows else []
            )
        else:
            self.validation_rows = FeatureRows.encode(run.preprocessor, run.validation.examples)
        self.rows_per_step = plan.batch_size * plan.gradient_accumulation
        self.classes = run.train.labels if run.plan.oversample else None
        self.steps_per_epoch = max(1, -(-epoch_size(len(self.train_rows), self.classes) // self.rows_per_step))
        self.evaluate_every = max(1.0, self.steps_per_epoch * run.plan.eval_every)
        weights = run.rules.weights(run.plan.class_weights, run.train.labels, run.labels)
        self.objective = build_loss(
            run.plan,
            kind=run.kind,
            weight=None if weights is None else torch.from_numpy(weights).to(self.accelerator.device),
        )
        # Losses that compare rows need the whole pass that was asked for; on a CPU short passes use the caches better.
        divides = on_cpu and run.plan.loss not in EMBEDDING_LOSSES
        self.most = PassSize(plan.batch_size, _CPU_TOKENS if divides else None)
        self.size = self.most
        self.progress = Progress()
        self.best: Best | None = None
        self.broken: Sequence[int] = ()  # this process's rows of the step whose loss is not finite
        self.started = self.saved = time.monotonic()
        self.first_step = 0
        self.steps_of_epoch: tuple[int, list[IntArray]] | None = None
        self.after_step: Callable[[], None] = lambda: None
        self.batches = Ahead(self._batches_of, last=plan.total_steps)

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """The model as it trains: bf16 where the CPU has it, states recomputed where asked for."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.batches.close)
            if self.has_own_bf16:
                copies = stack.enter_context(bf16_cpu.computing(self.encoder))
                self.after_step = copies.expire
            if self.run.plan.gradient_checkpointing:
                stack.enter_context(_recomputing(self.encoder))
            yield

    # One step

    def one_step(self) -> None:
        if self._should_end():
            return
        progress, started = self.progress, time.monotonic()
        factor = self._factor()
        if self.run.ranks is not None:
            self.run.ranks.order(progress.step, factor)
        self._descend(factor)
        progress.trained_s += time.monotonic() - started
        self._report()
        if self._is_evaluated() or progress.step >= self.plan.total_steps:
            self._evaluate()
        elif time.monotonic() - self.saved > _CHECKPOINT_EVERY_S:
            self._save()

    def follow(self, orders: Iterator[float]) -> Trained:
        """Take the steps that rank 0 orders, until the training ends."""
        for factor in orders:
            torch.manual_seed(seed_of(self.run.plan.seed, rank=self.rank, step=self.progress.step))
            self._descend(factor)
        return Trained(np.zeros((0, self.run.outputs), np.float32), {})

    def _descend(self, factor: float) -> None:
        """Take a step, the same in every process."""
        if self.progress.step == self.first_step and self.plan.finds_batch_size:
            self._find_size()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self._gradients_or_half()
        self._check_norm(self.accelerator.clip_grad_norm_(self.parameters, self.run.plan.max_grad_norm))
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad()
        self.progress.step += 1

    def _is_evaluated(self) -> bool:
        """At the first step beyond each multiple of the interval, which need be no whole number of steps."""
        now, before = ((self.progress.step - back) / self.evaluate_every + 1e-9 for back in (0, 1))
        return int(now) > int(before)

    def _factor(self) -> float:
        factor = self.factor(self.progress.step)
        return factor * plateau_factor(self.progress.plateaus) if self.run.plan.scheduler == "plateau" else factor

    def _should_end(self) -> bool:
        left = self.run.seconds_left()
        if left is not None and left <= 0:
            self._end(OUT_OF_TIME)
        try:
            self.run.link.check_cancelled()
        except Stopped:
            self._save()
            raise
        except Cancelled as request:
            if not request.keep_best:
                raise
            self.run.is_winding_down = True
            self._end(CANCELLED)
        return self.progress.stopped is not None

    def _end(self, reason: str) -> None:
        if self.progress.best_value is None:
            self._evaluate()
        self.progress.stopped = reason

    def _gradients_or_half(self) -> None:
        """Leave the gradient of the mean over the step's rows in the parameters; if the memory of a process does not
        suffice, once more from the step's beginning in passes of half."""
        random = torch.get_rng_state()
        while True:
            shares = self.exchange.gathered(self._share_if_it_fits())
            loss, plain, rows, short = (sum(values) for values in zip(*shares, strict=True))
            if not short:
                break
            half = self.size.half()
            if self.progress.halved or half is None:
                raise OutOfMemory(self.size)
            self.progress.halved += 1
            self._shrink(half)
            torch.set_rng_state(random)
        if not np.isfinite(loss):
            broken = [*self.broken, *[-1.0] * _NAMED_ROWS][:_NAMED_ROWS]
            raise self._not_finite([row for rows in self.exchange.gathered(broken) for row in rows if row >= 0])
        self.exchange.sum_gradients(self.parameters)
        self.progress.loss_sum += plain
        self.progress.loss_rows += int(rows)
        self.progress.trained_rows += int(rows)

    def _share_if_it_fits(self) -> tuple[float, ...]:
        """What `_share` gives, and 1 if the memory did not suffice for it, else 0."""
        try:
            return *self._share(self.progress.step), 0
        except (RuntimeError, MemoryError) as error:  # kept no longer than here: it holds what filled the memory
            if not is_out_of_memory(error):
                raise
        return 0.0, 0.0, 0, 1

    def _shrink(self, size: PassSize) -> None:
        self.optimizer.zero_grad()
        self.batches.forget()
        release()
        self.size = size
        message = f"{self.method}: out of memory at step {self.progress.step}; passes have {size.rows} rows from now on"
        message += ", the step as many as before"
        data = {"code": "batch_halved", "method": self.method, "step": self.progress.step, "rows": size.rows}
        self.run.link.event("data_warning", message, data, level="warn")

    def _share(self, step: int) -> tuple[float, float, int]:
        """Leave this process's part of that gradient in the parameters: all of it if no other process trains. Give its
        part of the loss, the sum of its rows' plain losses, and its number of rows."""
        self.model.train()
        rows, batches = self.batches.get(step)
        weight = float(self.objective.weights(self._targets(rows)).sum()) or 1.0  # rows may have no word
        losses = []
        for batch in batches:
            of_rows, of_vectors, plain = self._losses(batch, self._targets(batch.rows))
            loss = of_rows.sum() / weight + of_vectors * (len(batch.rows) / len(rows))
            losses.append((batch, of_rows.detach(), torch.stack([loss.detach(), plain])))
            self.accelerator.backward(loss)
        if not losses and self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(torch.zeros((), device=self.accelerator.device))  # or it has no scale yet
        total, plain_total = torch.stack([sums for _, _, sums in losses]).sum(0).tolist() if losses else (0.0, 0.0)
        if not np.isfinite(total):
            self.broken = [row for batch, values, _ in losses for row in self._broken(batch, values)]
        return total, plain_total, sum(len(batch.rows) for batch in batches)

    def _targets(self, rows: IntArray) -> torch.Tensor:
        return self.rows.of(rows, by_position=self.run.rules.by_position).to(self.accelerator.device)

    def _losses(self, batch: Batch, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32[rows] of the output, one value for the pass of the vectors (0 where the loss has none), and the sum
        of the rows' plain losses."""
        vectors: list[torch.Tensor] = []
        of_vectors = self.objective.of_vectors
        hook = self.head.register_forward_pre_hook(lambda _, inputs: vectors.append(inputs[0]))
        try:
            output = self.model(batch.inputs).float()
        finally:
            hook.remove()
        compared = output.new_zeros(()) if of_vectors is None else of_vectors(vectors[0].float(), targets)
        return self.objective.of_output(output, targets), compared, self.objective.plain(output.detach(), targets).sum()

    def _broken(self, batch: Batch, values: torch.Tensor) -> list[int]:
        is_broken = ~torch.isfinite(values).cpu().numpy()
        return [int(number) for number in self.rows.numbers[batch.rows[is_broken]]]

    def _check_norm(self, norm: Any) -> None:
        # With a gradient scaler an infinite gradient is expected now and then: it skips the step and scales less.
        if norm is not None and self.accelerator.scaler is None and not np.isfinite(float(norm)):
            raise self._not_finite([])

    def _lost(self) -> ProcessLost:
        if self.run.ranks is not None:
            return self.run.ranks.lost()
        return ProcessLost(0, of=self.processes, what="cannot be reached", step=self.progress.step)

    def _not_finite(self, rows: Sequence[float]) -> NonFiniteLoss:
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        numbers = sorted(map(int, rows))
        return NonFiniteLoss(self.progress.step, rows=numbers, learning_rate=rate, precision=self.run.plan.precision)

    # Rows

    def _batches_of(self, step: int) -> tuple[IntArray, list[Batch]]:
        """The rows of a step, and this process's share of them in passes."""
        rows, lengths = self._rows_of(step), self.train_rows.lengths
        share = share_of(lengths, rows, rank=self.rank, processes=self.processes)
        parts = passes(lengths, share, most_rows=self.size.rows, most_tokens=self.size.tokens)
        return rows, [make_batch(self.train_rows, part, self.accelerator.device) for part in parts]

    def _rows_of(self, step: int) -> IntArray:
        epoch, position = divmod(step, self.steps_per_epoch)
        known = self.steps_of_epoch
        if known is None or known[0] != epoch:
            order = epoch_order(
                self.train_rows.lengths,
                rows_per_step=self.rows_per_step,
                seed=self.run.plan.seed,
                epoch=epoch,
                classes=self.classes,
            )
            known = self.steps_of_epoch = (epoch, list(order))
        return known[1][position]

    def _find_size(self) -> None:
        """The most rows that fit into the device's memory in one pass: tried with the longest rows there are."""
        longest = np.argsort(-self.train_rows.lengths, kind="stable")[: self.rows_per_step]
        random = torch.get_rng_state()

        def attempt(size: PassSize) -> None:
            self.optimizer.zero_grad()
            self.model.train()
            batch = make_batch(self.train_rows, longest[: size.rows], self.accelerator.device)
            of_rows, of_vectors, _ = self._losses(batch, self._targets(batch.rows))
            self.accelerator.backward(of_rows.mean() + of_vectors)
            self.optimizer.zero_grad()

        found = largest_that_fits(attempt, PassSize(-(-self.rows_per_step // self.processes)))
        self.size = PassSize(int(min(self.exchange.gathered([found.rows]))[0]))
        self.optimizer.zero_grad()
        torch.set_rng_state(random)

    # Evaluation and early stopping

    @torch.no_grad()  # not inference_mode: the bf16 copies made here serve the next step's gradients, too
    def _validation_logits(self) -> Any:
        self.model.eval()
        rows = np.arange(len(self.validation_rows))
        if self.held_out is not None:
            return self._tagged(self.held_out, rows)
        logits = np.zeros((len(rows), self.run.outputs), dtype=np.float32)
        for part in passes(self.validation_rows.lengths, rows, most_rows=len(rows), most_tokens=_EVALUATION_TOKENS):
            batch = make_batch(self.validation_rows, part, self.accelerator.device)
            logits[part] = self.model(batch.inputs).float().cpu().numpy()
        return self.run.scale.raw(logits)

    def _tagged(self, windows: Windows, rows: IntArray) -> Any:
        """Of texts whose words are labelled."""
        words: list[FloatArray] = [np.zeros((0, self.run.outputs), np.float32)] * len(rows)
        for part in passes(self.validation_rows.lengths, rows, most_rows=len(rows), most_tokens=_EVALUATION_TOKENS):
            batch = make_batch(self.validation_rows, part, self.accelerator.device)
            logits = self.model(batch.inputs).float().cpu().numpy()
            for place, window in enumerate(part.tolist()):
                words[window] = logits[place, windows.located(window).first]
        return windows.gathered(words, len(self.run.validation.examples))

    def _evaluate(self) -> None:
        progress, plan, link = self.progress, self.run.plan, self.run.link
        if not (self.run.holds_out and len(self.validation_rows)):
            return self._save_unevaluated()
        logits = self._validation_logits()
        value = self.run.score(logits)
        values = self.run.rules.summary(logits, self.run.validation.labels)
        train_loss = progress.loss_sum / max(1, progress.loss_rows)
        progress.loss_sum, progress.loss_rows = 0.0, 0
        progress.history.append({"step": progress.step, "epoch": self._epoch(), "train_loss": train_loss, **values})
        for split, numbers in (("train", {"loss": train_loss}), ("validation", values)):
            data = {"split": split, "step": progress.step, "epoch": self._epoch(), "values": numbers}
            link.event("metrics", f"{self.method} step {progress.step}: {split}", {**data, "method": self.method})
        loss = values["loss"] if self.held_out is not None else None
        if progress.observe(value, plan.early_stopping, plan.deciding, loss=loss):
            kept = torch.zeros(0) if self.held_out is not None else torch.from_numpy(logits)
            self.best = Best(copied(trainable(self.raw)), kept)
            best = {"metric": plan.metric, "value": value, "step": progress.step, "method": self.method}
            link.event("best_updated", f"{self.method}: {plan.metric} {value:.4f} at step {progress.step}", best)
        if progress.step >= self.plan.total_steps:
            progress.stopped = "all epochs are done"
        elif progress.stopped is not None:
            message = f"{self.method}: no gain in {plan.early_stopping.patience} evaluations"
            link.event("early_stopped", message, {"step": progress.step, "best_step": progress.best_step})
        self._save()
        if self.run.on_evaluation is not None:
            self.run.on_evaluation(len(progress.history), value)

    def _save_unevaluated(self) -> None:
        """Where no row is held out, as in a refit, the run ends with its last step."""
        if self.progress.step >= self.plan.total_steps:
            self.progress.stopped = "all epochs are done"
        self._save()

    def finish(self) -> Trained:
        progress = self.progress
        restores = self.run.plan.restore_best and self.best is not None
        if restores and self.best is not None:
            load_weights(self.raw, self.best.weights)
        is_known = restores and self.best is not None and self.held_out is None
        logits = self.best.logits.numpy() if is_known and self.best is not None else self._validation_logits()
        self.raw.eval()
        details = {
            "steps": progress.step,
            "epochs": self._epoch(),
            "best_step": progress.best_step,
            "stopped": progress.stopped,
            "rows_per_second": round(progress.trained_rows / max(1e-9, progress.trained_s), 2),
            "history": progress.history,
            "processes": self.processes,
            "seeds": [
                self.run.plan.seed,
                *(seed_of(self.run.plan.seed, rank=n, step=0) for n in range(1, self.processes)),
            ],
        }
        return Trained(logits, details)

    # Progress and checkpoints

    def _epoch(self) -> float:
        return round(self.progress.step / self.steps_per_epoch, 3)

    def _report(self) -> None:
        self.run.report(self.progress.step, self.plan.total_steps, epoch=self._epoch(), method=self.method)

    def _identity(self) -> dict[str, Any]:
        """A checkpoint of another plan or of other rows is not gone on from."""
        return {
            "seed": self.run.plan.seed,
            "rows": len(self.train_rows),
            "tokens": int(self.train_rows.starts[-1]),
            "rows_per_step": self.rows_per_step,
            "total_steps": self.plan.total_steps,
            "trainable": sum(parameter.numel() for parameter in trainable(self.raw).values()),
            "optimizer": self.run.plan.optimizer,
            "progress": [field.name for field in fields(Progress)],
        }

    def _save(self) -> None:
        self.saved = time.monotonic()
        checkpoint = to_checkpoint(
            self.progress,
            self.raw,
            self.optimizer,
            self.best,
            scaler=self.accelerator.scaler,
            identity=self._identity(),
        )
        try:
            save_checkpoint(self.folder, checkpoint, step=self.progress.step)
        except OSError as error:
            message = (
                f"the checkpoint at step {self.progress.step} was not written ({error.strerror}); the last is kept"
            )
            self.run.link.event("data_warning", message, {"code": "checkpoint_not_saved"}, level="warn")
        else:
            data = {"method": self.method, "step": self.progress.step}
            self.run.link.event("checkpoint_saved", f"{self.method}: step {self.progress.step} saved", data)

    def restore(self) -> None:
        """Goes on from the newest checkpoint of this run, if there is one."""
        folders = [self.folder, *(folder / self.method for folder in self.run.earlier_work_dirs)]
        found = next((checkpoint for folder in folders if (checkpoint := load_checkpoint(folder))), None)
        if found is None or found.state.get("identity") != self._identity():
            return
        self.progress, self.best = from_checkpoint(found, self.raw, self.optimizer, scaler=self.accelerator.scaler)
        if self.progress.halved:
            self.size = self.most.half() or self.most
        self.first_step = self.progress.step
        message = f"{self.method}: continues from step {self.progress.step}"
        self.run.link.event("resumed", message, {"method": self.method, "step": self.progress.step})


@contextlib.contextmanager
def _recomputing(encoder: torch.nn.Module) -> Iterator[None]:
    """Each layer's states are computed again in the backward pass instead of kept."""
    model: Any = next(module for module in encoder.modules() if hasattr(module, "gradient_checkpointing_enable"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
