"""Counts and times the inference requests, whatever ends them. The route says which model; until then it is none."""

from __future__ import annotations

import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import ServingMetrics

_INFERENCE_PATHS = re.compile(r"/predict|/v1/embeddings|/v1/models/[^/]+/predict")
_NO_MODEL = ("", "", "")


class RequestMetrics:
    def __init__(self, app: ASGIApp, metrics: ServingMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _INFERENCE_PATHS.fullmatch(scope["path"]):
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
            labels = scope.get("state", {}).get("metric_labels", _NO_MODEL)
            self._metrics.requests_total.labels(*labels, str(status)).inc()
            self._metrics.request_duration_seconds.labels(*labels).observe(time.monotonic() - started)
