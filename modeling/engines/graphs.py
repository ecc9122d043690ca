"""An engine over exported graphs, whatever runtime computes them. No torch.

A runtime is a `Session`: numpy arrays in, pooled vectors and, if asked for, states out. `GraphEngine` pads, sends rows
with adapters through the graph that takes slots and the others through the bare one, and keeps the stacks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modeling.adapters import Adapter, LoraLayout
from modeling.engines.protocol import Collate, EngineBatch, EngineOutputs, MemoryUse
from modeling.engines.slots import AdapterStacks, Part, Stack, adapters_first, in_parts
from modeling.errors import EngineFailed
from modeling.inputs.base import Features
from modeling.weights import FloatArray

SLOTS_INPUT = "lora_slots"
POOLED, STATES = "pooled", "states"
_EXPORT_SCHEMA = 6  # raised when the graphs change for the same weights
_READABLE = frozenset({4, 5, _EXPORT_SCHEMA})  # graphs of schema 4 give no states; before 6 they hold their weights
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


def weights_file(graph: Path) -> Path:
    """Return the file beside `graph` that holds its large weights, if there is one: runtimes map it."""
    return graph.with_name(f"{graph.name}.data")


def graph_bytes(graph: Path) -> int:
    """Return the size of a graph, its weights included."""
    return sum(path.stat().st_size for path in (graph, weights_file(graph)) if path.is_file())


@dataclass(frozen=True)
class GraphFiles:
    """A backbone's export: the bare graph, the one that takes adapters unless it was left out, the weights of both, and
    a description that is written last. `suffix` names a variant of both."""

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
            return bool(values["schema"] in _READABLE and values["bytes"] == self._sizes())
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
        for path in [*origin._present(), origin.description]:
            _place(self.folder / path.name, partial(_link, path))

    def _sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self._present()}

    def _present(self) -> list[Path]:
        graphs = GraphFiles(self.folder).bare, GraphFiles(self.folder).lora
        return [path for graph in graphs for path in (weights_file(graph), graph) if path.is_file()]

    def discard(self) -> None:
        """The next export is done anew, and with it what was made of the graphs: other precisions."""
        self.description.unlink(missing_ok=True)
        for file in (*self.folder.glob("*.onnx"), *self.folder.glob("*.onnx.data")):
            file.unlink(missing_ok=True)

    def converted(self, suffix: str, convert: Callable[[Path, Path], object]) -> GraphFiles:
        """Return the variant that `convert` makes of each graph, at once if it is there. Raises `EngineFailed`.

        It gets a copy, because onnx reads no weights that have several links, as those of an adopted graph do.
        """
        made = self.variant(suffix)
        for source, target in ((self.bare, made.bare), (self.lora, made.lora)):
            if source.is_file() and not target.is_file():
                with tempfile.TemporaryDirectory(dir=self.folder, suffix=".partial") as folder:
                    try:
                        for path in (source, weights_file(source)):
                            if path.is_file():
                                shutil.copyfile(path, Path(folder, path.name))
                        convert(Path(folder, source.name), Path(folder, target.name))
                    except (
                        Exception
                    ) as error:  # the libraries raise many kinds, whose messages may hold paths of this host
                        raise EngineFailed(
                            f"{source.name} could not be converted to {suffix} "
                            f"({error if isinstance(error, EngineFailed) else type(error).__name__})"
                        ) from error
                    Path(folder, target.name).replace(target)
        return made

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

    @property
    def has_states(self) -> bool:
        return int(self._values["schema"]) > 4


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

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] = (POOLED,)) -> list[FloatArray]:
        """The outputs named, float32[rows, …]; inputs that the graph lacks are ignored. Raises `EngineFailed`."""

    def bind(self, stacks: Mapping[str, Stack]) -> None:
        """Inputs that stay from run to run. The arrays are read at each run, not copied, where the runtime can."""

    def memory_bytes(self) -> int: ...


class GraphEngine:
    """One backbone on one runtime. The adapters' graph is opened with the first adapter, and a session that gives
    states with the first row that asks for them, where the runtime needs one of its own."""

    def __init__(
        self,
        name: str,
        files: GraphFiles,
        open_session: Callable[[Path], Session],
        collate: Collate,
        *,
        open_with_states: Callable[[Path], Session] | None = None,
        device: str,
        precision: str,
        stack_dtype: npt.DTypeLike = np.float32,
        adapter_slots: int = 32,
        slots_budget_bytes: int = 1 << 40,
        width: Callable[[int], int] = lambda longest: longest,
    ) -> None:
        """`width` rounds a batch's longest row up, for a runtime that would have few different shapes. A session gives
        states as well as pooled vectors unless there is `open_with_states`, whose sessions alone give them."""
        self.width = width
        self.name, self.device, self.precision = name, device, precision
        self.files, self._open, self._open_with_states = files, open_session, open_with_states
        self._collate, self._hidden_size = collate, files.hidden_size
        self._sessions: dict[tuple[Path, bool], Session] = {}
        self._generation = -1  # of the stacks that the sessions hold
        self._session(files.bare)
        self._layout = files.layout
        self._stacks = AdapterStacks(
            self._layout, capacity=adapter_slots, dtype=stack_dtype, budget_bytes=slots_budget_bytes
        )

    def run(self, batch: EngineBatch) -> EngineOutputs:
        return in_parts(batch, self._parts(batch), self._compute, hidden_size=self._hidden_size)

    def open_states(self, adapter: str | None) -> None:
        self._session(self.files.bare if adapter is None else self.files.lora, has_states=True)

    def load_adapter(self, key: str, adapter: Adapter) -> None:
        self._stacks.load(key, adapter)
        try:
            self._session(self.files.lora)
        except EngineFailed:
            self._stacks.unload(key)
            raise

    def unload_adapter(self, key: str) -> None:
        self._stacks.unload(key)

    def memory(self) -> MemoryUse:
        weights = sum(session.memory_bytes() for session in list(self._sessions.values()))
        return MemoryUse(weights, self._stacks.slot_bytes())

    def adapter_bytes(self, key: str) -> int:
        return self._stacks.adapter_bytes(key)

    def _parts(self, batch: EngineBatch) -> Iterator[Part]:
        """Rows without an adapter skip its work: they run on the bare graph."""
        for rows, keys in adapters_first(batch, capacity=self._stacks.capacity):
            if keys:
                yield rows[: len(keys)], keys
            if len(rows) > len(keys):
                yield rows[len(keys) :], []

    def _compute(
        self, rows: Sequence[Features], keys: Sequence[str], has_states: bool
    ) -> tuple[FloatArray, FloatArray | None]:
        feeds = self._collate(rows, self.width(max(row.cost for row in rows)))
        if keys:
            feeds[SLOTS_INPUT] = self._stacks.rows(keys)
        session = self._session(self.files.lora if keys else self.files.bare, has_states=has_states)
        if keys:
            self._bind_stacks()
        pooled, *states = session.run(feeds, (POOLED, STATES) if has_states else (POOLED,))
        return pooled, states[0] if states else None

    def _session(self, graph: Path, *, has_states: bool = False) -> Session:
        """Opened when it is first asked for. Another thread than the engine's may ask for one ahead."""
        if has_states and not self.files.has_states:
            raise EngineFailed(
                f"{self.name}: the exported graphs in {self.files.folder.name} are of an earlier release and give no "
                "states; delete the folder, and they are exported anew"
            )
        open_session = (self._open_with_states if has_states else None) or self._open
        key = graph, open_session is self._open_with_states
        if key not in self._sessions:
            self._sessions[key] = open_session(graph)
            self._generation = -1  # a session that is new has no stacks
        return self._sessions[key]

    def _bind_stacks(self) -> None:
        written = self._stacks.take_written()
        if self._generation != self._stacks.generation or written:
            self._generation = self._stacks.generation
            for (graph, _), session in list(self._sessions.items()):
                if graph == self.files.lora:
                    session.bind(self._named_stacks())

    def _named_stacks(self) -> dict[str, Stack]:
        stacks = {}
        for number, group in enumerate(self._layout.groups):
            stacks[a_input(number)] = self._stacks.a(number)
            for index in range(len(group.linears)):
                stacks[b_input(number, index)] = self._stacks.b(number, index)
        return stacks
