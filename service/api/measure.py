"""Counts and times the inference requests, whatever ends them. The route says which model; until then it is none."""

from __future__ import annotations

import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import ServingMetrics

PREDICT: Final = "/predict"
PREDICT_WITH: Final = "/v1/models/{model}/predict"
EMBEDDINGS: Final = "/v1/embeddings"

_PREFIX, _SUFFIX = PREDICT_WITH.split("{model}")
NO_MODEL: Final = ("", "", "")


def inference_route(path: str) -> tuple[str, str | None] | None:
    """The inference route that takes `path`, and the model that the path names; None where it is no inference."""
    if path in (PREDICT, EMBEDDINGS):
        return path, None
    if path.startswith(_PREFIX) and path.endswith(_SUFFIX):
        model = path[len(_PREFIX) : -len(_SUFFIX)]
        if model and "/" not in model:
            return PREDICT_WITH, model
    return None


class RequestMetrics:
    """ASGI middleware: `metrics.count_request` once for each inference request."""

    def __init__(self, app: ASGIApp, metrics: ServingMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or inference_route(scope["path"]) is None:
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            labels = scope.get("state", {}).get("metric_labels", NO_MODEL)
            self._metrics.count_request(labels, status=status, seconds=time.monotonic() - started)
