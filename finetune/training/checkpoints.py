"""What a resumed run needs, and how it is written down and read back: safetensors and JSON, never pickle.

Weights, optimiser, gradient scaler, every random state, the position in the epoch (the step), the best so far with its
answers on validation, and the patience left. The learning rate is a function of the step and of `plateaus`.

`latest.json` is replaced last and names the tensors' file, so a crash or a full disk at any moment
leaves the checkpoint before it in force.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from finetune.data.targets import Metric
from finetune.jobs.hyperparameters import EarlyStopping
from model_registry.store import sync_folder

_LATEST = "latest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name and the rest of a run's state as JSON."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, step: int) -> None:
    """Writes a checkpoint and removes older ones. Raises `OSError` with the one before untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{step}.safetensors"
    data = save({key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()})
    _write_durably(folder / name, data)
    document = {"tensors": name, "sha256": hashlib.sha256(data).hexdigest(), "state": checkpoint.state}
    _write_durably(folder / _LATEST, json.dumps(document).encode())
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None where there is none that can be trusted."""
    try:
        document = json.loads((folder / _LATEST).read_bytes())
        data = (folder / Path(document["tensors"]).name).read_bytes()
        if hashlib.sha256(data).hexdigest() != document["sha256"]:
            return None
        return Checkpoint(load(data), document["state"])
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


# What is in one


@dataclass(slots=True)
class Progress:
    """The part of a run's state that is not tensors. `trained_s` counts steps alone."""

    step: int = 0
    best_value: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    plateaus: int = 0
    stopped: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_rows: int = 0
    halved: int = 0
    trained_s: float = 0.0
    trained_rows: int = 0
    least_loss: float | None = None

    def observe(self, value: float, rule: EarlyStopping, metric: Metric, *, loss: float | None = None) -> bool:
        """Takes in an evaluation; whether it is the best so far. `stopped` is set when the patience is at its end.

        With `loss` an evaluation whose loss is the lowest so far is no sign to stop: the F1 of entities begins to rise
        long after the loss began to fall.
        """
        if self.best_value is None or metric.gain(value) > metric.gain(self.best_value) + rule.min_delta:
            self.best_value, self.best_step, self.evaluations_without_gain = value, self.step, 0
            return True
        is_lower = loss is not None and (self.least_loss is None or loss < self.least_loss)
        self.least_loss = loss if is_lower else self.least_loss
        self.evaluations_without_gain = 0 if is_lower else self.evaluations_without_gain + 1
        self.plateaus += 1
        if self.evaluations_without_gain >= rule.patience:
            self.stopped = "early stopping"
        return False


@dataclass(frozen=True, slots=True)
class Best:
    """The trainable weights of the best evaluation, on the CPU, and its logits float32[validation rows, labels]."""

    weights: dict[str, torch.Tensor]
    logits: torch.Tensor


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(weights[name])


def to_checkpoint(
    progress: Progress,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    best: Best | None,
    *,
    scaler: Any,
    identity: dict[str, Any],
) -> Checkpoint:
    """`identity` says which run it is: only the same one goes on from it."""
    tensors: dict[str, torch.Tensor] = {f"model.{name}": value for name, value in trainable(model).items()}
    if best is not None:
        tensors |= {f"best.{name}": value for name, value in best.weights.items()} | {"best_logits": best.logits}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            elif value is not None:
                numbers[f"{index}.{key}"] = value
    tensors |= _random_tensors()
    state = {
        "identity": identity,
        "progress": asdict(progress),
        "optimizer": numbers,
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": _random_numbers(),
    }
    return Checkpoint(tensors, state)


def from_checkpoint(
    found: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, scaler: Any
) -> tuple[Progress, Best | None]:
    """Puts weights, optimiser and random state in place."""
    tensors = found.tensors
    load_weights(model, _under("model.", tensors))
    best = Best(_under("best.", tensors), tensors["best_logits"]) if "best_logits" in tensors else None
    state: dict[str, Any] = optimizer.state_dict()
    state["state"] = {}
    for place, value in (_under("optimizer.", tensors) | found.state["optimizer"]).items():
        index, _, key = place.partition(".")
        state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)
    if scaler is not None and found.state["scaler"] is not None:
        scaler.load_state_dict(found.state["scaler"])
    _restore_random(tensors, found.state["random"])
    return Progress(**found.state["progress"]), best


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _random_tensors() -> dict[str, torch.Tensor]:
    tensors = {"rng.torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        tensors[f"rng.cuda.{index}"] = torch.cuda.get_rng_state(index)
    return tensors


def _random_numbers() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss]}


def _restore_random(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    for name, state in _under("rng.cuda.", tensors).items():
        torch.cuda.set_rng_state(state, int(name))
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), position, has_gauss, cached))
