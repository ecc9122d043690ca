"""`/finetune`: start, watch, cancel."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response
from pydantic import ValidationError

from finetune.data.check import ROWS_FILE
from finetune.data.errors import ColumnMissing, DatasetUnreadable
from finetune.data.findings import excessive
from finetune.data.labelled import load_labelled
from finetune.data.load import find_target, load_sides
from finetune.data.options import AUTO, SideColumns
from finetune.data.records import ColumnReport, DatasetRecord, DatasetStatus, has_errors
from finetune.data.sides import Sides
from finetune.data.targets import target_type
from finetune.jobs.hyperparameters import Hyperparameters, check_labels, check_task, parse_hyperparameters
from finetune.jobs.link import finite
from finetune.jobs.plan import DatasetProfile, WorkerProfile, refuse_unavailable, resolve
from finetune.jobs.records import FineTuneJob, JobSpec, JobStatus, Outlook
from finetune.jobs.search_space import nested
from model_registry.errors import ModelNotFound
from model_registry.refs import NAME_PATTERN
from modeling.tasks import DEFAULT_MODALITY, task_of_kind
from service.api import schemas
from service.api.auth import Principal
from service.api.body_errors import read_storable, refuse_unstorable_values
from service.api.datasets import take_upload
from service.api.deps import NeedsData, Reason, Services, ServicesDep, Training
from service.api.event_streams import EventStream, event_document
from service.api.guard import GuardLimits, checked_json
from service.api.problems import Problem, json_response
from service.api.routing import MAX_SEQ, Cursor, JobId, ManagementRoute, Responses, WholeNumber, json_body, refusals
from service.api.schemas import CancelRequest, FinetuneRequest
from service.housekeeping import remove_job_files
from service.inference.errors import ModelNotReady
from service.threads import on_database, on_disk, on_rows

router = APIRouter(tags=["fine-tuning"], route_class=ManagementRoute)
_NO_JOB = refusals("job_not_found")
_CHARACTERS_PER_TOKEN = 4
_JSON_FIELDS = frozenset(
    {"columns", "exclude_rows", "validation_columns", "test_columns", "hyperparameters", "metadata"}
)
_INSPECTED_ROWS = 50_000  # some 5 s of a thread; a job inspects any number
_BODY_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/FinetuneRequest"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "description": "the same fields beside `file`, the training rows; objects as JSON text",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "register_as": {"type": "string", "pattern": NAME_PATTERN},
                    },
                    "required": ["file", "register_as"],
                    "additionalProperties": {"type": "string"},
                }
            },
        },
    }
}
_ACCEPTED: Responses = {202: {"headers": {"Location": {"schema": {"type": "string"}, "description": "the job's path"}}}}
_STARTED: Responses = {200: {"model": schemas.JobPlan, "description": "The plan, with `dry_run`"}, **_ACCEPTED}
_CSV: Responses = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "With `Accept: text/event-stream` every event as it comes, until the job has ended",
    }
}
_STARTS = (
    "dataset_not_found",
    "dataset_invalid",
    "dataset_not_ready",
    "empty_input",
    "idempotency_mismatch",
    "model_not_found",
    "model_not_ready",
    "storage_full",
)


@router.post(
    "/finetune",
    status_code=202,
    dependencies=[NeedsData],
    response_model=schemas.Job,
    responses=_STARTED | refusals(*_STARTS),
    summary="Start a fine-tune job",
    openapi_extra=_BODY_SCHEMA,
)
async def start(
    request: Request,
    services: ServicesDep,
    principal: Training,
    dry_run: bool = Query(False, description="only resolve the plan and estimate it"),
    idempotency_key: str | None = Header(None, min_length=1, max_length=255),
) -> Response:
    body, digest = await _read(request, services, principal)
    spec, records, wanted = await on_database(_accept, body, services, principal)
    if dry_run:
        return json_response(await on_rows(_planned, spec, records, wanted, services, principal))
    await on_rows(_refuse_rows, spec, records, wanted, services, principal)
    is_ready = all(record.status is DatasetStatus.READY for record in records.values())
    job = await on_database(
        lambda: services.jobs.enqueue(
            principal.tenant, spec, is_data_ready=is_ready, idempotency_key=idempotency_key, request_sha256=digest
        )
    )
    return json_response(await on_database(document, job, services), 202, {"Location": f"/finetune/{job.id}"})


@router.post(
    "/finetune/{job_id}/rerun",
    status_code=202,
    response_model=schemas.Job,
    responses=_ACCEPTED
    | refusals("job_not_found", "job_not_ended", "model_not_found", "dataset_not_found", "idempotency_mismatch"),
    summary="Train the same once more, and compare the weights",
)
def rerun(
    job_id: JobId,
    services: ServicesDep,
    principal: Training,
    idempotency_key: str | None = Header(None, min_length=1, max_length=255),
) -> Response:
    original = services.jobs.get(principal.tenant, job_id)
    if not original.status.is_final:
        message = f"{original.id} is {original.status}; wait until it has ended, or cancel it"
        raise Problem(409, "job_not_ended", message)
    # What is compared moves no champion.
    spec = original.spec.model_copy(update={"rerun_of": job_id, "actor": principal.name, "promote": "manual"})
    if spec.backbone not in services.settings.backbones:
        raise ModelNotFound(f"there is no backbone {spec.backbone!r} any more")
    records = [services.datasets.get(principal.tenant, id_) for id_ in spec.datasets]
    job = services.jobs.enqueue(
        principal.tenant,
        spec,
        is_data_ready=all(record.status is DatasetStatus.READY for record in records),
        idempotency_key=idempotency_key,
        request_sha256=hashlib.sha256(f"rerun {job_id}".encode()).hexdigest(),
    )
    return json_response(document(job, services), 202, {"Location": f"/finetune/{job.id}"})


async def _read(request: Request, services: Services, principal: Principal) -> tuple[FinetuneRequest, str]:
    """The request as JSON, or as a multipart body that brings its file; the digest tells a repeat from a new one."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        principal.demand("datasets")
        record, fields = await take_upload(request, services, principal.tenant)
        values: dict[str, Any] = {}
        for name, text in fields.items():
            values[name] = await _json_field(name, text) if name in _JSON_FIELDS else text
        refuse_unstorable_values(values)
        canonical = json.dumps({**values, "file": record.sha256}, sort_keys=True)
        return _validated({**values, "dataset": record.id}), hashlib.sha256(canonical.encode()).hexdigest()
    json_body(request)
    values = await read_storable(await _json_content(request, services.settings.max_body_bytes))
    return _validated(values), hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


async def _json_content(request: Request, max_bytes: int) -> bytes:
    """The body of a JSON request. This route also takes uploads, so the guard lets large bodies through to it."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise Problem(413, "payload_too_large", f"a JSON body may have {max_bytes} bytes; send rows as a file")
    return await checked_json(bytes(content), GuardLimits())


async def _json_field(name: str, text: str) -> Any:
    """A field of a multipart body that holds JSON, read like a body of its own."""
    try:
        return await read_storable(await checked_json(text.encode(), GuardLimits()))
    except Problem as problem:
        problem.detail = f"the field {name!r}: {problem.detail}"
        raise


def _validated(values: Any) -> FinetuneRequest:
    try:
        return FinetuneRequest.model_validate(values)
    except ValidationError as error:
        items = error.errors(include_url=False, include_input=False)
        errors = [{"loc": [str(part)[:64] for part in item["loc"]], "message": item["msg"]} for item in items[:20]]
        first = errors[0]
        detail = f"{'.'.join(first['loc']) or 'body'}: {first['message']}"
        raise Problem(422, "invalid_request", detail, errors=errors) from error


def _accept(
    body: FinetuneRequest, services: Services, principal: Principal
) -> tuple[JobSpec, dict[str, DatasetRecord], Hyperparameters]:
    """Everything that can be refused now is refused now. Raises problems, `PlanError`, `DatasetNotFound`, and
    `InvalidReference` for a name whose versions are for another task."""
    wanted = parse_hyperparameters(body.hyperparameters)
    profile = services.jobs.live_worker_profile()
    refuse_unavailable(wanted, WorkerProfile.model_validate(profile) if profile else None)
    if body.promote == "if_better" and not principal.may("models:promote"):
        raise Problem(
            403, "forbidden", "promote: 'if_better' moves the champion, so it needs the scope 'models:promote'"
        )
    backbone = body.backbone or services.settings.default_backbone or next(iter(services.settings.backbones))
    if backbone not in services.settings.backbones:
        known = ", ".join(sorted(services.settings.backbones))
        raise ModelNotFound(f"there is no backbone {backbone!r}; there are {known}")
    if body.register_as in services.settings.backbones:
        raise Problem(422, "invalid_request", f"register_as: {body.register_as!r} is the name of a backbone")
    ids = (body.dataset, body.validation_dataset, body.test_dataset)
    records = {id_: services.datasets.get(principal.tenant, id_) for id_ in ids if id_ is not None}
    task = body.task if body.task != "auto" else _task_of(records[body.dataset], body.columns.label)
    if task != "auto":
        check_task(wanted, task)
        services.registry.check_task(tenant=principal.tenant, name=body.register_as, task=task)
    asked = nested(body.hyperparameters)
    accepted = {"backbone": backbone, "task": task, "actor": principal.name, "hyperparameters": asked}
    spec = JobSpec.model_validate({**dict(body), **accepted})
    for id_, record in records.items():
        _check_dataset(record, spec, split_column=wanted.split.column_read if id_ == spec.dataset else None)
    return spec, records, wanted


def _task_of(record: DatasetRecord, label: str) -> str:
    """What `auto` comes to, as the worker will find too; still `auto` while the dataset is being checked."""
    if record.columns is None:
        return AUTO
    is_list = any(column.name == label and column.type == "list" for column in record.columns)
    return task_of_kind(DEFAULT_MODALITY, "multi_label" if is_list else "single_label").name


def _check_dataset(record: DatasetRecord, spec: JobSpec, *, split_column: str | None) -> None:
    if record.status is DatasetStatus.INVALID and record.report is not None:
        errors = [finding for finding in record.report.findings if finding.severity == "error"]
        raise DatasetUnreadable(f"{record.id} cannot be used: {errors[0].message}", findings=errors)
    if record.columns is None:
        return  # still being checked: the worker looks again
    names = [column.name for column in record.columns]
    further = [*spec.columns.slices, *([split_column] if split_column else [])] if record.id == spec.dataset else []
    sides = {"train": spec.dataset, "validation": spec.validation_dataset, "test": spec.test_dataset}
    needed = [name for side, id_ in sides.items() if id_ == record.id for name in spec.columns_by_side[side].all_named]
    for wanted in (*needed, *further):
        if wanted not in names:
            error = ColumnMissing(wanted, available=names)
            raise DatasetUnreadable(f"{record.id}: {error}", findings=[error.as_finding()])
    labels = {spec.columns_by_side[side].label for side, id_ in sides.items() if id_ == record.id}
    for column in record.columns:
        if column.name in labels:
            _check_labels(record, column, spec.task)


def _check_labels(record: DatasetRecord, column: ColumnReport, task: str) -> None:
    # Of labels with a separator between them the report counts the sets; the job counts the labels.
    if column.excess_as_labels is None or task == AUTO:
        return
    kind = target_type(task).kind
    if kind == "single_label" or (kind == "multi_label" and column.type == "list"):
        finding = excessive(column.excess_as_labels, column=column.name)
        raise DatasetUnreadable(f"{record.id}: {finding.message}; {finding.fix}", findings=[finding])


def _sides(
    spec: JobSpec, records: dict[str, DatasetRecord], wanted: Hyperparameters, services: Services, principal: Principal
) -> Sides | None:
    """The rows as a job would begin with them; None while they are being checked, or if they are too many to look at.

    Raises `PlanError` for a weight on a label that they do not have.
    """
    if any(record.status is not DatasetStatus.READY for record in records.values()):
        return None
    if sum(record.rows or 0 for record in records.values()) > _INSPECTED_ROWS:
        return None
    named = {"train": spec.dataset, "validation": spec.validation_dataset, "test": spec.test_dataset}
    files = {
        side: services.intake.folder(principal.tenant, id_) / ROWS_FILE
        for side, id_ in named.items()
        if id_ is not None
    }
    sides = load_sides(
        files,
        columns=spec.columns_by_side,
        options=wanted.split,
        seed=wanted.seed,
        task=spec.task,
        rare=wanted.rare,
        exclude=spec.exclude_rows,
    )
    if not has_errors(sides.findings):
        check_labels(wanted, sides.train.names() | sides.validation.names() | sides.test.names())
    return sides


def _refuse_rows(
    spec: JobSpec, records: dict[str, DatasetRecord], wanted: Hyperparameters, services: Services, principal: Principal
) -> None:
    """What the rows themselves forbid, and a dry run would tell, is refused before the job waits for a worker."""
    with services.intake.reading(principal.tenant, records):
        sides = _sides(spec, records, wanted, services, principal)
    errors = [finding for finding in sides.findings if finding.severity == "error"] if sides is not None else []
    if errors:
        message = "; ".join(finding.message for finding in errors)[:1000]
        raise DatasetUnreadable(f"these rows cannot be trained on: {message}", findings=errors)


def _planned(
    spec: JobSpec, records: dict[str, DatasetRecord], wanted: Hyperparameters, services: Services, principal: Principal
) -> schemas.JobPlan:
    with services.intake.reading(principal.tenant, records):
        return _dry_run(spec, records, wanted, services, principal)


def _dry_run(
    spec: JobSpec, records: dict[str, DatasetRecord], wanted: Hyperparameters, services: Services, principal: Principal
) -> schemas.JobPlan:
    """The plan as far as it can be known before tokenising: lengths are estimated from characters."""
    record = records[spec.dataset]
    if record.status is not DatasetStatus.READY:
        raise Problem(409, "dataset_not_ready", f"{record.id} is still {record.status}; ask again in a moment")
    rows_file = services.intake.folder(principal.tenant, record.id) / ROWS_FILE
    target = find_target({"train": rows_file}, spec.columns_by_side, spec.task)
    rows, findings = load_labelled(rows_file, spec.columns, target=target)
    lengths = sorted(rows.modality.size(example) // _CHARACTERS_PER_TOKEN + 2 for example in rows.examples)
    total, split = len(rows), wanted.split
    validation = records[spec.validation_dataset].rows if spec.validation_dataset else round(total * split.validation)
    test = records[spec.test_dataset].rows if spec.test_dataset else round(total * split.test)
    cut = (0 if spec.validation_dataset else validation or 0) + (0 if spec.test_dataset else test or 0)
    sides = _sides(spec, records, wanted, services, principal)
    findings = findings if sides is None else sides.findings
    profile = services.jobs.live_worker_profile()
    if spec.backbone not in services.backbones:
        raise ModelNotReady(f"the backbone {spec.backbone} is being loaded", retry_after_s=1.0)
    info = services.backbones[spec.backbone].info
    plan = resolve(
        wanted,
        data=DatasetProfile(
            train_rows=max(1, total - cut),
            validation_rows=validation or 0,
            test_rows=test or 0,
            labels=len(rows.names()),
            max_length_p99=lengths[int(0.99 * (len(lengths) - 1))] if lengths else 8,
            largest_class=round(rows.most_of_a_label() * max(1, total - cut) / max(1, total)),
        ),
        worker=WorkerProfile.model_validate(profile) if profile else WorkerProfile(),
        parameters=info.parameters,
        model_max_length=info.max_length,
        task=target.task,
    )
    return {
        "object": "finetune.plan",
        "plan": plan.model_dump(mode="json"),
        "estimated_seconds": round(plan.estimated_seconds, 1) if profile else None,
        "findings": [finding.model_dump() for finding in findings],
    }


@router.get("/finetune", summary="List jobs, newest first", responses=_NO_JOB)
def list_jobs(
    services: ServicesDep,
    principal: Training,
    after: Cursor = None,
    limit: Annotated[WholeNumber, Query(ge=1, le=100)] = 20,
    status: JobStatus | None = None,
) -> schemas.JobList:
    found = services.jobs.page(principal.tenant, after=after, limit=limit + 1, status=status)
    return {
        "object": "list",
        "data": _documents(found[:limit], services),
        "has_more": len(found) > limit,
    }


@router.get("/finetune/{job_id}", summary="One job", responses=_NO_JOB)
def get_job(job_id: JobId, services: ServicesDep, principal: Training) -> schemas.Job:
    return document(services.jobs.get(principal.tenant, job_id), services)


@router.get(
    "/finetune/{job_id}/evaluation",
    summary="The evaluation report",
    responses=refusals("job_not_found", "evaluation_not_ready"),
)
def get_evaluation(job_id: JobId, services: ServicesDep, principal: Training) -> schemas.Evaluation:
    job = services.jobs.get(principal.tenant, job_id)
    if job.evaluation is None:
        raise Problem(409, "evaluation_not_ready", f"{job.id} is {job.status} and has no evaluation")
    return {"object": "finetune.evaluation", "job_id": job.id, **finite(job.evaluation)}


@router.get(
    "/finetune/{job_id}/suspects",
    summary="Rows whose label is probably wrong, as csv",
    response_class=Response,
    responses=_CSV | refusals("job_not_found", "evaluation_not_ready"),
)
def get_suspects(job_id: JobId, services: ServicesDep, principal: Training) -> Response:
    job = services.jobs.get(principal.tenant, job_id)
    if job.evaluation is None:
        raise Problem(409, "evaluation_not_ready", f"{job.id} is {job.status} and has no evaluation")
    sink = io.StringIO()
    writer = csv.DictWriter(sink, ["row", "side", "given", "suggested", "margin", "text"], lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({"side": "train", "text": "", **suspect} for suspect in job.evaluation.get("suspects") or [])
    return Response(sink.getvalue(), media_type="text/csv; charset=utf-8")


@router.get(
    "/finetune/{job_id}/events",
    summary="Events of a job, as JSON or as a stream",
    response_model=schemas.EventList,
    responses=_EVENTS | refusals("job_not_found", "too_many_streams"),
)
async def get_events(
    job_id: JobId,
    request: Request,
    services: ServicesDep,
    principal: Training,
    after: Annotated[WholeNumber, Query(ge=0, le=MAX_SEQ, description="only events with a larger seq")] = 0,
    limit: Annotated[WholeNumber, Query(ge=1, le=1000)] = 100,
    last_event_id: WholeNumber | None = Header(
        None, ge=0, le=MAX_SEQ, description="of a stream: go on after this event"
    ),
) -> Response:
    tenant = principal.tenant
    if "text/event-stream" in request.headers.get("accept", ""):
        start = after if last_event_id is None else last_event_id
        subscription = await services.events.open((tenant, principal.name), tenant, job_id, after=start)
        return EventStream(subscription, services.events.is_ending)
    found = await on_database(lambda: services.jobs.events(tenant, job_id, after=after, limit=limit + 1))
    data = [event_document(event) for event in found[:limit]]
    return json_response({"object": "list", "data": data, "has_more": len(found) > limit})


@router.post(
    "/finetune/{job_id}/cancel", summary="Cancel a job", responses=refusals("job_not_found", "job_not_cancellable")
)
def cancel(job_id: JobId, services: ServicesDep, principal: Training, body: CancelRequest | None = None) -> schemas.Job:
    keep_best = (body or CancelRequest()).keep_best
    return document(services.jobs.request_cancel(principal.tenant, job_id, keep_best=keep_best), services)


@router.post(
    "/finetune/{job_id}/pause",
    summary="Pause a job; its worker saves and takes the next one",
    responses=refusals("job_not_found", "job_not_pausable"),
)
def pause(job_id: JobId, services: ServicesDep, principal: Training) -> schemas.Job:
    return document(services.jobs.request_pause(principal.tenant, job_id), services)


@router.post(
    "/finetune/{job_id}/resume",
    summary="Put a paused job back into the queue",
    responses=refusals("job_not_found", "job_not_resumable"),
)
def resume(job_id: JobId, services: ServicesDep, principal: Training) -> schemas.Job:
    return document(services.jobs.request_resume(principal.tenant, job_id), services)


@router.delete(
    "/finetune/{job_id}",
    status_code=204,
    dependencies=[NeedsData],
    summary="Delete a job that has ended; its versions stay",
    responses=refusals("job_not_found", "job_not_deletable"),
)
async def delete_job(job_id: JobId, services: ServicesDep, principal: Training, reason: Reason = "") -> Response:
    """Its events, evaluation and log go. A repeat is 204 too."""
    await on_database(lambda: services.jobs.delete(principal.tenant, job_id, actor=principal.name, reason=reason))
    await on_disk(remove_job_files, services.settings.data_dir, job_id)
    return Response(status_code=204)


def document(job: FineTuneJob, services: Services) -> schemas.Job:
    return _documents([job], services)[0]


def _documents(found: Sequence[FineTuneJob], services: Services) -> list[schemas.Job]:
    is_any_waiting = any(job.status.is_waiting for job in found)
    outlook = services.jobs.outlook(found) if is_any_waiting else None
    return [_document(job, outlook if job.status.is_waiting else None) for job in found]


def _document(job: FineTuneJob, outlook: Outlook | None) -> schemas.Job:
    """`outlook` of a job that waits."""
    spec = job.spec
    return {
        "id": job.id,
        "object": "finetune.job",
        "status": job.status,
        "phase": job.phase,
        "attempt": job.attempt,
        "register_as": spec.register_as,
        "dataset": spec.dataset,
        "validation_dataset": spec.validation_dataset,
        "test_dataset": spec.test_dataset,
        "backbone": spec.backbone,
        "task": (job.plan or {}).get("task", spec.task),
        "columns": spec.columns.model_dump(),
        "exclude_rows": spec.exclude_rows,
        "validation_columns": _named(spec.validation_columns),
        "test_columns": _named(spec.test_columns),
        "promote": spec.promote,
        "hyperparameters": spec.hyperparameters,
        "plan": job.plan,
        "metadata": spec.metadata,
        "rerun_of": spec.rerun_of,
        "progress": _progress(job),
        "queue_position": None if outlook is None else outlook.positions.get(job.id),
        "waiting_for": None if outlook is None else outlook.why_waiting(job),
        "worker_last_seen": _worker_last_seen(job, outlook),
        "best": job.best,
        "cut_short": (job.evaluation or {}).get("cut_short"),
        "result": job.result,
        "error": job.error,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def _named(columns: SideColumns | None) -> dict[str, Any] | None:
    return None if columns is None else columns.model_dump(exclude_none=True)


def _progress(job: FineTuneJob) -> dict[str, Any] | None:
    """How far the job came; only one that runs has an estimate of the time to come."""
    if job.progress is None or job.status in {JobStatus.RUNNING, JobStatus.CANCELLING, JobStatus.SUCCEEDED}:
        return job.progress
    return {**job.progress, "eta_seconds": None}


def _worker_last_seen(job: FineTuneJob, outlook: Outlook | None) -> float | None:
    """Of the worker that holds the job; while it waits, of any."""
    if outlook is not None:
        return outlook.worker_last_seen
    return job.heartbeat_at if job.worker_id is not None and not job.status.is_final else None
