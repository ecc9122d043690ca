"""`/models`: what can be served, where its aliases point, and how they move."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from model_registry.errors import ModelNotFound
from model_registry.manifest import FileEntry, ModelManifest
from model_registry.refs import ModelRef
from model_registry.registry import AliasChange, ModelVersion, RegisteredModel
from model_registry.store import load_manifest
from service.api.auth import Principal
from service.api.deps import Administering, JsonBody, Promoting, Reading, Services, ServicesDep
from service.api.problems import Problem
from service.api.schemas import AliasRequest, ImportRequest, RollbackRequest
from service.model_import import import_checkpoint

router = APIRouter(tags=["models"])
_MAX_FILE_BYTES = 16 << 20
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
    backbones = [_backbone(name, services) for name in services.pool.backbones()]
    models = [_model(model, services) for model in services.registry.models(principal.tenant)]
    return {"object": "list", "data": [*backbones, *models]}


@router.get("/models/{name}", summary="One model")
@router.get("/v1/models/{name}", summary="One model")
def get_model(name: str, services: ServicesDep, principal: Reading) -> dict[str, Any]:
    if name in services.pool.backbones():
        return _backbone(name, services)
    return _model(services.registry.model(principal.tenant, name), services)


@router.get("/models/{name}/versions", summary="Versions, newest first")
def list_versions(name: str, services: ServicesDep, principal: Reading) -> dict[str, Any]:
    model = services.registry.model(principal.tenant, name)
    return {"object": "list", "data": [_version(version, model, services) for version in model.versions]}


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
    "/models/{name}/aliases/{alias}", dependencies=[JsonBody], summary="Move an alias if nobody moved it meanwhile"
)
async def put_alias(
    name: str, alias: str, body: AliasRequest, services: ServicesDep, principal: Promoting
) -> dict[str, Any]:
    """The version is loaded and checked before the alias moves; when this answers, it serves."""
    tenant = principal.tenant
    version = await asyncio.to_thread(
        services.registry.resolve, tenant, ModelRef(name, alias=None, version=body.version)
    )
    await services.pool.ensure(tenant, name, version)
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
    await services.watcher.refresh()
    return _change(change)


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


@router.post("/models/{name}/rollback", summary="Point an alias back to where it was")
async def rollback(
    name: str, services: ServicesDep, principal: Promoting, body: RollbackRequest | None = None
) -> dict[str, Any]:
    wanted = body or RollbackRequest()
    change = await asyncio.to_thread(
        lambda: services.registry.rollback(
            tenant=principal.tenant, name=name, alias=wanted.alias, actor=principal.name, reason=wanted.reason
        )
    )
    await services.watcher.refresh()
    return _change(change)


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
            import_root=services.import_root,
            offline=services.settings.is_offline,
        )
    )
    await services.watcher.refresh()
    model = await asyncio.to_thread(services.registry.model, principal.tenant, body.name)
    found = next(item for item in model.versions if item.version == version)
    return JSONResponse(_version(found, model, services), 201, {"Location": f"/models/{body.name}/versions/{version}"})


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


def _backbone(name: str, services: Services) -> dict[str, Any]:
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
        "engine": served.lane.engine_name,
        "labels": [],
        "bytes": served.own_bytes,
        "engine_reports": [
            {
                "device": report.device,
                "chosen": report.chosen,
                "created_at": report.created_at,
                "engines": report.engines,
            }
            for report in services.pool.measurements(info.digest)
        ],
    }


def _model(model: RegisteredModel, services: Services) -> dict[str, Any]:
    champion = model.aliases.get("champion")
    ready = [version for version in model.versions if version.status == "ready"]
    shown = next((version for version in ready if version.version == champion), ready[0] if ready else None)
    base: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": model.tenant,
        "task": model.task,
        "aliases": model.aliases,
        "versions": [version.version for version in ready],
    }
    if shown is None:
        return base | {"version": None, "state": "unloaded", "engine": None, "labels": [], "bytes": 0}
    detail = _version(shown, model, services)
    keys = ("version", "parent", "root", "state", "reason", "engine", "labels", "bytes", "kind", "method", "metrics")
    return base | {key: detail[key] for key in keys}


def _version(version: ModelVersion, model: RegisteredModel, services: Services) -> dict[str, Any]:
    state, reason = services.pool.state_of(version.tenant, version.name, version.version)
    return {
        "id": f"{version.name}:{version.version}",
        "object": "model.version",
        "name": version.name,
        "version": version.version,
        "status": version.status,
        "aliases": sorted(alias for alias, number in model.aliases.items() if number == version.version),
        "parent": version.backbone,
        "root": version.backbone_digest,
        "kind": version.kind,
        "task": version.task,
        "method": version.method,
        "job_id": version.job_id,
        "state": state,
        "reason": reason,
        "engine": services.pool.engine_of(version.tenant, version.name, version.version),
        "labels": version.labels or [],
        "metrics": version.metrics or {},
        "bytes": version.bytes or 0,
        "created": int(version.created_at),
    }


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
