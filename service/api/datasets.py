"""`/datasets`: upload, look, delete."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from finetune.data.canonical import read_batches
from finetune.data.check import ROWS_FILE
from finetune.data.profile import class_counts
from finetune.data.records import ColumnReport, DatasetRecord, DatasetStatus
from service.api import schemas
from service.api.deps import NeedsData, Reason, Services, ServicesDep, Uploading
from service.api.problems import Problem, json_response
from service.api.routing import Cursor, DatasetId, ManagementRoute, WholeNumber, refusals
from service.api.uploads import receive_multipart
from service.dataset_intake import RAW_FILE
from service.threads import on_disk

router = APIRouter(tags=["datasets"], route_class=ManagementRoute)
_WAIT_FOR_CHECK_S = 20.0
_NO_DATASET = refusals("dataset_not_found")
_CREATED: dict[int | str, dict[str, Any]] = {
    201: {"headers": {"Location": {"schema": {"type": "string"}, "description": "the dataset's path"}}}
}
_UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                }
            }
        },
    }
}


@router.post(
    "/datasets",
    status_code=201,
    dependencies=[NeedsData],
    response_model=schemas.Dataset,
    responses=_CREATED | refusals("empty_input", "dataset_invalid", "storage_full", "dataset_not_found"),
    summary="Upload a table, or an archive of text files",
    openapi_extra=_UPLOAD_SCHEMA,
)
async def upload(request: Request, services: ServicesDep, principal: Uploading) -> Response:
    record, _ = await take_upload(request, services, principal.tenant)
    return json_response(document(record), 201, {"Location": f"/datasets/{record.id}"})


async def take_upload(request: Request, services: Services, tenant: str) -> tuple[DatasetRecord, dict[str, str]]:
    """Receives a multipart body with a file; the record after its check (or after a while) and the other fields.

    Whatever goes wrong on the way, a broken connection included, leaves nothing behind.
    """
    staging = services.intake.staging()
    try:
        received = await receive_multipart(request, staging / RAW_FILE)
        if not received.filename:
            raise Problem(400, "malformed_request", "the body has no part named 'file' (curl: -F file=@…)")
        if received.size_bytes == 0:
            raise Problem(400, "empty_input", f"the file {received.filename!r} is empty")
        record = await services.intake.accept(
            tenant, staging, filename=received.filename, sha256=received.sha256, size_bytes=received.size_bytes
        )
    finally:
        await on_disk(shutil.rmtree, staging, True)
    return await services.intake.settled(record, within_s=_WAIT_FOR_CHECK_S), received.fields


@router.get("/datasets", summary="List datasets, newest first", responses=_NO_DATASET)
def list_datasets(
    services: ServicesDep,
    principal: Uploading,
    after: Cursor = None,
    limit: Annotated[WholeNumber, Query(ge=1, le=100)] = 20,
) -> schemas.DatasetList:
    records = services.datasets.list(principal.tenant, after=after, limit=limit + 1)
    return {
        "object": "list",
        "data": [document(record) for record in records[:limit]],
        "has_more": len(records) > limit,
    }


@router.get("/datasets/{dataset_id}", summary="One dataset", responses=_NO_DATASET)
def get_dataset(dataset_id: DatasetId, services: ServicesDep, principal: Uploading) -> schemas.Dataset:
    return document(services.datasets.get(principal.tenant, dataset_id))


@router.get(
    "/datasets/{dataset_id}/report",
    summary="Findings of the check",
    responses=refusals("dataset_not_found", "dataset_invalid"),
)
def get_report(
    dataset_id: DatasetId,
    services: ServicesDep,
    principal: Uploading,
    label: str | None = Query(None, max_length=200, description="column whose classes to count; else guessed by name"),
) -> schemas.ReportOfDataset:
    record = services.datasets.get(principal.tenant, dataset_id)
    report = None if record.report is None else record.report.model_dump(mode="json")
    return {
        "object": "dataset.report",
        "dataset": record.id,
        "status": record.status,
        "report": report,
        "classes": class_counts(record.columns or [], label) if record.columns or label else None,
    }


@router.get(
    "/datasets/{dataset_id}/preview",
    dependencies=[NeedsData],
    summary="The first rows as they were read",
    responses=refusals("dataset_not_found", "dataset_not_ready"),
)
def get_preview(
    dataset_id: DatasetId,
    services: ServicesDep,
    principal: Uploading,
    limit: Annotated[WholeNumber, Query(ge=1, le=200)] = 20,
    offset: Annotated[WholeNumber, Query(ge=0, le=10_000_000, description="how many rows to skip")] = 0,
) -> schemas.DatasetPreview:
    record = services.datasets.get(principal.tenant, dataset_id)
    if record.status is not DatasetStatus.READY or record.columns is None:
        raise Problem(409, "dataset_not_ready", f"{record.id} is {record.status}; only a ready dataset has a preview")
    names = [column.name for column in record.columns]
    rows: list[schemas.PreviewRow] = []
    file = services.intake.folder(principal.tenant, record.id) / ROWS_FILE
    with services.intake.reading(principal.tenant, [record.id]):
        for batch in read_batches(file, names, offset=offset):
            cells = zip(batch.row_numbers, *batch.columns, strict=True)
            rows += [
                {"row": row, "values": dict(zip(names, values, strict=True))}
                for row, *values in islice(cells, limit - len(rows))
            ]
            if len(rows) >= limit:
                break
    return {
        "object": "dataset.preview",
        "dataset": record.id,
        "columns": names,
        "rows": rows,
        "classes": class_counts(record.columns, None),
    }


@router.delete(
    "/datasets/{dataset_id}",
    status_code=204,
    dependencies=[NeedsData],
    summary="Delete a dataset and its rows",
    responses=refusals("dataset_not_found", "dataset_in_use"),
)
async def delete_dataset(
    dataset_id: DatasetId, services: ServicesDep, principal: Uploading, reason: Reason = ""
) -> Response:
    """Refused while jobs that have not ended need it. A repeat is 204 too."""
    await services.intake.delete(
        principal.tenant, dataset_id, needed_by=services.jobs.users_of, actor=principal.name, reason=reason
    )
    return Response(status_code=204)


def document(record: DatasetRecord) -> schemas.Dataset:
    findings = [] if record.report is None else record.report.findings
    counted = Counter(finding.severity for finding in findings)
    return {
        "id": record.id,
        "object": "dataset",
        "filename": record.filename,
        "format": record.format,
        "status": record.status,
        "bytes": record.bytes,
        "sha256": record.sha256,
        "rows": record.rows,
        "columns": None if record.columns is None else [_column(column) for column in record.columns],
        "findings": {"error": counted["error"], "warning": counted["warning"], "info": counted["info"]},
        "errors": [finding.model_dump() for finding in findings if finding.severity == "error"],
        "created_at": record.created_at,
    }


def _column(column: ColumnReport) -> schemas.Column:
    """Without the rows of each value, which the report has: a list of datasets would be long."""
    return {
        "name": column.name,
        "type": column.type,
        "empty": column.empty,
        "distinct": column.distinct,
        "example": column.example,
    }
