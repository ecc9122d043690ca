"""Lanes, an engine with its queue each, and the models served on them. Heads and adapters of one backbone share a lane;
linear models share one too."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from modeling.adapters import Adapter
from modeling.assemble import VersionParts
from modeling.backbone import Backbone
from modeling.engines.build import EngineSpec
from modeling.engines.protocol import Engine, EngineBatch, EngineOutputs
from modeling.errors import EngineFailed
from modeling.heads import TaskHead
from modeling.inputs import MODALITIES, Example, Features, open_preprocessor
from modeling.inputs.words import LOCATED
from modeling.linear_tokens import located_words
from modeling.tasks import DEFAULT_MODALITY, NO_CALIBRATION, Calibration, Task
from modeling.weights import FloatArray
from service.inference.capacity import CostEstimate
from service.inference.engine_worker import BatchLimits, EngineWorker, Outputs, Record, Runtime
from service.inference.queue import Margins, Model, QueueEntry, Work
from service.inference.warm_up import Measured, timed_runs
from service.metrics import ModelLabels, ServingMetrics

_log = logging.getLogger("service.lanes")
_CHECK_COST = 8
_MEASURE_S = 0.5
_SIZE_PER_UNIT = 16  # tf-idf costs a small part of what an encoder does
_UNITS_PER_WORD, _SIZE_OF_WORD = 5, 5  # of a linear model of entities, whose words cost some 50 µs
_UNCUT, _SHARED = 1 << 30, 4 / 3  # windows share a quarter


class Lane(Protocol):
    """What a served model needs of the engine under it. `max_length` bounds an input, in the lane's unit."""

    worker: EngineWorker
    max_length: int
    cost_estimate: CostEstimate

    @property
    def engine_name(self) -> str: ...

    def estimate(self, inputs: Sequence[Example], max_length: int, *, in_windows: bool) -> int:
        """Estimate what the examples cost, before they are prepared."""

    def preprocess(
        self, inputs: Sequence[Example], *, truncate: bool, max_length: int | None, in_windows: bool = False
    ) -> Sequence[Sequence[Work]]:
        """Prepare each example for the queue; called on a preprocessor thread. `in_windows`: whole, as tasks need it
        that answer places."""


class BackboneLane:
    """One backbone's engine and preprocessor. Another engine may take over between two batches."""

    def __init__(
        self,
        backbone: Backbone,
        engine: Engine,
        metrics: ServingMetrics,
        limits: BatchLimits,
        *,
        label: str,
        record: Record | None = None,
        runtime: Runtime = Runtime(),
    ) -> None:
        self.backbone = backbone
        self._take_over(engine)
        self.max_length = backbone.info.max_length
        self.cost_estimate = CostEstimate(MODALITIES[backbone.info.modality].size)
        self._limits = limits
        self._preprocessor = open_preprocessor(backbone)
        self._with_states: set[str | None] = set()
        self.worker = EngineWorker(
            (label, self.engine_name),
            self,
            metrics,
            limits,
            padded_width=lambda longest: self.engine.width(longest),
            record=record,
            runtime=runtime,
        )

    def estimate(self, inputs: Sequence[Example], max_length: int, *, in_windows: bool) -> int:
        if not in_windows:
            return self.cost_estimate.cost(inputs, max_length)
        whole = self.cost_estimate.cost(inputs, _UNCUT)
        return whole if whole <= max_length else int(whole * _SHARED)

    def preprocess(
        self, inputs: Sequence[Example], *, truncate: bool, max_length: int | None, in_windows: bool = False
    ) -> list[list[Features]]:
        if in_windows:
            return self._preprocessor.windows(inputs, limit=max_length)
        return self._preprocessor.encode(inputs, truncate=truncate, limit=max_length)

    def open_states(self, adapter: str | None) -> None:
        """Rows with this adapter, None for the bare backbone, can be given states from now on, also by engines to come.
        Blocks while the engine makes ready; call it on no engine's thread. Raises `EngineFailed`."""
        self.engine.open_states(adapter)
        self._with_states.add(adapter)

    async def switch(self, engine: Engine, adapters: Mapping[str, Adapter]) -> None:
        """`engine` takes over with these adapters and a first run behind it. Raises `ModelingError`; then nothing
        has changed. No adapter may be loaded or unloaded meanwhile."""

        def prepare() -> None:
            for key, adapter in adapters.items():
                engine.load_adapter(key, adapter)
            for asking in self._with_states & {None, *adapters}:
                engine.open_states(asking)
            row = self._preprocessor.sample(_CHECK_COST)
            engine.run(EngineBatch([row]))
            if adapters:
                engine.run(EngineBatch([row], [next(iter(adapters))]))

        await asyncio.to_thread(prepare)
        await self.worker.exchange(partial(self._take_over, engine))

    async def close(self) -> None:
        """The engine goes at once: lane and worker hold on to each other, which only a garbage collection would end."""
        await self.worker.stop()
        del self.engine

    def costs_as(self, other: BackboneLane) -> bool:
        """Takes over what batches cost on a lane of the same shape, on the CPU and if the engines are alike."""
        if self.engine.device != "cpu" or self.engine_name != other.engine_name:
            return False
        load = other.worker.load
        self.worker.calibrate(replace(load.cost), load.max_tokens)
        return True

    async def measure(self) -> None:
        """Times the engine, one run at a time between batches: what a batch costs, and how large one should be.

        Raises `EngineFailed` where it cannot compute at all.
        """
        steps = timed_runs(
            max_tokens=self._limits.max_tokens,
            max_rows=self._limits.max_rows,
            max_length=self.max_length,
            seconds=_MEASURE_S,
        )
        try:
            shape = next(steps)
            while True:
                shape = steps.send(await self.worker.call(partial(self._time, *shape)))
        except StopIteration as end:
            measured: Measured = end.value
        self.worker.calibrate(measured.cost, measured.max_tokens)
        _log.info(
            f"{self.engine_name} takes {measured.cost.fixed_s * 1e3:.2f} ms a run and "
            f"{measured.cost.per_token_s * 1e6:.2f} us a token; a batch holds {measured.max_tokens} tokens",
            extra={"action": "engine_measured", "backbone": self.worker.name[0]},
        )

    def compute(self, entries: Sequence[QueueEntry]) -> Outputs:
        """One run for rows of all models and adapters; heads follow, grouped by model."""
        inputs = cast("list[Features]", [entry.work for entry in entries])  # as `preprocess` made them
        adapters = [entry.ticket.model.adapter_key for entry in entries]
        states = _rows_that_need_states(entries) if self._with_states else ()
        batch = EngineBatch(inputs, adapters if any(adapters) else None, states)
        return apply_heads(entries, self.engine.run(batch))

    def _take_over(self, engine: Engine) -> None:
        self.engine, self.engine_name = engine, str(EngineSpec(engine.name, engine.precision))

    def check(self) -> None:
        """Raises `EngineFailed` where the engine does not compute a row that any engine can."""
        if not np.isfinite(self.engine.run(self._sample(1, _CHECK_COST)).pooled).all():
            raise EngineFailed("the engine gives values that are not finite")

    def _time(self, rows: int, length: int) -> float | None:
        """Seconds of a run, the better of two once it is warm; None where the engine fails at it."""
        batch = self._sample(rows, length)
        try:
            took = [self._run_s(batch) for _ in range(3)]
        except (EngineFailed, MemoryError) as error:
            _log.warning(f"{rows} rows of {length} tokens are too many: {error}", extra={"action": "engine_measured"})
            return None
        return min(took[1:])

    def _run_s(self, batch: EngineBatch) -> float:
        started = time.perf_counter()
        self.engine.run(batch)
        return time.perf_counter() - started

    def _sample(self, rows: int, cost: int) -> EngineBatch:
        return EngineBatch([self._preprocessor.sample(cost)] * rows)


@dataclass(frozen=True, slots=True)
class Raw:
    """An example for a model that needs no preprocessor; its cost is estimated from its size."""

    example: Example
    cost: int
    extra: Mapping[str, Any] = field(default_factory=dict)


class LinearLane:
    """All tf-idf baselines: no backbone, so one queue and thread serve them."""

    engine_name = "linear"
    max_length = 1 << 30  # whatever a request may hold

    def __init__(
        self,
        metrics: ServingMetrics,
        limits: BatchLimits,
        *,
        record: Record | None = None,
        runtime: Runtime = Runtime(),
    ) -> None:
        self._size = MODALITIES[DEFAULT_MODALITY].size
        self.cost_estimate = CostEstimate(self._size, _SIZE_PER_UNIT)
        self.worker = EngineWorker(("linear", self.engine_name), self, metrics, limits, record=record, runtime=runtime)

    def estimate(self, inputs: Sequence[Example], max_length: int, *, in_windows: bool) -> int:
        if in_windows:
            return len(inputs) + sum(map(self._size, inputs)) * _UNITS_PER_WORD // _SIZE_OF_WORD
        return self.cost_estimate.cost(inputs, max_length)

    def preprocess(
        self, inputs: Sequence[Example], *, truncate: bool, max_length: int | None, in_windows: bool = False
    ) -> list[list[Raw]]:
        if not in_windows:
            return [[Raw(item, 1 + self._size(item) // _SIZE_PER_UNIT)] for item in inputs]
        extras = [located_words(item) for item in inputs]
        return [
            [Raw(item, 1 + _UNITS_PER_WORD * len(extra[LOCATED].words), extra)]
            for item, extra in zip(inputs, extras, strict=True)
        ]

    def compute(self, entries: Sequence[QueueEntry]) -> Outputs:
        vectors = np.zeros((len(entries), 1), dtype=np.float32)
        works = cast("list[Raw]", [entry.work for entry in entries])  # as `preprocess` made them

        def margins(model: Model, rows: list[int]) -> Logits:
            assert model.margins is not None
            found = model.margins([works[row].example for row in rows])
            if isinstance(found, np.ndarray):
                return found, None
            return np.concatenate(found), [len(own) for own in found]

        return _answers(entries, vectors, margins)

    def check(self) -> None:
        """There is no engine that could be unfit."""


@dataclass(slots=True, eq=False)
class ServedModel:
    """State `loading warming ready draining unloading`. Leases count the requests that use it now.

    `owns_weights`: the weights of its lane were loaded for this model, which is a backbone or a full fine-tune.
    `prompts` can be asked for by name.
    """

    tenant: str
    name: str
    version: int | None
    task: Task
    labels: tuple[str, ...]
    lane: Lane
    calibration: Calibration = NO_CALIBRATION
    parts: VersionParts | None = None
    adapter_key: str | None = None
    max_length: int | None = None
    normalize_embedding: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    state: str = "ready"
    owns_weights: bool = False
    head: TaskHead | None = field(init=False)
    margins: Margins | None = field(init=False)
    metric_labels: ModelLabels = field(init=False)
    loaded_at: float = field(default_factory=time.time)
    used_at: float = field(default_factory=time.monotonic)
    leases: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.head = None if self.parts is None else self.parts.head
        linear = None if self.parts is None else self.parts.linear
        self.margins = None if linear is None else linear.margins
        version = "" if self.version is None else str(self.version)
        self.metric_labels = (self.name, version, self.task.name, self.tenant)
        self._idle.set()

    @property
    def own_bytes(self) -> int:
        """What it adds to what others need anyhow, on the engine that serves it now."""
        held = 0 if self.parts is None else self.parts.own_bytes
        if isinstance(self.lane, BackboneLane):
            if self.adapter_key is not None:
                held += self.lane.engine.adapter_bytes(self.adapter_key)
            if self.owns_weights:
                held += self.lane.engine.memory().weights
        return held

    @property
    def has_embedding(self) -> bool:
        """Whether it computes vectors of its inputs; a linear model over words does not."""
        return self.margins is None

    @property
    def key(self) -> tuple[str, str, int | None]:
        return (self.tenant, self.name, self.version)

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Until the block ends, the model stays in memory."""
        self.leases += 1
        self.used_at = time.monotonic()
        self._idle.clear()
        try:
            yield
        finally:
            self.leases -= 1
            if self.leases == 0:
                self._idle.set()

    async def drained(self) -> None:
        """Returns once no request uses it."""
        await self._idle.wait()


Logits = tuple[FloatArray, list[int] | None]
"""A model's logits for some rows, end to end, and how many each row has; None if each has one."""


def apply_heads(entries: Sequence[QueueEntry], outputs: EngineOutputs) -> Outputs:
    """Each model's head on its rows, or on their positions: one product per distinct model, whatever the label sets."""

    def logits(model: Model, rows: list[int]) -> Logits | None:
        if model.head is None:
            return None
        values, counts = taken(outputs, rows, model.task.needs)
        return model.head.logits(values), counts

    return _answers(entries, outputs.pooled, logits)


def taken(
    outputs: EngineOutputs, rows: Sequence[int], needs: Literal["pooled", "states"]
) -> tuple[FloatArray, list[int] | None]:
    """Return what a head takes of these rows, float32[values, hidden], and how many values each row has; None if each
    has one."""
    if needs == "pooled":
        return outputs.pooled[rows], None
    own = [outputs.states[row] for row in rows]
    return np.concatenate(own), [len(states) for states in own]


def _answers(
    entries: Sequence[QueueEntry], vectors: FloatArray, logits_of: Callable[[Model, list[int]], Logits | None]
) -> Outputs:
    """Each model's scores, as its task makes them of logits, for all of its rows at once."""
    scores: list[FloatArray | None] = [None] * len(entries)
    is_finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
    with np.errstate(invalid="ignore", over="ignore"):  # such rows fail below
        for model, rows in rows_by_model(entries):
            logits = logits_of(model, rows)
            if logits is None:
                continue
            values: FloatArray | list[FloatArray] = model.task.scores(logits[0], model.calibration)
            are_finite = np.isfinite(values).all(axis=1)
            if logits[1] is not None:
                ends = np.cumsum(logits[1], dtype=np.int64)
                are_finite = np.logical_and.reduceat(are_finite, ends - logits[1])
                values = np.split(values, ends[:-1])
            is_finite[rows] &= are_finite
            for row, of_row in zip(rows, values, strict=True):
                scores[row] = of_row
    return Outputs(vectors, scores, is_finite.tolist())


def _rows_that_need_states(entries: Sequence[QueueEntry]) -> list[int]:
    return [row for row, entry in enumerate(entries) if entry.ticket.model.task.needs == "states"]


def rows_by_model(entries: Sequence[QueueEntry]) -> list[tuple[Model, list[int]]]:
    groups: dict[Model, list[int]] = {}
    for row, entry in enumerate(entries):
        groups.setdefault(entry.ticket.model, []).append(row)
    return list(groups.items())
