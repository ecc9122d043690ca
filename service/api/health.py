"""Probes, limits and metrics. No key, no database, no disk."""

from __future__ import annotations

import asyncio
import importlib.metadata
from typing import Any

from fastapi import APIRouter, Response

from service.api import schemas
from service.api.deps import Services, ServicesDep
from service.api.problems import json_response
from service.api.routing import ManagementRoute

router = APIRouter(tags=["operations"], route_class=ManagementRoute)
_NOT_ALIVE: dict[int | str, dict[str, Any]] = {
    503: {"model": schemas.Liveness, "description": "A loop or an engine is dead or stuck"}
}
_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": schemas.Readiness, "description": "Loading, draining, or an engine is out of order"}
}
_STUCK_S = 120.0


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="Is the process alive", response_model=schemas.Liveness, responses=_NOT_ALIVE)
async def livez(services: ServicesDep) -> Response:
    workers = [lane.worker for lane in services.pool.engines.lanes()]
    dead = [worker.name[0] for worker in workers if not worker.is_alive]
    stuck = [
        worker.name[0]
        for worker in workers
        # Until then another engine may take over, or the check may pass; after that only a new process helps.
        if max(worker.busy_for_s(), worker.supervisor.unfit_for_s()) > _STUCK_S
    ]
    status = 503 if dead or stuck or services.pool.has_failed else 200
    return json_response({"status": "ok" if status == 200 else "failing", "dead": dead, "stuck": stuck}, status)


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="May traffic come here", response_model=schemas.Readiness, responses=_NOT_READY)
@router.head("/health", include_in_schema=False)
@router.get("/health", summary="The same as /readyz", response_model=schemas.Readiness, responses=_NOT_READY)
async def readyz(services: ServicesDep) -> Response:
    reason = _unready(services)
    headers = {} if reason is None else {"Retry-After": "1"}
    # Predictions do without a worker, so none is no reason to send traffic elsewhere.
    answer: schemas.Readiness = {
        "status": "ready" if reason is None else "unready",
        "reason": reason,
        "degraded": _degraded(services),
        "workers": services.workers.document(),
    }
    return json_response(answer, 200 if reason is None else 503, headers)


def _unready(services: Services) -> str | None:
    if services.drain.draining:
        return "draining"
    if services.pool.has_failed:
        return "a backbone could not be loaded; see the log"
    if services.folder.reason is not None:
        return services.folder.reason
    if not services.pool.is_started:
        missing = set(services.settings.backbones) - set(services.pool.backbones())
        return f"loading {', '.join(sorted(missing)) or 'models'}"
    # A version with weights of its own that is unfit answers 503 for itself; it takes no others along.
    unfit = [name for name, model in services.pool.backbones().items() if not model.lane.worker.is_fit]
    return f"the engine of {', '.join(sorted(unfit))} is out of order" if unfit else None


def _degraded(services: Services) -> list[str]:
    """What does not work although traffic may come: predictions need no database."""
    is_away = services.watcher.is_database_away
    return ["the metadata database does not answer; predictions go on, what needs it is refused"] if is_away else []


@router.head("/info", include_in_schema=False)
@router.get("/info", summary="Every effective limit")
async def info(services: ServicesDep) -> schemas.Info:
    backbones: dict[str, schemas.BackboneInfo] = {
        name: {
            "digest": model.lane.backbone.info.digest,  # type: ignore[attr-defined]
            "source": services.settings.backbones[name],
            "max_length": services.backbones[name].info.max_length,
            "embedding_size": services.backbones[name].info.hidden_size,
            "engine": model.lane.engine_name,
        }
        for name, model in services.pool.backbones().items()
    }
    settings = services.settings.public()
    hidden = {"data_dir", "import_root", "backbones", "host", "port"}  # paths of this host stay on it
    return {
        "name": "polyhead",
        "version": importlib.metadata.version("polyhead"),
        "backbones": backbones,
        "workers": services.workers.document(),
        "limits": {key: value for key, value in settings.items() if key not in hidden},
    }


@router.head("/metrics", include_in_schema=False)
@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(services: ServicesDep) -> Response:
    content, content_type = await asyncio.to_thread(services.metrics.render)
    return Response(content, headers={"content-type": content_type})
