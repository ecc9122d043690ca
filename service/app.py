"""The application: routers, middleware, handlers. No logic."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from finetune.data.errors import ColumnMissing, DatasetNotFound, DatasetUnreadable
from finetune.jobs.errors import (
    IdempotencyMismatch,
    JobNotCancellable,
    JobNotFound,
    JobNotPausable,
    JobNotResumable,
)
from finetune.jobs.hyperparameters import PlanError
from modeling import errors as modeling
from service.api import answers, datasets, finetune, health, models, predict
from service.api.auth import KeyAuthentication
from service.api.compat import openai
from service.api.deps import Services
from service.api.direct import DirectRoutes
from service.api.guard import DrainState, GuardLimits, RequestGuard, body_limits
from service.api.measure import RequestMetrics
from service.api.problems import STATUS_BY_ERROR, install
from service.metrics import ServingMetrics
from service.model_import import ImportRefused
from service.settings import ServingSettings

STATUS_BY_ERROR |= {
    modeling.BackboneUnavailable: (422, "checkpoint_invalid"),
    modeling.ConfigRefused: (422, "checkpoint_invalid"),
    modeling.UnsupportedArchitecture: (422, "checkpoint_invalid"),
    modeling.WeightsInvalid: (409, "artifact_invalid"),
    modeling.AdapterMismatch: (409, "artifact_invalid"),
    modeling.GoldenRowsDiffer: (409, "golden_rows_differ"),
    ImportRefused: (403, "forbidden"),
    DatasetNotFound: (404, "dataset_not_found"),
    DatasetUnreadable: (422, "dataset_invalid"),
    ColumnMissing: (422, "dataset_invalid"),
    JobNotFound: (404, "job_not_found"),
    JobNotCancellable: (409, "job_not_cancellable"),
    JobNotPausable: (409, "job_not_pausable"),
    JobNotResumable: (409, "job_not_resumable"),
    IdempotencyMismatch: (422, "idempotency_mismatch"),
    PlanError: (422, "invalid_request"),
}

Build = Callable[[], AbstractAsyncContextManager[Services]]


def create_app(settings: ServingSettings, build: Build, drain: DrainState, metrics: ServingMetrics) -> RequestGuard:
    """The guarded application. `build` opens what the routes use and closes it at the end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with build() as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="polyhead",
        version="1",
        description="One pretrained backbone, many heads: predict, fine-tune, promote, roll back.",
        lifespan=lifespan,
        redirect_slashes=False,  # the address of such an answer comes from the client's Host
    )
    for module in (predict, openai, datasets, finetune, models, health):
        app.include_router(module.router)
    install(app)
    direct = DirectRoutes(app, answers.ROUTES, lambda: app.state.services)
    authenticated = KeyAuthentication(direct, settings.api_keys)
    measured = RequestMetrics(authenticated, metrics)
    return RequestGuard(
        measured,
        GuardLimits(),
        drain,
        body_limits(settings.max_body_bytes, settings.max_upload_bytes),
    )
