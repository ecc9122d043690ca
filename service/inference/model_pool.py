"""Which model answers a request, and the loop that makes it the one that the registry wants.

The loop is level-triggered: whenever something may have changed (a snapshot of the registry, the end of a load or of
a back-off) it compares what every alias serves with what it should serve, and loads what is missing. Requests only
take leases. All tables change on the event loop alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection

from model_registry.errors import ModelNotFound
from model_registry.refs import CHAMPION, ModelRef
from model_registry.registry import ModelVersion, RegistrySnapshot
from model_registry.store import ArtifactStore
from modeling.backbone import Backbone
from service.inference.aliases import Aliases, AliasKey, Key
from service.inference.assembly import Assembler
from service.inference.batch_log import BatchLog
from service.inference.engine_director import EngineDirector
from service.inference.engine_selection import EngineSelector
from service.inference.engine_worker import BatchLimits, Runtime
from service.inference.errors import ModelNotReady
from service.inference.lanes import ServedModel
from service.inference.loader import Loader
from service.inference.pool_status import PoolStatus
from service.inference.residency import Residency
from service.metrics import ServingMetrics

_log = logging.getLogger("service.model_pool")
_SOON_S = 1.0


class ModelPool:
    """`backbones` are the names that will be added: until all are, no version is loaded.

    `look_again` shows the pool the registry's present state, for a name that it does not know; False if it cannot.
    """

    def __init__(
        self,
        store: ArtifactStore,
        selector: EngineSelector,
        limits: BatchLimits,
        metrics: ServingMetrics,
        *,
        memory_budget_bytes: int,
        backbones: Collection[str] = (),
        batch_log: BatchLog | None = None,
        runtime: Runtime = Runtime(),
    ) -> None:
        self._metrics, self._clock = metrics, runtime.clock
        self._executor = runtime.loader_thread()
        self.engines = EngineDirector(
            selector, store, limits, metrics, executor=self._executor, batch_log=batch_log, runtime=runtime
        )
        self._residency = Residency(memory_budget_bytes, self.engines, metrics)
        self._assembler = Assembler(store, self.engines, self._residency, metrics)
        self._loader = Loader(self._assembler.load, self._reconcile, clock=runtime.clock)
        self._aliases = Aliases()
        self.status = PoolStatus(self._aliases, self._residency, self._loader, self.engines)
        self._backbones: dict[str, ServedModel] = {}
        self._found: dict[tuple[str, ModelRef], ServedModel] = {}  # since the loop's last turn
        self._missing = set(backbones)
        self._deleted: set[Key] = set()  # from the registry, and not gone from here yet
        self._changed = asyncio.Event()
        self._retry: asyncio.TimerHandle | None = None
        self.look_again: Callable[[], Awaitable[bool]] | None = None
        self.is_started = False  # backbones and the registry's aliased versions are in place
        self.has_failed = False

    async def add_backbone(self, name: str, backbone: Backbone) -> None:
        """Loads and warms a backbone, which then answers embeddings. Raises `ModelingError`."""
        self._backbones[name] = await self._assembler.load_backbone(name, backbone)
        self._missing.discard(name)
        self._reconcile()

    async def stop(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        await self._loader.stop()
        await self._residency.stop()
        await self.engines.stop()
        await asyncio.get_running_loop().run_in_executor(self._executor, int)  # after whatever it is at
        self._executor.shutdown(wait=False)

    def backbones(self) -> dict[str, ServedModel]:
        """Those that are loaded; `missing` are the names of the others."""
        return dict(self._backbones)

    def missing(self) -> list[str]:
        return sorted(self._missing)

    # For requests

    async def find(self, tenant: str, ref: ModelRef) -> ServedModel:
        """Returns the model that `ref` means now. Take a lease of it before anything else is awaited.

        If `ref` is unknown here, looks once more: another process may just have registered it. Raises `ModelNotFound`,
        `ModelNotReady`.
        """
        model = self._found.get((tenant, ref))
        if model is None:
            is_unknown = not self._is_backbone(ref) and self._aliases.resolve(tenant, ref) is None
            is_current = not is_unknown or self.look_again is None or await self.look_again()
            model = self._served(tenant, ref)
            if model is None:
                raise self._absence(tenant, ref, is_current=is_current)
            self._found[tenant, ref] = model
        return model

    def _served(self, tenant: str, ref: ModelRef) -> ServedModel | None:
        if self._is_backbone(ref):
            return self._backbones.get(ref.name)
        key = self._aliases.resolve(tenant, ref)
        return None if key is None else self._residency.get(key)

    def _is_backbone(self, ref: ModelRef) -> bool:
        return ref.alias == CHAMPION and (ref.name in self._backbones or ref.name in self._missing)

    def _absence(self, tenant: str, ref: ModelRef, *, is_current: bool) -> ModelNotFound | ModelNotReady:
        """Why no model answers for `ref`. What may be loaded for it is. `is_current`: the registry could be asked."""
        key = self._aliases.resolve(tenant, ref)
        version = None if key is None else self._aliases.version(key)
        if version is None and self._aliases.is_read and not self._is_backbone(ref):
            if not is_current:
                what = f"{str(ref)!r} is not known here, and the registry cannot be read now"
                return ModelNotReady(what, retry_after_s=_SOON_S)
            return ModelNotFound(f"there is no model {str(ref)!r}")
        if key is None or version is None or self._missing:
            left = ", ".join(sorted(self._missing)) or "the registry"
            return ModelNotReady(f"the service is starting and has not loaded {left} yet", retry_after_s=_SOON_S)
        is_loading = self._loader.start(key, version) is not None
        failure, what = self._loader.failure(key), f"{ref.name}:{version.version}"
        if failure is None:
            return ModelNotReady(f"{what} is being loaded", retry_after_s=_SOON_S)
        pause_s = _SOON_S if is_loading else self._loader.pause_s(key)
        again = "; it is being loaded again" if is_loading else ""
        return ModelNotReady(f"{what} could not be loaded: {failure.reason}{again}", retry_after_s=pause_s)

    # Following the registry

    def follow(self, snapshot: RegistrySnapshot) -> None:
        """`snapshot` says from now on what every alias should serve; each does as soon as its version is loaded."""
        gone, deleted = self._aliases.follow(snapshot)
        for alias in gone:
            self._metrics.stop_alias(*alias)
        self._deleted |= deleted
        for alias, _ in self._aliases.unsettled():
            self._show(alias)
        self._tell_hidden()
        self._reconcile()

    async def settled(self) -> None:
        """Returns once all that is to be loaded now is loaded or has failed."""
        await self._loader.idle()

    async def apply(self, snapshot: RegistrySnapshot) -> None:
        self.follow(snapshot)
        await self.settled()

    async def ensure(self, tenant: str, name: str, version: ModelVersion, *, within_s: float = 60.0) -> bool:
        """Loads a version ahead of an alias that will point at it; whether it is loaded by then.

        Raises what keeps the version from loading if its own files are the cause. Other causes may pass, so it tries
        again as long as there is time.
        """
        key, ends = (tenant, name, version.version), self._clock() + within_s
        try:
            with self._residency.promise(key):
                return await self._loaded(key, version, ends)
        finally:
            if self._deleted:
                self._reconcile()  # the promise may have kept what was deleted meanwhile

    async def _loaded(self, key: Key, version: ModelVersion, ends: float) -> bool:
        while key not in self._residency and (left_s := ends - self._clock()) > 0:
            load = None if self._missing else self._loader.start(key, version)
            failure, pause_s = self._loader.failure(key), self._loader.pause_s(key)
            if load is not None:
                await asyncio.wait([load], timeout=left_s)
            elif failure is not None and failure.is_lasting:
                raise failure.error
            else:
                await asyncio.sleep(min(left_s, pause_s if pause_s > 0 else _SOON_S))
        return key in self._residency

    async def serves(self, alias: AliasKey, version: int, *, within_s: float) -> bool:
        """Whether the alias serves `version` here, once it does, has moved on, or `within_s` is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._aliases.serving(alias) != version == self._aliases.wanted(alias):
                    await self._changed.wait()
        return self._aliases.serving(alias) == version

    def _reconcile(self) -> None:
        """One turn of the loop. A turn too many does no harm."""
        for alias, key in [] if self._missing else self._aliases.unsettled():
            version = self._aliases.version(key)
            if key in self._residency:
                self._aliases.settle(alias)
                self._show(alias)
            elif version is not None:
                self._loader.start(key, version)
        self._residency.pinned, self._residency.previous = self._aliases.pinned(), self._aliases.previous()
        self._clear_deleted()
        self._residency.release()
        self._found.clear()
        self._plan_next()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _clear_deleted(self) -> None:
        """What is being loaded, or serves an alias whose wanted version is not loaded yet, goes a later time."""
        for key in [key for key in self._deleted if not self._loader.is_loading(key)]:
            if self._residency.remove(key):
                self._loader.forget(key)
                self._deleted.discard(key)

    def _plan_next(self) -> None:
        """The next turn is when the first back-off of a version that an alias wants is over, if nothing else comes."""
        if self._retry is not None:
            self._retry.cancel()
        pause_s = self._loader.next_retry_s([key for _, key in self._aliases.unsettled()])
        loop = asyncio.get_running_loop()
        self._retry = None if pause_s is None else loop.call_later(max(0.0, pause_s), self._reconcile)

    def _show(self, alias: AliasKey) -> None:
        self._metrics.set_alias(*alias, self._aliases.wanted(alias), self._aliases.serving(alias))

    def _tell_hidden(self) -> None:
        """A backbone answers for its name, whatever model the registry has under it."""
        backbones = self._backbones.keys() | self._missing
        hidden = {(tenant, name) for tenant, name in self._aliases.names() if name in backbones}
        for tenant, name in hidden - self.status.hidden:
            _log.warning(
                f"the backbone {name!r} hides the model {name!r} of tenant {tenant!r}: requests for this name get the "
                "backbone. Rename it in the setting backbones, or ask for the model by its version or another alias",
                extra={"action": "model_hidden"},
            )
        self.status.hidden = hidden
