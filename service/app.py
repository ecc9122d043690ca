"""The application: routers, middleware, handlers. No logic."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from service.api import datasets, docs_page, finetune, health, inference, models
from service.api.auth import KeyAuthentication
from service.api.compat import openai
from service.api.deps import Services
from service.api.guard import DrainState, GuardLimits, RequestGuard, body_limits
from service.api.inference import InferenceRoutes
from service.api.openapi import with_inference
from service.api.problems import install
from service.api.routing import CountedRoutes, allowed_methods
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
        docs_url=None,
        redoc_url=None,
    )
    modules = (datasets, finetune, models, health, docs_page)
    for module in modules:
        app.include_router(module.router)
        for route in module.router.routes:
            metrics.start_route(getattr(route, "methods", ()), getattr(route, "path", ""))
    app.state.allowed_methods = allowed_methods(route for module in modules for route in module.router.routes)
    install(app)
    inference_routes = {**inference.ROUTES, **openai.ROUTES}
    framework_document = app.openapi
    app.openapi = functools.cache(lambda: with_inference(framework_document(), inference_routes))  # type: ignore[method-assign]
    keys = KeyAuthentication(app, settings.api_keys)
    routes = InferenceRoutes(CountedRoutes(keys, metrics), inference_routes, keys, metrics)
    return RequestGuard(
        routes,
        GuardLimits(),
        drain,
        body_limits(settings.max_body_bytes, settings.max_upload_bytes),
        on_refusal=lambda method, status: metrics.count_management(method, "", status=status),
    )
