"""`/models`: what can be served, where its aliases point, and how they move."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query
from fastapi.responses import Response

from model_registry.errors import HashMismatch, ModelInUse, ModelNotFound, VersionInUse
from model_registry.manifest import FileEntry, ModelManifest, sha256_hex
from model_registry.refs import CHAMPION, MAX_VERSION, ModelRef
from model_registry.registry import AliasChange, ModelVersion, RegisteredModel
from model_registry.removal import Deletion
from model_registry.store import load_manifest
from modeling.backbone import why_retrain
from modeling.tasks import DEFAULT_MODALITY, TASKS
from service.api import schemas
from service.api.auth import Principal
from service.api.deps import (
    Administering,
    Deleting,
    NeedsData,
    Promoting,
    Reading,
    Reason,
    Services,
    ServicesDep,
)
from service.api.problems import Problem, json_response
from service.api.routing import AliasName, JsonBody, ManagementRoute, ModelName, VersionNumber, WholeNumber, refusals
from service.api.schemas import AliasRequest, ImportRequest, RollbackRequest
from service.inference.aliases import AliasState
from service.threads import on_database

router = APIRouter(tags=["models"], route_class=ManagementRoute)
_MAX_FILE_BYTES = 16 << 20
_BACKBONE_TASK: Final = "feature-extraction"
_SERVED_S = 10.0  # after that a caller has waited long enough to be told how things are
_PENDING: dict[int | str, dict[str, Any]] = {
    202: {
        "model": schemas.AliasPending,
        "description": "The alias has moved, and this replica does not serve the version yet",
    }
}
_FILE = ("model_not_found", "file_not_found", "version_not_servable", "artifact_invalid")
_MOVES = ("model_not_found", "alias_conflict", "version_not_servable")
_LOADS = ("artifact_invalid", "checkpoint_invalid", "golden_rows_differ", "memory_budget_exceeded")
_NO_MODEL = refusals("model_not_found")
_CREATED: dict[int | str, dict[str, Any]] = {
    201: {"headers": {"Location": {"schema": {"type": "string"}, "description": "the version's path"}}}
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


def _of_type(media_type: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {media_type: {"schema": {}}}}}


@router.get("/models", summary="Backbones and models")
@router.get("/v1/models", summary="Backbones and models, as OpenAI's clients list them")
def list_models(services: ServicesDep, principal: Reading) -> schemas.ModelList:
    names = [*services.pool.backbones(), *services.pool.missing()]
    backbones = [_backbone(name, services, principal.tenant) for name in names]
    models = [_model(model, services) for model in services.registry.models(principal.tenant)]
    return {"object": "list", "data": [*backbones, *models]}


@router.get("/models/{name}", summary="One model", responses=_NO_MODEL)
@router.get("/v1/models/{name}", summary="One model", responses=_NO_MODEL)
def get_model(name: ModelName, services: ServicesDep, principal: Reading) -> schemas.BackboneDocument | schemas.Model:
    if name in services.pool.backbones() or name in services.pool.missing():
        return _backbone(name, services, principal.tenant)
    return _model(services.registry.model(principal.tenant, name), services)


@router.get("/models/{name}/versions", summary="Versions, newest first", responses=_NO_MODEL)
def list_versions(name: ModelName, services: ServicesDep, principal: Reading) -> schemas.VersionList:
    model = services.registry.model(principal.tenant, name)
    versions = [_version(version, model, services) for version in model.versions]
    return {"object": "list", "data": versions, "alias_states": _alias_states(model, services)}


@router.get(
    "/models/{name}/versions/{version}",
    dependencies=[NeedsData],
    summary="One version",
    responses=refusals("model_not_found", "artifact_invalid"),
)
def get_version(
    name: ModelName, version: VersionNumber, services: ServicesDep, principal: Reading
) -> schemas.VersionWithFiles:
    model = services.registry.model(principal.tenant, name)
    for found in model.versions:
        if found.version == version:
            return {**_version(found, model, services), "files": _files(found, services)}
    raise ModelNotFound(f"{name} has no version {version}")


@router.get(
    "/models/{name}/versions/{version}/card",
    dependencies=[NeedsData],
    summary="The model card",
    response_class=Response,
    responses=_of_type("text/markdown") | refusals(*_FILE),
)
def get_card(name: ModelName, version: VersionNumber, services: ServicesDep, principal: Reading) -> Response:
    content = _file(name, version, "MODEL_CARD.md", services, principal)
    return Response(content, media_type="text/markdown; charset=utf-8")


@router.get(
    "/models/{name}/versions/{version}/files/{path:path}",
    dependencies=[NeedsData],
    summary="A small file",
    response_class=Response,
    responses=_of_type("*/*") | refusals(*_FILE, "payload_too_large"),
)
def get_file(
    name: ModelName,
    version: VersionNumber,
    path: Annotated[str, Path(max_length=1024)],
    services: ServicesDep,
    principal: Reading,
) -> Response:
    content = _file(name, version, path, services, principal)
    kind = _MEDIA_TYPES.get(path.rpartition(".")[2], "application/octet-stream")
    return Response(content, media_type=kind, headers=_INERT)


@router.put(
    "/models/{name}/aliases/{alias}",
    dependencies=[JsonBody],
    response_model=schemas.AliasMove,
    responses=_PENDING | refusals(*_MOVES, *_LOADS),
    summary="Move an alias unless it has moved meanwhile",
)
async def put_alias(
    name: ModelName, alias: AliasName, body: AliasRequest, services: ServicesDep, principal: Promoting
) -> Response:
    """Loads and checks the version, then moves the alias. 200: this replica serves it. 202: it will.

    A version whose own files are at fault is refused, and the alias stays.
    """
    tenant, ends = principal.tenant, time.monotonic() + _SERVED_S
    version = await on_database(services.registry.resolve, tenant, ModelRef(name, alias=None, version=body.version))
    await services.pool.ensure(tenant, name, version, within_s=_SERVED_S)
    change = await on_database(
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


@router.get(
    "/models/{name}/aliases/{alias}/history", summary="Every move of an alias, newest first", responses=_NO_MODEL
)
def get_alias_history(
    name: ModelName,
    alias: AliasName,
    services: ServicesDep,
    principal: Reading,
    limit: Annotated[WholeNumber, Query(ge=1, le=1000)] = 100,
) -> schemas.AliasMoveList:
    changes = services.registry.history(tenant=principal.tenant, name=name, alias=alias, limit=limit)
    return {"object": "list", "data": [_change(change) for change in changes]}


@router.get(
    "/models/{name}/history",
    summary="Every move of every alias and what was deleted, newest first",
    responses=_NO_MODEL,
)
def get_history(
    name: ModelName,
    services: ServicesDep,
    principal: Reading,
    limit: Annotated[WholeNumber, Query(ge=1, le=1000)] = 100,
) -> schemas.History:
    changes = services.registry.history(tenant=principal.tenant, name=name, limit=limit)
    deletions = services.removal.deletions(tenant=principal.tenant, name=name, limit=limit)
    return {
        "object": "list",
        "data": [_change(change) for change in changes],
        "deletions": [_deletion(deletion) for deletion in deletions],
    }


@router.post(
    "/models/{name}/rollback",
    response_model=schemas.AliasMove,
    responses=_PENDING | refusals(*_MOVES),
    summary="Point an alias back to where it was",
)
async def rollback(
    name: ModelName, services: ServicesDep, principal: Promoting, body: RollbackRequest | None = None
) -> Response:
    """200: this replica serves the earlier version. 202: it will."""
    wanted, ends = body or RollbackRequest(), time.monotonic() + _SERVED_S
    change = await on_database(
        lambda: services.registry.rollback(
            tenant=principal.tenant, name=name, alias=wanted.alias, actor=principal.name, reason=wanted.reason
        )
    )
    return await _moved(change, principal.tenant, services, ends=ends)


@router.post(
    "/models/import",
    status_code=201,
    dependencies=[JsonBody, NeedsData],
    response_model=schemas.Version,
    responses=_CREATED
    | refusals("checkpoint_invalid", "artifact_invalid", "golden_rows_differ", "storage_full", "queue_full"),
    summary="Register an existing Hugging Face classifier",
)
async def import_model(body: ImportRequest, services: ServicesDep, principal: Administering) -> Response:
    if body.name in services.settings.backbones:
        raise Problem(422, "invalid_request", f"name: {body.name!r} is the name of a backbone")
    version = await services.imports.run(body.name, body.source, tenant=principal.tenant, actor=principal.name)
    await services.watcher.refresh()
    await services.pool.serves((principal.tenant, body.name, CHAMPION), version, within_s=_SERVED_S)
    model = await on_database(services.registry.model, principal.tenant, body.name)
    found = next(item for item in model.versions if item.version == version)
    return json_response(_version(found, model, services), 201, {"Location": f"/models/{body.name}/versions/{version}"})


@router.delete(
    "/models/{name}/versions/{version}",
    status_code=204,
    dependencies=[NeedsData],
    summary="Delete a version that nothing needs",
    responses=refusals("model_not_found", "version_in_use", "model_in_use"),
)
async def delete_version(
    name: ModelName, version: VersionNumber, services: ServicesDep, principal: Deleting, reason: Reason = ""
) -> Response:
    """Refused while an alias points at it, or serves it here until another version is loaded. Requests that it is at
    are answered; then its files are gone. A repeat is 204 too."""
    _refuse_needed(services, principal.tenant, name, version=version)
    await on_database(
        lambda: services.removal.delete_version(
            tenant=principal.tenant, name=name, version=version, actor=principal.name, reason=reason
        )
    )
    await services.watcher.refresh()
    return Response(status_code=204)


@router.delete(
    "/models/{name}/aliases/{alias}",
    status_code=204,
    summary="Delete an alias; its version stays",
    responses=refusals("model_not_found", "alias_conflict", "model_in_use"),
)
async def delete_alias(
    name: ModelName,
    alias: AliasName,
    services: ServicesDep,
    principal: Promoting,
    expected_version: Annotated[WholeNumber | None, Query(ge=1, le=MAX_VERSION)] = None,
    reason: Reason = "",
) -> Response:
    """With `expected_version` only if the alias points there. A repeat is 204 too."""
    _refuse_default(services, name, alias=alias)
    await on_database(
        lambda: services.removal.delete_alias(
            tenant=principal.tenant,
            name=name,
            alias=alias,
            expected_version=expected_version,
            actor=principal.name,
            reason=reason,
        )
    )
    await services.watcher.refresh()
    return Response(status_code=204)


@router.delete(
    "/models/{name}",
    status_code=204,
    dependencies=[NeedsData],
    summary="Delete a model with all its versions",
    responses=refusals("model_not_found", "model_in_use"),
)
async def delete_model(
    name: ModelName,
    services: ServicesDep,
    principal: Deleting,
    force: bool = Query(False, description="delete its aliases too"),
    reason: Reason = "",
) -> Response:
    """Refused while it has aliases, unless `force` is set, and while jobs will register a version of it. Its history is
    kept, and the name goes on counting if it is used again. A repeat is 204 too."""
    _refuse_default(services, name)
    jobs = await on_database(services.jobs.registering, principal.tenant, name)
    if jobs:
        needed_by = [("jobs", f"the job {job} will register a version") for job in jobs]
        raise ModelInUse(name, needed_by, fix="Cancel what should not register, or delete the model afterwards")
    await on_database(
        lambda: services.removal.delete_model(
            tenant=principal.tenant, name=name, is_forced=force, actor=principal.name, reason=reason
        )
    )
    await services.watcher.refresh()
    return Response(status_code=204)


def _refuse_needed(services: Services, tenant: str, name: str, *, version: int) -> None:
    """What only this process knows of the uses of a version. Raises `VersionInUse`."""
    _refuse_default(services, name, version=version)
    needed_by = [
        (f"aliases.{alias}", f"the alias {alias} serves it here until version {wanted} is loaded")
        for alias, wanted in services.pool.status.serves_instead(tenant, name, version).items()
    ]
    if needed_by:
        raise VersionInUse(f"{name}:{version}", needed_by, fix="Wait until the alias serves the other version")


def _refuse_default(services: Services, name: str, *, alias: str | None = None, version: int | None = None) -> None:
    """What a request without a model gets must not be deleted. Raises `ModelInUse`."""
    default = services.settings.default_model
    ref = None if default is None else ModelRef.parse(default)
    if ref is None or ref.name != name:
        return
    if (alias is None or alias == ref.alias) and (version is None or version == ref.version):
        needed_by = [("default_model", f"the setting default_model names {default}")]
        raise ModelInUse(str(default), needed_by, fix="Change the setting first")


async def _moved(change: AliasChange, tenant: str, services: Services, *, ends: float) -> Response:
    """What has become of a move of an alias, as soon as this replica serves the version or the time is over."""
    assert change.to_version is not None
    await services.watcher.refresh()
    alias = (tenant, change.name, change.alias)
    if await services.pool.serves(alias, change.to_version, within_s=ends - time.monotonic()):
        return json_response(_change(change))
    state = services.pool.status.alias(alias, change.to_version)
    pending: schemas.AliasPending = {
        "object": "alias.pending",
        "model": change.name,
        "alias": change.alias,
        **_alias_status(state),
        "change": _change(change),
    }
    return json_response(pending, 202)


def _files(version: ModelVersion, services: Services) -> list[schemas.File]:
    """What the manifest lists; nothing before the version is ready."""
    if version.status != "ready":
        return []
    manifest = _manifest(version, services)
    return [{"path": entry.path, "size": entry.size, "sha256": entry.sha256} for entry in manifest.files]


def _file(name: str, version: int, path: str, services: Services, principal: Principal) -> bytes:
    """Only what the manifest lists can be read, and only files of a size to show; rows of data need their own scope."""
    if path == "golden.json" and not principal.may("datasets"):
        raise Problem(403, "forbidden", "golden.json holds rows of the dataset, so it needs the scope 'datasets'")
    found = services.registry.resolve(principal.tenant, ModelRef(name, alias=None, version=version))
    manifest = _manifest(found, services)
    listed: dict[str, FileEntry] = {entry.path: entry for entry in manifest.files}
    if path not in listed:
        raise Problem(404, "file_not_found", f"{name}:{version} has no such file")
    if listed[path].size > _MAX_FILE_BYTES:
        raise Problem(413, "payload_too_large", f"{path} has {listed[path].size} bytes; fetch it from the store")
    content = services.store.get_bytes(f"{manifest.prefix}/{path}", max_bytes=_MAX_FILE_BYTES)
    if sha256_hex(content) != listed[path].sha256:
        raise HashMismatch(f"{path} of {name}:{version} differs from the digest in its manifest; restore it")
    return content


def _manifest(version: ModelVersion, services: Services) -> ModelManifest:
    """As it was registered. Raises `ArtifactError`."""
    return load_manifest(
        services.store,
        tenant=version.tenant,
        name=version.name,
        version=version.version,
        sha256=version.manifest_sha256,
    )


def _backbone(name: str, services: Services, tenant: str) -> schemas.BackboneDocument:
    served, known = services.pool.backbones().get(name), services.backbones.get(name)
    info = None if known is None else known.info
    modality = DEFAULT_MODALITY if info is None else info.modality
    reason = "it hides the model of this name" if (tenant, name) in services.pool.status.hidden else None
    if served is None:
        reason = "it could not be loaded; see the log" if services.pool.has_failed else "it is being loaded"
    return {
        "id": name,
        "object": "model",
        "created": 0 if served is None else int(served.loaded_at),
        "owned_by": "backbone",
        "parent": None,
        "root": services.settings.backbones[name] if info is None else info.source,
        "digest": None if info is None else info.digest,
        "task": _BACKBONE_TASK,
        "capabilities": {"labels": False, "embedding": True, "input": modality, "task": _BACKBONE_TASK},
        "version": None,
        "aliases": {},
        "state": served.state if served is not None else "failed" if services.pool.has_failed else "loading",
        "reason": reason,
        "engine": None if served is None else served.lane.engine_name,
        "engine_reason": None if served is None else services.pool.status.reason_of(served.lane),
        "prompts": [] if served is None else sorted(served.prompts),
        "labels": [],
        "bytes": 0 if served is None else served.own_bytes,
        "engine_reports": [
            {
                "device": report.device,
                "chosen": report.chosen,
                "created_at": report.created_at,
                "engines": report.engines,
            }
            for report in services.pool.engines.selector.measurements([] if info is None else [info.digest])
        ],
    }


def _model(model: RegisteredModel, services: Services) -> schemas.Model:
    champion = model.aliases.get(CHAMPION)
    ready = [version for version in model.versions if version.status == "ready"]
    shown = next((version for version in ready if version.version == champion), ready[0] if ready else None)
    states = _alias_states(model, services)
    document: schemas.Model = {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": model.tenant,
        "task": model.task,
        "capabilities": _capabilities(model.task, has_embedding=shown is not None and _has_embedding(shown)),
        "aliases": model.aliases,
        "alias_states": states,
        "wanted": champion,
        "serving": states[CHAMPION]["serving"] if champion is not None else None,
        "versions": [version.version for version in ready],
        "version": None,
        "state": "unloaded",
        "reason": None,
        "engine": None,
        "labels": [],
        "bytes": 0,
    }
    if shown is None:
        return document
    detail = _version(shown, model, services)
    document |= {
        "version": detail["version"],
        "parent": detail["parent"],
        "root": detail["root"],
        "state": detail["state"],
        "reason": detail["reason"] if champion is None else states[CHAMPION]["reason"],
        "engine": detail["engine"],
        "labels": detail["labels"],
        "bytes": detail["bytes"],
        "kind": detail["kind"],
        "method": detail["method"],
        "metrics": detail["metrics"],
    }
    if (model.tenant, model.name) in services.pool.status.hidden:
        document["reason"] = f"the backbone of this name hides it; ask for {shown.name}:{shown.version} or an alias"
    return document


def _capabilities(task: str, *, has_embedding: bool) -> schemas.Capabilities:
    known = TASKS.get(task)
    return {
        "labels": known is not None and known.kind != "regression",
        "embedding": has_embedding,
        "input": DEFAULT_MODALITY if known is None else known.modality,
        "task": task,
    }


def _has_embedding(version: ModelVersion) -> bool:
    """A baseline is linear over words: it has no vectors to give."""
    return version.kind != "baseline"


def _alias_states(model: RegisteredModel, services: Services) -> dict[str, schemas.AliasStatus]:
    """By alias: the version that it should serve, the one that it serves here, and why they differ."""
    return {
        alias: _alias_status(services.pool.status.alias((model.tenant, model.name, alias), version))
        for alias, version in model.aliases.items()
    }


def _alias_status(state: AliasState) -> schemas.AliasStatus:
    return {
        "wanted": state.wanted,
        "serving": state.serving,
        "reason": state.reason,
        "retry_at": state.retry_at,
    }


def _version(version: ModelVersion, model: RegisteredModel, services: Services) -> schemas.Version:
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
        "capabilities": _capabilities(version.task, has_embedding=_has_embedding(version)),
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


def _change(change: AliasChange) -> schemas.AliasMove:
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


def _deletion(deletion: Deletion) -> schemas.DeletionRecord:
    return {
        "object": "deletion",
        "id": deletion.id,
        "kind": deletion.kind,
        "name": deletion.name,
        "version": deletion.version,
        "actor": deletion.actor,
        "reason": deletion.reason,
        "created_at": deletion.created_at,
    }
