"""The application: routers, middleware, handlers. No logic."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from service.api import datasets, finetune, health, inference, models
from service.api.auth import KeyAuthentication
from service.api.compat import openai
from service.api.deps import Services
from service.api.guard import DrainState, GuardLimits, RequestGuard, body_limits
from service.api.inference import InferenceRoutes
from service.api.openapi import with_inference
from service.api.problems import install
from service.metrics import ServingMetrics
from service.settings import ServingSettings

Build = Callable[[], AbstractAsyncContextManager[Services]]


def create_app(settings: ServingSettings, build: Build, drain: DrainState, metrics: ServingMetrics) -> RequestGuard:
    """The guarded application. `build` opens what the routes use and closes it at the end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with build() as services:
            app.state.services = routes.services = services
            yield

    app = FastAPI(
        title="polyhead",
        version="1",
        description="One pretrained backbone, many heads: predict, fine-tune, promote, roll back.",
        lifespan=lifespan,
        redirect_slashes=False,  # the address of such an answer comes from the client's Host
    )
    for module in (datasets, finetune, models, health):
        app.include_router(module.router)
    install(app)
    inference_routes = {**inference.ROUTES, **openai.ROUTES}
    framework_document = app.openapi
    app.openapi = functools.cache(lambda: with_inference(framework_document(), inference_routes))  # type: ignore[method-assign]
    keys = KeyAuthentication(app, settings.api_keys)
    routes = InferenceRoutes(keys, inference_routes, keys, metrics)
    return RequestGuard(
        routes,
        GuardLimits(),
        drain,
        body_limits(settings.max_body_bytes, settings.max_upload_bytes),
    )
