"""The application: routers, middleware, handlers. No logic."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from finetune.datasets.errors import ColumnMissing, DatasetNotFound, DatasetUnreadable
from finetune.jobs.errors import IdempotencyInProgress, IdempotencyMismatch, JobNotCancellable, JobNotFound
from finetune.plan import PlanError
from modeling import errors as modeling
from service.api import datasets, finetune, health, models, predict
from service.api.auth import KeyAuthentication
from service.api.compat import openai
from service.api.deps import Services
from service.api.direct import DirectRoutes
from service.api.guard import DrainState, GuardLimits, RequestGuard
from service.api.measure import EMBEDDINGS, PREDICT, PREDICT_WITH, RequestMetrics
from service.api.problems import STATUS_BY_ERROR, install
from service.inference import errors as inference
from service.metrics import ServingMetrics
from service.model_import import ImportRefused
from service.settings import ServingSettings

STATUS_BY_ERROR |= {
    inference.EmptyInput: (400, "empty_input"),
    inference.BatchTooLarge: (413, "payload_too_large"),
    inference.QueueFull: (429, "queue_full"),
    inference.ModelNotReady: (503, "model_not_ready"),
    inference.MemoryBudgetExceeded: (409, "memory_budget_exceeded"),
    inference.DeadlineExceeded: (504, "deadline_exceeded"),
    inference.NotPredictable: (422, "invalid_request"),
    inference.InferenceFailed: (500, "inference_failed"),
    modeling.InputTooLong: (422, "input_too_long"),
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
    IdempotencyMismatch: (422, "idempotency_mismatch"),
    IdempotencyInProgress: (409, "idempotency_in_progress"),
    PlanError: (422, "invalid_request"),
}

Build = Callable[[], AbstractAsyncContextManager[Services]]


def create_app(settings: ServingSettings, build: Build, drain: DrainState, metrics: ServingMetrics) -> ASGIApp:
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
    )
    for module in (predict, openai, datasets, finetune, models, health):
        app.include_router(module.router)
    install(app)
    direct = DirectRoutes(app, {PREDICT: predict.DIRECT, PREDICT_WITH: predict.DIRECT, EMBEDDINGS: openai.DIRECT})
    authenticated = KeyAuthentication(direct, settings.api_keys)
    measured = RequestMetrics(authenticated, metrics)
    return RequestGuard(measured, GuardLimits(), drain, body_limits(settings))


def body_limits(settings: ServingSettings) -> Callable[[str, str], int]:
    """The largest body by route: uploads are large, everything else is not."""

    def limit(path: str, method: str) -> int:
        is_upload = method == "POST" and path in {"/datasets", "/finetune"}
        return settings.max_upload_bytes if is_upload else settings.max_body_bytes

    return limit
