"""A modality that is no text: sequences of samples with several channels, whose graph has two inputs, and tasks on it.

What a package with a new modality would bring: a file's worth each for the input, the network, the checkpoint and the
tasks. `registered` makes the entries in the dicts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from modeling.backbone import Backbone
from modeling.errors import BackboneUnavailable, InputTooLong
from modeling.ingestion import READERS, Checkpoint
from modeling.ingestion.base import read_json
from modeling.inputs import MODALITIES, Arrays, BadCell, Cell, Features, FileReference, padded
from modeling.networks import NETWORKS, Tensors
from modeling.tasks import TASKS, Answer, Calibration, Options, RowOutput
from modeling.tasks.single_label import SingleLabel

CHANNELS, HIDDEN, LIMIT = 2, 16, 24
KIND, PER_POSITION, RANKING = "series-classification", "series-labels", "series-ranking"
Series = npt.NDArray[np.float32]
"""Samples float32[positions, channels]."""


def as_series(values: Any) -> Series:
    return np.asarray(values, np.float32).reshape(-1, CHANNELS)


# The input


class SeriesModality:
    name: ClassVar[str] = "series"
    unit: ClassVar[str] = "sample"
    plural: ClassVar[str] = "series"
    ignores: ClassVar[str] = ""
    roles: ClassVar[tuple[str, ...]] = ("series",)
    suffixes: ClassVar[frozenset[str]] = frozenset({".f32"})
    libraries: ClassVar[tuple[str, ...]] = ()
    has_baseline: ClassVar[bool] = False

    def open(self, folder: Path, *, limit: int) -> SeriesPreprocessor:
        return SeriesPreprocessor(folder, limit=limit)

    def read(self, cells: Mapping[str, Cell]) -> Series:
        cell = cells["series"]
        if not isinstance(cell, FileReference):
            raise BadCell("is no file", code="bad_series", fix="pack the series as files of float32")
        content = cell.read(1 << 20)
        if len(content) % (4 * CHANNELS):
            raise BadCell("ends within a sample", code="bad_series", fix=f"write {CHANNELS} numbers a sample")
        return as_series(np.frombuffer(content, "<f4"))

    def content(self, example: Series) -> bytes:
        return example.astype("<f4").tobytes()

    def digest(self, example: Series) -> bytes:
        return blake2b(self.content(example), digest_size=16).digest()

    def size(self, example: Series) -> int:
        return len(example)

    def is_empty(self, example: Series) -> bool:
        return len(example) == 0

    def with_prompt(self, example: Series, prompt: str) -> Series:
        raise NotImplementedError("no checkpoint of this modality has prompts")

    def to_json(self, example: Series) -> list[list[float]]:
        found: list[list[float]] = example.tolist()
        return found

    def from_json(self, value: Any) -> Series:
        return as_series(value)

    def probe_set(self, count: int) -> tuple[list[Series], list[int]]:
        random = np.random.default_rng(0)
        topics = [row % 2 for row in range(count)]
        made = [as_series(random.normal(size=(5 + row % 9, CHANNELS)) + topic) for row, topic in enumerate(topics)]
        return made, topics


class SeriesPreprocessor:
    """Scales samples as the checkpoint's `series.json` says. What is longer than the limit is cut or, if it must not
    be, read in windows."""

    padding: ClassVar[Mapping[str, float]] = {}

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.limit = limit
        self._scale = np.float32(json.loads((folder / "series.json").read_bytes())["scale"])

    def encode(
        self, examples: Sequence[Series], *, truncate: bool = True, limit: int | None = None
    ) -> list[list[Features]]:
        most = min(limit or self.limit, self.limit)
        for index, example in enumerate(examples):
            if len(example) > 2 * most and not truncate:
                raise InputTooLong(f"input {index} has {len(example)} samples, more than {2 * most}", index=index)
        return [self._windows(example, most, truncate=truncate) for example in examples]

    def collate(self, rows: Sequence[Features], width: int) -> Arrays:
        return padded(rows, width, mask="mask")

    def sample(self, cost: int) -> Features:
        return Features({"values": np.ones((cost, CHANNELS), np.float32)}, cost)

    def _windows(self, example: Series, most: int, *, truncate: bool) -> list[Features]:
        starts = [0] if truncate else range(0, len(example), most)
        parts = [example[start : start + most] * self._scale for start in starts]
        return [Features({"values": part}, len(part), is_truncated=truncate and len(example) > most) for part in parts]


# The network


class SeriesEncoder(nn.Module):
    """Each position sees its own sample, and the mean of all positions of its row."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(CHANNELS, HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.into(values))
        own = mask.unsqueeze(-1).to(hidden.dtype)
        context = (hidden * own).sum(1, keepdim=True) / own.sum(1, keepdim=True)
        states: torch.Tensor = self.out(hidden + context)
        return states


class SeriesNetwork:
    def load(self, folder: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
        from safetensors.torch import load_file

        module = SeriesEncoder()
        try:
            module.load_state_dict(load_file(str(folder / "model.safetensors")))
        except (OSError, RuntimeError) as error:
            raise BackboneUnavailable(f"{folder.name} holds no encoder of series") from error
        return module.to(dtype or torch.float32).eval()

    def states(self, module: nn.Module, inputs: Tensors) -> torch.Tensor:
        states: torch.Tensor = module(inputs["values"], inputs["mask"])
        return states

    def mask(self, inputs: Tensors) -> torch.Tensor:
        return inputs["mask"]

    def example(self, module: nn.Module, *, rows: int, positions: int) -> dict[str, torch.Tensor]:
        return {"values": torch.ones(rows, positions, CHANNELS), "mask": torch.ones(rows, positions, dtype=torch.int64)}

    def axes(self, name: str) -> dict[int, str]:
        return {0: "batch", 1: "length"}


# The checkpoint


class SeriesReader:
    model_types = frozenset({"tiny-series"})

    def read(self, folder: Path, config: dict[str, Any], *, has_head: bool = False) -> Checkpoint:
        return Checkpoint(
            config=config,
            files={"series.json": json.dumps(read_json(folder / "series.json", {})).encode()},
            hidden_size=HIDDEN,
            layers=1,
            max_length=config["max_length"],
            pooling="mean",
            normalize=False,
            identity="mean",
        )

    def prompts(self, folder: Path) -> Mapping[str, str]:
        return {}

    def check_files(self, folder: Path) -> None: ...

    def check(self, folder: Path, taken: Backbone) -> None:
        SeriesNetwork().load(taken.folder)


def write_checkpoint(folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(SeriesEncoder().state_dict(), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny-series", "max_length": LIMIT}))
    (folder / "series.json").write_text(json.dumps({"scale": 0.5}))
    return folder


# The tasks


class PositionLabels(Answer):
    labels: list[str]


class Ranks(Answer):
    scores: list[float]


@dataclass(frozen=True, slots=True)
class LabelPerPosition(SingleLabel):
    """The most probable label of each position; several windows are read one after the other."""

    needs: ClassVar[Literal["pooled", "states"]] = "states"
    kind: ClassVar[str] = "label_per_position"
    observes: ClassVar[tuple[str, ...]] = ()
    answer_type: ClassVar[type[Answer]] = PositionLabels

    def reduce(  # type: ignore[override]
        self, rows: Sequence[RowOutput], labels: Sequence[str], calibration: Calibration, options: Options
    ) -> PositionLabels:
        best = np.concatenate([row.scores.argmax(axis=1) for row in rows])
        return PositionLabels(0, [labels[index] for index in best.tolist()])

    def observed(self, answers: Sequence[Any], calibration: Calibration) -> Sequence[Sequence[float]]:
        return ()


@dataclass(frozen=True, slots=True)
class Ranking(SingleLabel):
    """A query against documents: each is a row behind the query, and its score is the first label's."""

    kind: ClassVar[str] = "ranking"
    observes: ClassVar[tuple[str, ...]] = ()
    expands: ClassVar[bool] = True
    answer_type: ClassVar[type[Answer]] = Ranks

    def expand(self, item: tuple[Series, Sequence[Series]], options: Options) -> list[Series]:
        query, documents = item
        return [np.concatenate([query, document]) for document in documents]

    def reduce(  # type: ignore[override]
        self, rows: Sequence[RowOutput], labels: Sequence[str], calibration: Calibration, options: Options
    ) -> Ranks:
        return Ranks(0, [float(row.scores[0]) for row in rows])

    def observed(self, answers: Sequence[Any], calibration: Calibration) -> Sequence[Sequence[float]]:
        return ()


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The whole of what the source would have to say: a line in each dict."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODALITIES, "series", SeriesModality())
        patch.setitem(NETWORKS, "series", SeriesNetwork())
        patch.setitem(READERS, "series", SeriesReader())
        patch.setitem(TASKS, KIND, SingleLabel(KIND, "series"))
        patch.setitem(TASKS, PER_POSITION, LabelPerPosition(PER_POSITION, "series"))
        patch.setitem(TASKS, RANKING, Ranking(RANKING, "series"))
        yield
