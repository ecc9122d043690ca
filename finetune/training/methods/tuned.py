"""What methods that train by steps share: a classifier on the backbone, and how it becomes a candidate."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from finetune.evaluation.tasks.rules import Scale, Side
from finetune.jobs.failures import RunError
from finetune.jobs.records import JobPhase
from finetune.training.batches import epoch_size
from finetune.training.layers import FrozenTrunk
from finetune.training.loop import Trained, run_training
from finetune.training.methods.candidate import Candidate, Servable
from finetune.training.run_context import Run, embed, joined
from finetune.training.windows import position_logits, tagged_by
from model_registry.manifest import VersionKind
from modeling.adapters_in_encoder import Composition
from modeling.backbone import Backbone
from modeling.checkpoints import write_encoder
from modeling.engines.protocol import Engine
from modeling.engines.torch import Pooler, TorchEngine
from modeling.heads import DenseLayer, TaskHead
from modeling.inputs import Example
from modeling.networks import NETWORKS, Network, Tensors
from modeling.tasks import Calibration
from modeling.weights import FloatArray

_WORSE_BY_CHANCE = 0.05


class Classifier(nn.Module):
    """Encoder, pooling and one linear layer; forward gives logits [rows, labels] in float32, or without pooling, of
    each position, [rows, width, labels]."""

    def __init__(
        self,
        encoder: nn.Module,
        network: Network,
        *,
        pooler: Pooler,
        hidden_size: int,
        labels: int,
        dropout: float,
        by_position: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.network, self.by_position = encoder, network, by_position
        self.pooler = pooler
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, labels)
        self._trunk: tuple[FrozenTrunk, ...] = ()  # a tuple, or its weights would have two names

    @property
    def trunk(self) -> FrozenTrunk | None:
        """The encoder's frozen layers, where they keep what they have computed."""
        return self._trunk[0] if self._trunk else None

    def keep_in(self, trunk: FrozenTrunk | None) -> None:
        self._trunk = () if trunk is None else (trunk,)

    def forward(self, inputs: Tensors) -> torch.Tensor:
        values = self.states(inputs).float() if self.by_position else self.pooled(inputs)
        logits: torch.Tensor = self.head(self.dropout(values))
        return logits

    def pooled(self, inputs: Tensors) -> torch.Tensor:
        """Compute vectors float32[rows, hidden] of the encoder's inputs [rows, width, …]."""
        vectors: torch.Tensor = self.pooler(self.states(inputs), self.network.mask(inputs))
        return vectors

    def states(self, inputs: Tensors) -> torch.Tensor:
        """Compute the states [rows, width, hidden]."""
        if self.trunk is not None:
            self.trunk.expect(inputs, self.network.mask(inputs))
        return self.network.states(self.encoder, inputs)

    def task_head(self) -> TaskHead:
        weight, bias = (np.array(p.detach().float().cpu().numpy()) for p in (self.head.weight, self.head.bias))
        return TaskHead((DenseLayer(weight, bias),))


def new_classifier(run: Run, encoder: nn.Module) -> Classifier:
    set_dropout(encoder, run.plan.dropout)
    info, width = run.backbone.info, run.backbone.info.hidden_size
    if run.rules.by_position:  # a projection behind the pooling gives another width than the states have
        width = int(getattr(getattr(encoder, "config", None), "hidden_size", width))
    return Classifier(
        encoder,
        NETWORKS[info.modality],
        pooler=Pooler.of(run.backbone),
        hidden_size=width,
        labels=run.outputs,
        dropout=run.plan.dropout,
        by_position=run.rules.by_position,
    )


def load_network(run: Run) -> nn.Module:
    """Load the run's backbone under torch, on the CPU."""
    return NETWORKS[run.backbone.info.modality].load(run.backbone.folder)


def start_head(model: Classifier, probe: TaskHead | None, scale: Scale = Scale()) -> None:
    """From the probe's weights where there are some: the encoder's features are then kept, not distorted at first
    (Kumar et al., ICLR 2022). Otherwise small random ones by the run's seed."""
    if probe is not None:
        (layer,) = scale.unfolded(probe).layers
        with torch.no_grad():
            model.head.weight.copy_(torch.from_numpy(layer.weight))
            model.head.bias.copy_(torch.from_numpy(layer.bias))
        return
    nn.init.normal_(model.head.weight, std=1 / math.sqrt(model.head.in_features))
    nn.init.zeros_(model.head.bias)


def set_dropout(encoder: nn.Module, value: float) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = value
        for name in ("dropout", "attention_dropout"):  # of attention that drops its weights without a module
            if isinstance(getattr(module, name, None), int | float):
                setattr(module, name, value)


Serving = tuple[Engine, str | None, Callable[[Path], None]]


def serve_own(run: Run, encoder: nn.Module, *, method: str, composition: Composition | None = None) -> Serving:
    """Give `encoder`, which has weights of its own, as a server will load it, and what writes it into a version."""

    def write(folder: Path) -> Backbone:
        info = run.backbone.info
        taken = composition.size if composition is not None and composition.kind == "prompt" else 0
        return write_encoder(
            folder,
            encoder,
            like=run.backbone.folder,
            name=info.name,
            source=f"{method} fine-tune of {info.digest}",
            pooling=info.pooling,
            normalize=False,
            max_length=min(run.plan.max_length, info.max_length - taken),
            composition=composition,
            prompts=run.backbone.prompts,
        )

    def write_extra(folder: Path) -> None:
        write(folder / "full")

    with tempfile.TemporaryDirectory(prefix=f"polyhead-{method}-") as temporary:
        engine = TorchEngine(write(Path(temporary)), device=run.plan.device)
    return engine, None, write_extra


def train_tuned(
    run: Run,
    method: str,
    kind: VersionKind,
    build: Callable[[], Classifier],
    serve: Callable[[Run, Classifier], Serving],
) -> Candidate:
    """Trains what `build` makes, the same each time, and wraps it. `serve` turns it into an engine (and adapter key) as
    the server will run it."""
    started = time.monotonic()
    run.link.phase(JobPhase.TRAINING)
    model = build()
    trained: Trained = run_training(run, method, model)

    def finish() -> Servable:
        scale, final = _refitted(run, method, build, trained) or (run.scale, model)
        engine, adapter, write_extra = serve(run, final)
        head = scale.folded(final.task_head())

        def logits(examples: Sequence[Example]) -> FloatArray:
            if run.rules.by_position:
                return tagged_by(engine, head, run.preprocessor, examples, adapter)
            return head.logits(embed(engine, run.preprocessor, examples, adapter=adapter))

        def of_positions(examples: Sequence[Example]) -> Sequence[FloatArray]:
            return position_logits(engine, head, run.preprocessor, examples, adapter)

        golden = of_positions if run.rules.by_position else None
        return Servable(logits=logits, head=head, write_extra=write_extra, golden_logits=golden)

    return Candidate(
        method=method,
        kind=kind,
        validation_logits=trained.validation_logits,
        finish=finish,
        seconds=time.monotonic() - started,
        details=trained.details,
    )


def _refitted(
    run: Run, method: str, build: Callable[[], Classifier], trained: Trained
) -> tuple[Scale, Classifier] | None:
    """With `refit`: a model trained anew on training and validation rows, for as many epochs as the first one that is
    served otherwise. None without, and where it did not come out well: the first is then served indeed."""
    if not run.plan.refit or run.is_winding_down:
        return None
    everything = _on_all_rows(run, method, trained.details["best_step" if run.plan.restore_best else "steps"])
    reason = _lacks_time(everything, method, trained)
    if reason is None:
        run.link.phase(JobPhase.TRAINING)
        model = build()
        try:
            reason = _went_wrong(everything, method, run_training(everything, method, model), trained)
        except RunError as error:  # hours of training are not lost to what the first one did not meet
            reason = f"it did not come to its end ({error})"
        run.is_winding_down = everything.is_winding_down
    if reason is None:
        steps = everything.plan_of(method).total_steps
        trained.details["refit"] = {"rows": len(everything.train), "steps": steps}
        return everything.scale, model
    message = f"{method}: the refit is left out, and the model of the training rows is served: {reason}"
    run.link.event("data_warning", message[:500], {"code": "refit_left_out", "method": method}, level="warn")
    return None


def _on_all_rows(run: Run, method: str, best_step: int) -> Run:
    """The run as a refit sees it: no row is held out, so nothing is evaluated on the way."""
    rows = joined(run.train, run.validation)
    size, first = (epoch_size(len(side), side.labels if run.plan.oversample else None) for side in (rows, run.train))
    steps = max(1, round(best_step * size / max(1, first)))
    plan = run.plan_of(method).model_copy(update={"total_steps": steps})
    others = tuple(plan if one.method == method else one for one in run.plan.methods)
    return replace(
        run,
        train=rows,
        holds_out=False,
        on_evaluation=None,
        plan=run.plan.model_copy(update={"methods": others, "processes": 1}),
        work_dir=run.work_dir / "refit",
        earlier_work_dirs=tuple(folder / "refit" for folder in run.earlier_work_dirs),
        _features={},
    )


def _lacks_time(everything: Run, method: str, first: Trained) -> str | None:
    """A refit that cannot end in time is not begun: unlike a first training it gives nothing then."""
    left, plan = everything.seconds_left(), everything.plan_of(method)
    if left is None:
        return None
    rows = plan.total_steps * plan.batch_size * plan.gradient_accumulation
    rate = first.details["rows_per_second"] / first.details["processes"]  # 0 where there was no time for a step
    if rows <= rate * left:
        return None
    return f"{rows:,} rows at {rate:.1f} a second do not fit into the {max(0.0, left):.0f} s that are left"


def _went_wrong(everything: Run, method: str, again: Trained, first: Trained) -> str | None:
    """Nothing is held out to judge a refit by, but rows that it has learnt from it must not answer worse than the
    model that has never seen them, beyond chance."""
    if again.details["steps"] < everything.plan_of(method).total_steps:
        return f"it did not come to its end ({again.details['stopped']})"
    rows, seed = everything.validation, everything.plan.seed
    side = Side(
        again.validation_logits, rows.labels, everything.labels, {}, Calibration(), everything.plan.deciding, seed
    )
    figures = everything.rules.compare(side, first.validation_logits)
    if figures["gain"] >= 0 or figures["p_value"] > _WORSE_BY_CHANCE:
        return None
    place = "on the validation rows, which it has learnt from"
    return f"it is worse {place}: {figures['metric']} by {figures['difference']:+.4f}, p {figures['p_value']:.2g}"
