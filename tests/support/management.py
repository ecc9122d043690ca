"""The management routes over a real database, asked without a socket; nothing is served and nothing trained."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.data.store import DatasetStore
from finetune.jobs.store import JobStore
from model_registry.db import Database
from model_registry.registry import Registry
from model_registry.removal import Removal
from model_registry.store import FileStore
from service.api.deps import Services
from service.api.event_streams import EventStreams
from service.dataset_intake import DatasetIntake
from service.settings import ServingSettings
from tests.support.asgi import STEADY_FOLDER, AppUnderTest


class ManagementApp(AppUnderTest):
    """The whole application on `database`; its pool serves nothing."""

    def __init__(self, database: Database, folder: Path, settings: ServingSettings | None = None) -> None:
        self.jobs, self.registry = JobStore(database), Registry(database)
        self.datasets, self._folder, self._database = DatasetStore(database), folder, database
        super().__init__(settings)

    @asynccontextmanager
    async def _build(self) -> AsyncIterator[Services]:
        unused: Any = SimpleNamespace()
        watcher: Any = SimpleNamespace(is_database_away=False)
        store = FileStore(self._folder / "store")
        (self._folder / "datasets").mkdir(parents=True, exist_ok=True)
        status = SimpleNamespace(
            hidden=set(),
            alias=lambda alias, wanted: SimpleNamespace(wanted=wanted, serving=None, reason=None, retry_at=None),
            version=lambda key: ("unloaded", None),
            engine_of=lambda key: None,
        )
        selector = SimpleNamespace(measurements=lambda digests: [])
        pool: Any = SimpleNamespace(
            backbones=lambda: {},
            missing=lambda: ["minilm"],
            has_failed=False,
            is_started=False,
            status=status,
            engines=SimpleNamespace(lanes=lambda: [], selector=selector),
        )
        intake = DatasetIntake(self.datasets, self._folder / "datasets", timeout_s=60, memory_bytes=4 << 30)
        try:
            yield Services(
                settings=self.settings,
                pool=pool,
                predictor=unused,
                watcher=watcher,
                registry=self.registry,
                removal=Removal(self._database, self.registry, store),
                jobs=self.jobs,
                datasets=self.datasets,
                intake=intake,
                imports=unused,
                store=store,
                metrics=self.metrics,
                drain=self.drain,
                events=EventStreams(self.jobs, self.drain, self.metrics, per_key=2),
                backbones={},
                folder=STEADY_FOLDER,
            )
        finally:
            await intake.stop()
