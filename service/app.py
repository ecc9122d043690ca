"""The application: routers, middleware, handlers. No logic."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from service.api import answers, datasets, finetune, health, models, predict
from service.api.auth import KeyAuthentication
from service.api.compat import openai
from service.api.deps import Services
from service.api.direct import DirectRoutes
from service.api.guard import DrainState, GuardLimits, RequestGuard, body_limits
from service.api.measure import RequestMetrics
from service.api.problems import install
from service.metrics import ServingMetrics
from service.settings import ServingSettings

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
