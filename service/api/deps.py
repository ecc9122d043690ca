"""What routes fetch from the application's state. Built in `wiring`, passed by type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Query, Request

from finetune.data.store import DatasetStore
from finetune.jobs.records import Outlook
from finetune.jobs.store import JobStore
from model_registry.registry import Registry
from model_registry.removal import Removal
from model_registry.store import ArtifactStore
from modeling.backbone import Backbone
from service.api import schemas
from service.api.auth import Principal, require
from service.api.event_streams import EventStreams
from service.api.guard import DrainState
from service.dataset_intake import DatasetIntake
from service.folder_watch import FolderWatch
from service.inference.model_pool import ModelPool
from service.inference.predictor import Predictor
from service.inference.registry_watcher import RegistryWatcher
from service.metrics import ServingMetrics
from service.model_import import ModelImports
from service.settings import ServingSettings


@dataclass(slots=True)
class Workers:
    """What is known of the fine-tune workers, as last read; None before the first look."""

    outlook: Outlook | None = None

    def document(self) -> schemas.WorkersDocument:
        """How many are there, and when one was last heard from, in seconds of Unix time."""
        found = self.outlook
        return {
            "live": None if found is None else found.live_workers,
            "last_seen": None if found is None else found.worker_last_seen,
        }


@dataclass(frozen=True, slots=True)
class Services:
    """Everything the routes use."""

    settings: ServingSettings
    pool: ModelPool
    predictor: Predictor
    watcher: RegistryWatcher
    registry: Registry
    removal: Removal
    jobs: JobStore
    datasets: DatasetStore
    intake: DatasetIntake
    imports: ModelImports
    store: ArtifactStore
    metrics: ServingMetrics
    drain: DrainState
    events: EventStreams
    backbones: Mapping[str, Backbone]
    folder: FolderWatch
    workers: Workers = field(default_factory=Workers)


def services(request: Request) -> Services:
    found = request.app.state.services
    assert isinstance(found, Services)
    return found


async def _data_there(request: Request) -> None:
    """What reads or writes files of the data directory is refused while it is away. Raises `StoreUnavailable`."""
    await services(request).folder.require()


_data_there.refuses = ("storage_unavailable",)  # type: ignore[attr-defined]


ServicesDep = Annotated[Services, Depends(services)]
NeedsData = Depends(_data_there)
Reason = Annotated[str, Query(max_length=1024, description="for the history")]
Reading = Annotated[Principal, Depends(require(None))]
Uploading = Annotated[Principal, Depends(require("datasets"))]
Training = Annotated[Principal, Depends(require("finetune"))]
Promoting = Annotated[Principal, Depends(require("models:promote"))]
Deleting = Annotated[Principal, Depends(require("models:delete"))]
Administering = Annotated[Principal, Depends(require("admin"))]
