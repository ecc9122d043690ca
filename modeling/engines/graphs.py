"""An engine over exported graphs, whatever runtime computes them. No torch.

A runtime is a `Session`: numpy arrays in, the pooled vectors out. `GraphEngine` pads, sends rows with
adapters through the graph that takes slots and the others through the bare one, and keeps the stacks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modeling.adapters import Adapter, LoraLayout
from modeling.engines.protocol import Collate, EngineBatch, MemoryUse
from modeling.engines.slots import AdapterStacks, Stack, adapters_first
from modeling.errors import EngineFailed
from modeling.inputs.base import Arrays, Features
from modeling.weights import FloatArray

SLOTS_INPUT = "lora_slots"
OUTPUT = "pooled"
_EXPORT_SCHEMA = 4  # raised when the graphs change for the same weights
_EXPORTERS = ("torch", "onnx", "onnxscript", "transformers")


def a_input(group: int) -> str:
    return f"lora_a.{group}"


def b_input(group: int, linear: int) -> str:
    return f"lora_b.{group}.{linear}"


def graphs_key(digest: str) -> str:
    """The folder name of an export: it changes with the weights, torch and the exporter."""
    versions = {name: importlib.metadata.version(name) for name in _EXPORTERS}
    key = json.dumps({"schema": _EXPORT_SCHEMA, "digest": digest, **versions}, sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class GraphFiles:
    """A backbone's export: the bare graph, the one that takes adapters unless it was left out, and a description that
    is written last. `suffix` names a variant of both."""

    folder: Path
    suffix: str = ""

    def variant(self, suffix: str) -> GraphFiles:
        return GraphFiles(self.folder, suffix)

    @property
    def bare(self) -> Path:
        return self._file("backbone")

    @property
    def lora(self) -> Path:
        return self._file("lora")

    def _file(self, name: str) -> Path:
        return self.folder / (f"{name}.{self.suffix}.onnx" if self.suffix else f"{name}.onnx")

    @property
    def description(self) -> Path:
        return self.folder / "graphs.json"

    @property
    def is_complete(self) -> bool:
        """Whether all is there as it was written and as this version reads it; a damaged graph is not."""
        try:
            values = json.loads(self.description.read_bytes())
            return bool(values["schema"] == _EXPORT_SCHEMA and values["bytes"] == self._sizes())
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def describe(self, layout: LoraLayout, *, hidden_size: int) -> None:
        """Written last: from here on the export is complete. Raises `OSError`."""
        values = {"layout": json.loads(layout.to_json()), "pad_id": 0, "hidden_size": hidden_size}
        document = json.dumps({**values, "schema": _EXPORT_SCHEMA, "bytes": self._sizes()})
        _place(self.description, lambda temporary: temporary.write_text(document))

    def adopt(self, origin: GraphFiles) -> None:
        """Takes over a complete export, as links where the file system allows. Raises `OSError`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [origin.bare, *([origin.lora] if origin.lora.is_file() else []), origin.description]:
            _place(self.folder / path.name, partial(_link, path))

    def _sizes(self) -> dict[str, int]:
        return {
            path.name: path.stat().st_size
            for path in (GraphFiles(self.folder).bare, GraphFiles(self.folder).lora)
            if path.is_file()
        }

    def discard(self) -> None:
        """The next export is done anew, and with it what was made of the graphs: other precisions."""
        self.description.unlink(missing_ok=True)
        for graph in self.folder.glob("*.onnx"):
            graph.unlink(missing_ok=True)

    @cached_property
    def _values(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.description.read_bytes()))
        except (OSError, ValueError) as error:
            raise EngineFailed(f"{self.folder.name}: the export is incomplete; delete the folder") from error

    @property
    def layout(self) -> LoraLayout:
        return LoraLayout.from_json(json.dumps(self._values["layout"]))

    @property
    def hidden_size(self) -> int:
        return int(self._values["hidden_size"])


def _place(target: Path, write: Callable[[Path], object]) -> None:
    temporary = target.with_name(f"{target.name}.{os.getpid()}.partial")
    temporary.unlink(missing_ok=True)
    write(temporary)
    temporary.replace(target)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


class Session(Protocol):
    """One graph on one runtime."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> FloatArray:
        """The pooled vectors float32[rows, hidden]; inputs that the graph lacks are ignored. Raises `EngineFailed`."""

    def bind(self, stacks: Mapping[str, Stack]) -> None:
        """Inputs that stay from run to run. The arrays are read at each run, not copied, where the runtime can."""

    def memory_bytes(self) -> int: ...


class GraphEngine:
    """One backbone on one runtime. The adapters' graph is opened with the first adapter."""

    def __init__(
        self,
        name: str,
        files: GraphFiles,
        open_session: Callable[[Path], Session],
        collate: Collate,
        *,
        device: str,
        precision: str,
        stack_dtype: npt.DTypeLike = np.float32,
        adapter_slots: int = 32,
        slots_budget_bytes: int = 1 << 40,
        width: Callable[[int], int] = lambda longest: longest,
    ) -> None:
        """`width` rounds a batch's longest row up, for a runtime that would have few different shapes."""
        self.width = width
        self.name, self.device, self.precision = name, device, precision
        self.files, self._open = files, open_session
        self._collate, self._hidden_size = collate, files.hidden_size
        self._bare = open_session(files.bare)
        self._lora: Session | None = None
        self._layout = files.layout
        self._stacks = AdapterStacks(
            self._layout, capacity=adapter_slots, dtype=stack_dtype, budget_bytes=slots_budget_bytes
        )
        self._generation = 0

    def run(self, batch: EngineBatch) -> FloatArray:
        if batch.adapters is None or not any(batch.adapters):
            return self._bare.run(self._feeds(batch.inputs))
        vectors = np.zeros((len(batch.inputs), self._hidden_size), dtype=np.float32)
        for rows, keys in adapters_first(batch, capacity=self._stacks.capacity):
            # Rows without an adapter skip its work: they run on the bare graph.
            adapted, bare = rows[: len(keys)], rows[len(keys) :]
            if adapted:
                vectors[adapted] = self._run_adapted([batch.inputs[row] for row in adapted], keys)
            if bare:
                vectors[bare] = self._bare.run(self._feeds([batch.inputs[row] for row in bare]))
        return vectors

    def load_adapter(self, key: str, adapter: Adapter) -> None:
        self._stacks.load(key, adapter)
        if self._lora is None:
            try:
                self._lora = self._open(self.files.lora)
            except EngineFailed:
                self._stacks.unload(key)
                raise

    def unload_adapter(self, key: str) -> None:
        self._stacks.unload(key)

    def memory(self) -> MemoryUse:
        weights = self._bare.memory_bytes() + (self._lora.memory_bytes() if self._lora is not None else 0)
        return MemoryUse(weights, self._stacks.slot_bytes())

    def adapter_bytes(self, key: str) -> int:
        return self._stacks.adapter_bytes(key)

    def _run_adapted(self, inputs: Sequence[Features], keys: Sequence[str]) -> FloatArray:
        slots = self._stacks.rows(keys)
        assert self._lora is not None  # opened with the first adapter
        written = self._stacks.take_written()
        if self._generation != self._stacks.generation or written:
            self._generation = self._stacks.generation
            self._lora.bind(self._named_stacks())
        return self._lora.run(self._feeds(inputs) | {SLOTS_INPUT: slots})

    def _feeds(self, inputs: Sequence[Features]) -> Arrays:
        return self._collate(inputs, self.width(max(row.cost for row in inputs)))

    def _named_stacks(self) -> dict[str, Stack]:
        stacks = {}
        for number, group in enumerate(self._layout.groups):
            stacks[a_input(number)] = self._stacks.a(number)
            for index in range(len(group.linears)):
                stacks[b_input(number, index)] = self._stacks.b(number, index)
        return stacks
