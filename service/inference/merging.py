"""Merges the adapter that gets most of a backbone's rows, while everything is served, and takes it back.

`merge_choice` decides, `modeling.merge` writes the graph in a process of its own; here is what counts, waits and
installs. Which adapter is merged stands in the engine alone: with the engine, its adapter or the memory it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from model_registry.store import ArtifactStore
from modeling.engines.graphs import GraphEngine, Session
from modeling.errors import EngineFailed, ModelingError
from modeling.merge import MergeRequest, adapter_digest, can_merge, partial_file
from service.inference.errors import MemoryBudgetExceeded
from service.inference.lanes import BackboneLane
from service.inference.merge_choice import MergePolicy, Rows, choose_merged
from service.inference.model_pool import ModelPool, reproduce_golden
from service.inference.served import ServedModel
from service.metrics import ServingMetrics

_log = logging.getLogger("service.merging")
_RETRY_FAILED_S = 600.0
_WRITE_S = 600.0


class AdapterMerger:
    """One per process. Whatever fails is logged, leaves serving as it was, and is not tried again for a while."""

    def __init__(self, pool: ModelPool, store: ArtifactStore, metrics: ServingMetrics, policy: MergePolicy) -> None:
        self._pool, self._store, self._metrics, self._policy = pool, store, metrics, policy
        self._windows: dict[BackboneLane, deque[Rows]] = {}
        self._failed: dict[tuple[str, str], float] = {}  # by adapter and engine

    async def follow(self) -> None:
        """Looks at every lane once a window, until cancelled."""
        while True:
            await asyncio.sleep(self._policy.window_s)
            await self.look()

    async def look(self) -> None:
        """Ends a window on every lane and acts on it."""
        lanes = [lane for lane in self._pool.lanes() if isinstance(lane, BackboneLane)]
        self._windows = {lane: self._windows.get(lane) or deque(maxlen=self._policy.windows) for lane in lanes}
        for lane, windows in self._windows.items():
            windows.append(lane.take_rows())
            try:
                await self._follow(lane, list(windows))
                self._show(lane)
            except Exception:
                _log.exception("merging failed", extra={"action": "merge_failed"})

    async def _follow(self, lane: BackboneLane, windows: Sequence[Rows]) -> None:
        engine = lane.engine
        if not can_merge(engine):
            return
        merged = engine.merged_key
        wanted = choose_merged(windows, merged, self._policy)
        if wanted == merged:
            return
        if merged is not None:
            engine.unmerge()
            _log.info(f"{merged} runs from its slot again", extra={"action": "adapter_unmerged"})
        model = next((user for user in self._pool.users_of(lane) if user.adapter_key == wanted), None)
        if wanted is None or model is None or self._failed_lately(wanted, lane):
            return
        try:
            await self._merge(model, lane, engine)
        except Exception as error:
            self._failed[wanted, lane.engine_name] = time.monotonic()
            _log.warning(f"{wanted} is not merged: {error}", extra={"action": "merge_failed"})
        else:
            _log.info(f"{wanted} is merged", extra={"action": "adapter_merged", "backbone": lane.batcher.name[0]})

    def _failed_lately(self, key: str, lane: BackboneLane) -> bool:
        failed_at = self._failed.get((key, lane.engine_name))
        return failed_at is not None and time.monotonic() - failed_at < _RETRY_FAILED_S

    async def _merge(self, model: ServedModel, lane: BackboneLane, engine: GraphEngine) -> None:
        """Writes the graph if it is not there, opens it, and lets it serve once it reproduces the golden rows."""
        self._check_room(engine.merge_bytes)
        assert model.parts is not None
        manifest = model.parts.manifest
        graph = engine.files.merged(adapter_digest(manifest.files))
        if not graph.is_file():
            await write_graph(
                MergeRequest(
                    bare=str(engine.files.variant("").bare),
                    target=str(graph),
                    variant=engine.files.suffix,
                    adapter=str(self._store.local_path(manifest.prefix) / "adapter"),
                ),
                timeout_s=_WRITE_S,
            )
        try:
            session = await asyncio.to_thread(engine.open_merged, graph)
            await self._install(model, lane, engine, session)
        except ModelingError:
            graph.unlink(missing_ok=True)  # another try begins with another file
            raise

    async def _install(self, model: ServedModel, lane: BackboneLane, engine: GraphEngine, session: Session) -> None:
        def install() -> None:  # between two batches, so that no request meets it unchecked
            assert model.adapter_key is not None
            engine.merge(model.adapter_key, session)
            try:
                reproduce_golden(model, engine)
            except BaseException:
                engine.unmerge()
                raise

        async with self._pool.steady:
            if lane.engine is not engine or model not in self._pool.users_of(lane):
                raise EngineFailed("the engine or the version has changed meanwhile")
            self._check_room(session.memory_bytes())
            try:
                await lane.batcher.call(install)
            except BaseException:  # a run that hangs is given up while it is in `install`
                engine.unmerge()
                raise

    def _check_room(self, needed: int) -> None:
        free = self._pool.free_bytes()
        if needed > free:
            raise MemoryBudgetExceeded(f"it takes {needed} bytes, {free} of the memory budget are free")

    def _show(self, lane: BackboneLane) -> None:
        engine = lane.engine
        merged, merged_bytes = engine.merged_key if can_merge(engine) else None, engine.memory().merged
        for model in self._pool.users_of(lane):
            if model.adapter_key is not None:
                is_merged = model.adapter_key == merged
                held = model.own_bytes + (merged_bytes if is_merged else 0)
                self._metrics.adapter_merged.labels(*model.metric_labels).set(is_merged)
                self._metrics.model_memory_bytes.labels(*model.metric_labels).set(held)


async def write_graph(
    request: MergeRequest, *, timeout_s: float, command: Sequence[str] = (sys.executable, "-m", "modeling.merge")
) -> None:
    """In a process of its own. Raises `EngineFailed`."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None and process.stderr is not None
    try:
        process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")  # left open: it ends with its stdin
        said = await asyncio.wait_for(process.stderr.read(), timeout_s)
        if await process.wait():
            last = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise EngineFailed(f"the merged graph was not written: {last[:300] or 'the process died'}")
    except TimeoutError as error:
        raise EngineFailed(f"the merged graph was not written in {timeout_s:.0f} s") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]  # the pipes, without waiting for what is in them
        await asyncio.sleep(0)  # they end in the loop's next turn
        partial_file(Path(request.target), process.pid).unlink(missing_ok=True)
