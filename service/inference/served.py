"""A model that can answer: one version (or a bare backbone) on its lane."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from modeling.assemble import VersionParts
from modeling.heads import TaskHead
from modeling.linear_text import LinearText
from modeling.tasks import NO_CALIBRATION, Calibration, Task
from service.inference.lanes import BackboneLane, Lane


@dataclass(slots=True, eq=False)
class ServedModel:
    """State `loading warming ready draining unloading`. Leases count the requests that use it now.

    `owns_weights`: the weights of its lane were loaded for this model, which is a backbone or a full fine-tune.
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
    state: str = "ready"
    owns_weights: bool = False
    head: TaskHead | None = field(init=False)
    linear: LinearText | None = field(init=False)
    metric_labels: tuple[str, str, str] = field(init=False)
    loaded_at: float = field(default_factory=time.time)
    used_at: float = field(default_factory=time.monotonic)
    leases: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.head = None if self.parts is None else self.parts.head
        self.linear = None if self.parts is None else self.parts.linear
        self.metric_labels = (self.name, "" if self.version is None else str(self.version), self.task.name)
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
    def key(self) -> tuple[str, str, int | None]:
        return (self.tenant, self.name, self.version)

    def acquire(self) -> None:
        self.leases += 1
        self.used_at = time.monotonic()
        self._idle.clear()

    def release(self) -> None:
        self.leases -= 1
        if self.leases == 0:
            self._idle.set()

    async def drained(self) -> None:
        """Returns once no request uses it."""
        await self._idle.wait()
