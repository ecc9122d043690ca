"""Which versions are in memory, what they take of the budget, and which of them go when it is exceeded."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

from service.inference.aliases import Key
from service.inference.engine_director import EngineDirector
from service.inference.errors import MemoryBudgetExceeded
from service.inference.lanes import BackboneLane, ServedModel
from service.metrics import ModelLabels, ServingMetrics


class Residency:
    """Configured backbones do not count. Other backbones count while versions run on them, once for all of these.

    `pinned` versions never go, `previous` ones last.
    """

    def __init__(self, budget_bytes: int, engines: EngineDirector, metrics: ServingMetrics) -> None:
        self._budget_bytes, self._engines, self._metrics = budget_bytes, engines, metrics
        self.pinned: set[Key] = set()
        self.previous: set[Key] = set()
        self._promised: Counter[Key] = Counter()
        self._models: dict[Key, ServedModel] = {}
        self._unloads: set[asyncio.Task[None]] = set()

    def get(self, key: Key) -> ServedModel | None:
        return self._models.get(key)

    def __contains__(self, key: Key) -> bool:
        return key in self._models

    def add(self, key: Key, model: ServedModel) -> None:
        self._models[key] = model

    @contextlib.contextmanager
    def promise(self, key: Key) -> Iterator[None]:
        """Until the block ends, `key` is pinned: an alias is about to point at it."""
        self._promised[key] += 1
        try:
            yield
        finally:
            self._promised[key] -= 1

    def check_room(self, needed: int, what: str) -> None:
        """Raises `MemoryBudgetExceeded` if `needed` bytes do not fit even after all that is not pinned has gone."""
        held = self._held(model for key, model in self._models.items() if self._is_pinned(key))
        if held + needed > self._budget_bytes:
            raise MemoryBudgetExceeded(
                f"{what} needs {needed} bytes, versions with an alias hold {held} of the {self._budget_bytes} allowed; "
                "remove an alias or raise memory_budget_bytes"
            )

    def release(self) -> None:
        """Over the budget, unloads what is not pinned, the least recently used first."""
        idle = [key for key in self._models if not self._is_pinned(key)]
        for key in sorted(idle, key=lambda key: (key in self.previous, self._models[key].used_at)):
            if self._held(self._models.values()) <= self._budget_bytes:
                break
            self._metrics.adapter_evictions_total.inc()
            self._let_go(key)

    def remove(self, key: Key) -> bool:
        """Unloads a deleted version once its requests have ended; False while it is pinned."""
        if self._is_pinned(key):
            return False
        if key in self._models:
            self._let_go(key)
        else:
            self._metrics.stop_version(*key)
        return True

    def _let_go(self, key: Key) -> None:
        task = asyncio.create_task(self._unload(self._models.pop(key)))
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    async def stop(self) -> None:
        for task in self._unloads:
            task.cancel()
        await asyncio.gather(*self._unloads, return_exceptions=True)

    async def _unload(self, model: ServedModel) -> None:
        """By the time that its last request has ended, the version may have been loaded anew: all of it stays as is."""
        labels = model.metric_labels
        model.state = "draining"
        if not self._is_shown(labels):
            self._metrics.set_model_state(*labels, state="draining")
        await model.drained()
        model.state = "unloading"
        await self._engines.detach(model)
        if not self._is_shown(labels):
            self._metrics.stop_model(*labels)

    def _is_shown(self, labels: ModelLabels) -> bool:
        """Whether another model has the same series: a later load of the version."""
        return any(model.metric_labels == labels for model in self._models.values())

    def _is_pinned(self, key: Key) -> bool:
        return key in self.pinned or self._promised[key] > 0

    def _held(self, models: Iterable[ServedModel]) -> int:
        """Bytes of `models`, and of the backbones that they share which are not configured."""
        own, shared = 0, set()
        for model in models:
            own += model.own_bytes
            is_counted = isinstance(model.lane, BackboneLane) and not self._engines.is_configured(model.lane)
            if is_counted and not model.owns_weights:
                shared.add(model.lane)
        return own + sum(lane.engine.memory().weights for lane in shared if isinstance(lane, BackboneLane))
