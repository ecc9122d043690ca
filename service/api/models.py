"""`/models`: what can be served, where its aliases point, and how they move."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from model_registry.errors import ModelNotFound
from model_registry.manifest import FileEntry, ModelManifest
from model_registry.refs import CHAMPION, ModelRef
from model_registry.registry import AliasChange, ModelVersion, RegisteredModel
from model_registry.store import load_manifest
from modeling.backbone import why_retrain
from service.api.auth import Principal
from service.api.deps import Administering, JsonBody, Promoting, Reading, Services, ServicesDep
from service.api.problems import Problem
from service.api.schemas import AliasPending, AliasRequest, ImportRequest, RollbackRequest
from service.model_import import import_checkpoint

router = APIRouter(tags=["models"])
_MAX_FILE_BYTES = 16 << 20
_SERVED_S = 10.0  # after that a caller has waited long enough to be told how things are
_PENDING: dict[int | str, dict[str, Any]] = {
    202: {"model": AliasPending, "description": "The alias has moved, and this replica does not serve the version yet"}
}
_MEDIA_TYPES = {
    "svg": "image/svg+xml",
    "json": "application/json",
    "jsonl": "application/jsonl",
    "csv": "text/csv; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
}
# Pictures hold labels of the dataset: whatever those are, a browser runs nothing.
_INERT = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
}


@router.get("/models", summary="Backbones and models")
@router.get("/v1/models", summary="Backbones and models, as OpenAI's clients list them")
def list_models(services: ServicesDep, principal: Reading) -> dict[str, Any]:
    backbones = [_backbone(name, services, principal.tenant) for name in services.pool.backbones()]
    models = [_model(model, services) for model in services.registry.models(principal.tenant)]
    return {"object": "list", "data": [*backbones, *models]}


@router.get("/models/{name}", summary="One model")
@router.get("/v1/models/{name}", summary="One model")
def get_model(name: str, services: ServicesDep, principal: Reading) -> dict[str, Any]:
    if name in services.pool.backbones():
        return _backbone(name, services, principal.tenant)
    return _model(services.registry.model(principal.tenant, name), services)


@router.get("/models/{name}/versions", summary="Versions, newest first")
def list_versions(name: str, services: ServicesDep, principal: Reading) -> dict[str, Any]:
    model = services.registry.model(principal.tenant, name)
    versions = [_version(version, model, services) for version in model.versions]
    return {"object": "list", "data": versions, "alias_states": _alias_states(model, services)}


@router.get("/models/{name}/versions/{version}", summary="One version")
def get_version(name: str, version: int, services: ServicesDep, principal: Reading) -> dict[str, Any]:
    model = services.registry.model(principal.tenant, name)
    for found in model.versions:
        if found.version == version:
            return _version(found, model, services) | {"files": _files(found, services)}
    raise ModelNotFound(f"{name} has no version {version}")


@router.get("/models/{name}/versions/{version}/card", summary="The model card", response_class=Response)
def get_card(name: str, version: int, services: ServicesDep, principal: Reading) -> Response:
    content = _file(name, version, "MODEL_CARD.md", services, principal)
    return Response(content, media_type="text/markdown; charset=utf-8")


@router.get("/models/{name}/versions/{version}/files/{path:path}", summary="A small file", response_class=Response)
def get_file(name: str, version: int, path: str, services: ServicesDep, principal: Reading) -> Response:
    content = _file(name, version, path, services, principal)
    kind = _MEDIA_TYPES.get(path.rpartition(".")[2], "application/octet-stream")
    return Response(content, media_type=kind, headers=_INERT)


@router.put(
    "/models/{name}/aliases/{alias}",
    dependencies=[JsonBody],
    responses=_PENDING,
    summary="Move an alias unless it has moved meanwhile",
)
async def put_alias(
    name: str, alias: str, body: AliasRequest, services: ServicesDep, principal: Promoting
) -> JSONResponse:
    """Loads and checks the version, then moves the alias. 200: this replica serves it. 202: it will.

    A version whose own files are at fault is refused, and the alias stays.
    """
    tenant, ends = principal.tenant, time.monotonic() + _SERVED_S
    version = await asyncio.to_thread(
        services.registry.resolve, tenant, ModelRef(name, alias=None, version=body.version)
    )
    await services.pool.ensure(tenant, name, version, within_s=_SERVED_S)
    change = await asyncio.to_thread(
        lambda: services.registry.set_alias(
            tenant=tenant,
            name=name,
            alias=alias,
            version=body.version,
            expected_version=body.expected_version,
            actor=principal.name,
            reason=body.reason,
        )
    )
    return await _moved(change, tenant, services, ends=ends)


@router.get("/models/{name}/aliases/{alias}/history", summary="Every move of an alias, newest first")
def get_alias_history(
    name: str, alias: str, services: ServicesDep, principal: Reading, limit: int = Query(100, ge=1, le=1000)
) -> dict[str, Any]:
    changes = services.registry.history(tenant=principal.tenant, name=name, alias=alias, limit=limit)
    return {"object": "list", "data": [_change(change) for change in changes]}


@router.get("/models/{name}/history", summary="Every move of every alias, newest first")
def get_history(
    name: str, services: ServicesDep, principal: Reading, limit: int = Query(100, ge=1, le=1000)
) -> dict[str, Any]:
    changes = services.registry.history(tenant=principal.tenant, name=name, limit=limit)
    return {"object": "list", "data": [_change(change) for change in changes]}


@router.post("/models/{name}/rollback", responses=_PENDING, summary="Point an alias back to where it was")
async def rollback(
    name: str, services: ServicesDep, principal: Promoting, body: RollbackRequest | None = None
) -> JSONResponse:
    """200: this replica serves the earlier version. 202: it will."""
    wanted, ends = body or RollbackRequest(), time.monotonic() + _SERVED_S
    change = await asyncio.to_thread(
        lambda: services.registry.rollback(
            tenant=principal.tenant, name=name, alias=wanted.alias, actor=principal.name, reason=wanted.reason
        )
    )
    return await _moved(change, principal.tenant, services, ends=ends)


@router.post(
    "/models/import", status_code=201, dependencies=[JsonBody], summary="Register an existing Hugging Face classifier"
)
async def import_model(body: ImportRequest, services: ServicesDep, principal: Administering) -> Response:
    if body.name in services.settings.backbones:
        raise Problem(422, "invalid_request", f"name: {body.name!r} is the name of a backbone")
    version = await asyncio.to_thread(
        lambda: import_checkpoint(
            body.name,
            body.source,
            tenant=principal.tenant,
            actor=principal.name,
            registry=services.registry,
            store=services.store,
            import_root=services.settings.import_root,
            offline=services.settings.is_offline,
        )
    )
    await services.watcher.refresh()
    await services.pool.serves((principal.tenant, body.name, CHAMPION), version, within_s=_SERVED_S)
    model = await asyncio.to_thread(services.registry.model, principal.tenant, body.name)
    found = next(item for item in model.versions if item.version == version)
    return JSONResponse(_version(found, model, services), 201, {"Location": f"/models/{body.name}/versions/{version}"})


async def _moved(change: AliasChange, tenant: str, services: Services, *, ends: float) -> JSONResponse:
    """What has become of a move of an alias, as soon as this replica serves the version or the time is over."""
    await services.watcher.refresh()
    alias = (tenant, change.name, change.alias)
    if await services.pool.serves(alias, change.to_version, within_s=ends - time.monotonic()):
        return JSONResponse(_change(change))
    state = services.pool.status.alias(alias, change.to_version)
    pending = AliasPending(model=change.name, alias=change.alias, change=_change(change), **asdict(state))
    return JSONResponse(pending.model_dump(), 202)


def _files(version: ModelVersion, services: Services) -> list[dict[str, Any]]:
    """What the manifest lists; nothing before the version is ready."""
    if version.status != "ready":
        return []
    manifest = load_manifest(services.store, tenant=version.tenant, name=version.name, version=version.version)
    return [entry.model_dump() for entry in manifest.files]


def _file(name: str, version: int, path: str, services: Services, principal: Principal) -> bytes:
    """Only what the manifest lists can be read, and only files of a size to show; rows of data need their own scope."""
    if path == "golden.json" and not principal.may("datasets"):
        raise Problem(403, "forbidden", "golden.json holds rows of the dataset, so it needs the scope 'datasets'")
    services.registry.resolve(principal.tenant, ModelRef(name, alias=None, version=version))
    manifest: ModelManifest = load_manifest(services.store, tenant=principal.tenant, name=name, version=version)
    listed: dict[str, FileEntry] = {entry.path: entry for entry in manifest.files}
    if path not in listed:
        raise Problem(404, "file_not_found", f"{name}:{version} has no such file")
    if listed[path].size > _MAX_FILE_BYTES:
        raise Problem(413, "payload_too_large", f"{path} has {listed[path].size} bytes; fetch it from the store")
    return services.store.get_bytes(f"{manifest.prefix}/{path}", max_bytes=_MAX_FILE_BYTES)


def _backbone(name: str, services: Services, tenant: str) -> dict[str, Any]:
    served, info = services.pool.backbones()[name], services.backbones[name].info
    return {
        "id": name,
        "object": "model",
        "created": int(served.loaded_at),
        "owned_by": "backbone",
        "parent": None,
        "root": info.source,
        "digest": info.digest,
        "task": served.task,
        "version": None,
        "aliases": {},
        "state": served.state,
        "reason": "it hides the model of this name" if (tenant, name) in services.pool.status.hidden else None,
        "engine": served.lane.engine_name,
        "engine_reason": services.pool.status.reason_of(served.lane),
        "prompts": sorted(served.prompts),
        "labels": [],
        "bytes": served.own_bytes,
        "engine_reports": [
            {
                "device": report.device,
                "chosen": report.chosen,
                "created_at": report.created_at,
                "engines": report.engines,
            }
            for report in services.pool.engines.selector.measurements([info.digest])
        ],
    }


def _model(model: RegisteredModel, services: Services) -> dict[str, Any]:
    champion = model.aliases.get(CHAMPION)
    ready = [version for version in model.versions if version.status == "ready"]
    shown = next((version for version in ready if version.version == champion), ready[0] if ready else None)
    states = _alias_states(model, services)
    base: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": model.tenant,
        "task": model.task,
        "aliases": model.aliases,
        "alias_states": states,
        "wanted": champion,
        "serving": states[CHAMPION]["serving"] if champion is not None else None,
        "versions": [version.version for version in ready],
    }
    if shown is None:
        return base | {"version": None, "state": "unloaded", "reason": None, "engine": None, "labels": [], "bytes": 0}
    detail = _version(shown, model, services)
    keys = ("version", "parent", "root", "state", "reason", "engine", "labels", "bytes", "kind", "method", "metrics")
    row = base | {key: detail[key] for key in keys}
    if champion is not None:
        row["reason"] = states[CHAMPION]["reason"]
    if (model.tenant, model.name) in services.pool.status.hidden:
        row["reason"] = f"the backbone of this name hides it; ask for {shown.name}:{shown.version} or an alias"
    return row


def _alias_states(model: RegisteredModel, services: Services) -> dict[str, dict[str, Any]]:
    """By alias: the version that it should serve, the one that it serves here, and why they differ."""
    return {
        alias: asdict(services.pool.status.alias((model.tenant, model.name, alias), version))
        for alias, version in model.aliases.items()
    }


def _version(version: ModelVersion, model: RegisteredModel, services: Services) -> dict[str, Any]:
    key, status = (version.tenant, version.name, version.version), services.pool.status
    state, reason = status.version(key)
    return {
        "id": f"{version.name}:{version.version}",
        "object": "model.version",
        "name": version.name,
        "version": version.version,
        "status": version.status,
        "aliases": sorted(alias for alias, number in model.aliases.items() if number == version.version),
        "parent": version.backbone,
        "root": version.backbone_digest,
        "retrain": _why_retrain(version, services),
        "kind": version.kind,
        "task": version.task,
        "method": version.method,
        "job_id": version.job_id,
        "state": state,
        "reason": reason,
        "engine": status.engine_of(key),
        "engine_reason": status.engine_reason(key),
        "labels": version.labels or [],
        "metrics": version.metrics or {},
        "bytes": version.bytes or 0,
        "created": int(version.created_at),
    }


def _why_retrain(version: ModelVersion, services: Services) -> str | None:
    """The reason, if what its backbone's name means now is another backbone; no longer configured, it is not said."""
    now = None if version.backbone is None else services.backbones.get(version.backbone)
    if now is None or version.backbone_digest is None:
        return None
    return why_retrain(services.store, version.backbone_digest, now)


def _change(change: AliasChange) -> dict[str, Any]:
    return {
        "object": "alias.change",
        "model": change.name,
        "alias": change.alias,
        "from_version": change.from_version,
        "version": change.to_version,
        "action": change.action,
        "actor": change.actor,
        "reason": change.reason,
        "epoch": change.epoch,
        "created_at": change.created_at,
    }
