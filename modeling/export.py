"""torch → ONNX, with the proof that both compute the same.

The graph ends at the pooled vector: heads stand outside, so one export serves every head.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modeling.backbone import Backbone, load_encoder
from modeling.engines.protocol import Engine, EngineBatch
from modeling.engines.torch import pool, takes_type_ids
from modeling.preprocess import Encoded

EXPORT_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a candidate stands from the reference on the same inputs."""

    rows: int
    min_cosine: float
    max_abs_diff: float


def cache_name(backbone: Backbone) -> str:
    """The file name of this backbone's export: it changes with the content, torch and the exporter."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript", "transformers")}
    key = json.dumps({"schema": EXPORT_SCHEMA, "digest": backbone.info.digest, **versions}, sort_keys=True)
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.onnx"


def export_onnx(backbone: Backbone, target: Path) -> Path:
    """Writes the pooled encoder as one ONNX file with dynamic batch and length; returns it at once if it is there."""
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".partial")
    graph = _Pooled(load_encoder(backbone.folder), backbone.info.pooling)
    batch, length = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("length", min=2, max=4096)
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if graph.takes_types else [])
    example = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names)
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            input_names=names,
            output_names=["pooled"],
            dynamic_shapes=tuple({0: batch, 1: length} for _ in names),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.save(str(temporary), external_data=False)
    temporary.replace(target)
    return target


def measure_parity(reference: Engine, candidate: Engine, inputs: Sequence[Encoded], *, batch_size: int = 16) -> Parity:
    """Runs both engines on `inputs` and compares the pooled vectors."""
    cosines, differences = [], []
    for start in range(0, len(inputs), batch_size):
        batch = EngineBatch(inputs[start : start + batch_size])
        ours, theirs = reference.run(batch), candidate.run(batch)
        scale = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosines.append((ours * theirs).sum(1) / np.maximum(scale, 1e-12))
        differences.append(np.abs(ours - theirs).max())
    return Parity(len(inputs), float(np.concatenate(cosines).min()), float(max(differences)))


class _Pooled(nn.Module):
    def __init__(self, encoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.takes_types = takes_type_ids(encoder.config)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        extra = {"token_type_ids": token_type_ids} if self.takes_types else {}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **extra).last_hidden_state
        return pool(states, attention_mask, self.pooling)


class _quiet_exporter:
    """The exporter logs its progress at warning level; only its failures are of interest."""

    def __enter__(self) -> None:
        self._loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
