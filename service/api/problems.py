"""Errors as RFC 9457 problem documents.

Knows which error class is which status and code; knows no route. Everything that refuses a request
ends here: route handlers raise a `Problem` or one of the mapped errors, the guard and the protocol
build a `Problem` themselves. No input value, path of the host, SQL or traceback leaves through it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, cast

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from finetune.data import errors as data
from finetune.jobs import errors as jobs
from finetune.jobs.hyperparameters import PlanError
from model_registry import errors as registry
from modeling import errors as modeling
from service.inference import errors as inference
from service.model_import import ImportRefused, ImportsBusy

logger = logging.getLogger("service")

MEDIA_TYPE = "application/problem+json"
MAX_LISTED_ERRORS = 20
MAX_LOCATION_CHARS = 64

STATUS_BY_ERROR: dict[type[Exception], tuple[int, str]] = {
    registry.ModelNotFound: (404, "model_not_found"),
    registry.AliasConflict: (409, "alias_conflict"),
    registry.InvalidReference: (422, "invalid_request"),
    registry.VersionNotServable: (409, "version_not_servable"),
    registry.ArtifactError: (409, "artifact_invalid"),
    registry.StoreFull: (507, "storage_full"),
    registry.DatabaseUnavailable: (503, "database_unavailable"),
    inference.EmptyInput: (400, "empty_input"),
    inference.BatchTooLarge: (413, "payload_too_large"),
    inference.QueueFull: (429, "queue_full"),
    inference.ModelNotReady: (503, "model_not_ready"),
    inference.MemoryBudgetExceeded: (409, "memory_budget_exceeded"),
    inference.DeadlineExceeded: (504, "deadline_exceeded"),
    inference.NotPredictable: (422, "invalid_request"),
    inference.ParameterUnfit: (422, "invalid_request"),
    inference.InferenceFailed: (500, "inference_failed"),
    modeling.InputTooLong: (422, "input_too_long"),
    modeling.InputUnfit: (422, "invalid_request"),
    modeling.BackboneUnavailable: (422, "checkpoint_invalid"),
    modeling.ConfigRefused: (422, "checkpoint_invalid"),
    modeling.CheckpointRefused: (422, "checkpoint_invalid"),
    modeling.UnsupportedArchitecture: (422, "checkpoint_invalid"),
    modeling.PreprocessorFailed: (500, "inference_failed"),
    modeling.WeightsInvalid: (409, "artifact_invalid"),
    modeling.AdapterMismatch: (409, "artifact_invalid"),
    modeling.GoldenRowsDiffer: (409, "golden_rows_differ"),
    ImportRefused: (403, "forbidden"),
    ImportsBusy: (429, "queue_full"),
    data.DatasetNotFound: (404, "dataset_not_found"),
    data.DatasetUnreadable: (422, "dataset_invalid"),
    data.ColumnMissing: (422, "dataset_invalid"),
    jobs.JobNotFound: (404, "job_not_found"),
    jobs.JobNotCancellable: (409, "job_not_cancellable"),
    jobs.JobNotPausable: (409, "job_not_pausable"),
    jobs.JobNotResumable: (409, "job_not_resumable"),
    jobs.IdempotencyMismatch: (422, "idempotency_mismatch"),
    PlanError: (422, "invalid_request"),
    registry.StoreUnavailable: (503, "storage_unavailable"),
    registry.VersionInUse: (409, "version_in_use"),
    registry.ModelInUse: (409, "model_in_use"),
    data.DatasetInUse: (409, "dataset_in_use"),
    jobs.JobNotDeletable: (409, "job_not_deletable"),
}
"""Status and code by error class; a subclass not listed answers as its nearest listed parent."""

STATUS_BY_CODE: Final[Mapping[str, int]] = {code: status for status, code in STATUS_BY_ERROR.values()} | {
    "client_closed_request": 499,
    "dataset_not_ready": 409,
    "draining": 503,
    "evaluation_not_ready": 409,
    "file_not_found": 404,
    "headers_too_large": 431,
    "internal_error": 500,
    "job_not_ended": 409,
    "malformed_request": 400,
    "method_not_allowed": 405,
    "not_found": 404,
    "request_timeout": 408,
    "too_many_streams": 429,
    "unauthenticated": 401,
    "unsupported_media_type": 415,
    "uri_too_long": 414,
}
"""Every code with its status: those of error classes, and those that are raised as problems."""

RETRY_AFTER_S: dict[str, float] = {"database_unavailable": 1.0, "storage_unavailable": 5.0}
"""When to come back, for mapped errors whose exception carries no `retry_after_s` of its own."""

_CODE_BY_STATUS = {
    400: "malformed_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "payload_too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    500: "internal_error",
}
# Codes from 500 on whose messages say what a client needs and nothing of this host.
WRITTEN_FOR_CLIENTS = frozenset({"model_not_ready", "deadline_exceeded", "inference_failed"})
_DETAIL_BY_STATUS = {404: "There is no such route.", 405: "This route does not take this method."}
_INTERNAL_DETAIL = "Something went wrong on our side; quote the request id when you report it."


class Problem(Exception):
    """A refusal, ready to be answered.

    `errors` lists places in the request as `{"loc": [...], "message": "..."}` (or findings of the
    same openness), `headers` are added to the response as they are.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, Any]] = (),
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})


def problem_body(problem: Problem, *, path: str, request_id: str) -> dict[str, Any]:
    """The members of the document; `retry_after_ms` and `errors` only where there are any."""
    body: dict[str, Any] = {
        "type": f"urn:polyhead:error:{problem.code}",
        "title": problem.code.replace("_", " ").capitalize(),
        "status": problem.status,
        "detail": problem.detail,
        "instance": path,
        "code": problem.code,
        "request_id": request_id,
    }
    if problem.retry_after_s is not None:
        body["retry_after_ms"] = math.ceil(problem.retry_after_s * 1000)
    if problem.errors:
        body["errors"] = problem.errors
    return body


def problem_response(problem: Problem, *, path: str, request_id: str) -> Response:
    """The document as a response; `Retry-After` is in whole seconds, rounded up."""
    headers = dict(problem.headers)
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(problem.retry_after_s))
    body = problem_body(problem, path=path, request_id=request_id)
    return Response(dumped(body), status_code=problem.status, headers=headers, media_type=MEDIA_TYPE)


def problem_for(error: Exception) -> Problem | None:
    """The refusal that an error means, by its nearest listed class; None where no class is listed."""
    if isinstance(error, Problem):
        return error
    for cls in type(error).__mro__:
        if cls in STATUS_BY_ERROR:
            return _mapped(error, *STATUS_BY_ERROR[cls])
    return None


def refusal(error: Exception, scope: Mapping[str, Any]) -> Response | None:
    """The answer to an error that means a refusal; None for a fault of ours. Logs what mapped errors hide."""
    problem = problem_for(error)
    if problem is None:
        return None
    if problem.status >= 500 and problem is not error:
        logger.warning("%s %s answered %s: %s", scope["method"], scope["path"], problem.code, error)
    return _respond(scope, problem)


def problem_of_http_exception(error: HTTPException) -> Problem:
    """Starlette's and FastAPI's own refusals; their headers (`Allow`, `WWW-Authenticate`) are kept."""
    status = error.status_code
    code = _CODE_BY_STATUS.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")
    detail = _DETAIL_BY_STATUS.get(status, str(error.detail))
    return Problem(status, code, detail, headers=error.headers)


def problem_of_validation(error: RequestValidationError) -> Problem:
    """400 for a body that is no JSON, else 422 with the places that are wrong, never with their values."""
    found = error.errors()
    for item in found:
        if item["type"] == "json_invalid" and item["loc"][:1] == ("body",):
            return _unparsable(item)
    listed = [_place(item) for item in found[:MAX_LISTED_ERRORS]]
    more = f" (the first {MAX_LISTED_ERRORS} are listed)" if len(found) > MAX_LISTED_ERRORS else ""
    places = "1 place" if len(found) == 1 else f"{len(found)} places"
    first = f"{'.'.join(map(str, listed[0]['loc'][1:])) or 'the body'}: {listed[0]['message']}"
    return Problem(422, "invalid_request", f"The request is not valid in {places}{more}; {first}.", errors=listed)


def install(app: FastAPI) -> None:
    """Makes every error of `app` a problem document."""
    mapped: list[type[Exception]] = [Problem, *STATUS_BY_ERROR]
    for cls in mapped:
        app.add_exception_handler(cls, _answer_mapped)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)
    app.add_exception_handler(Exception, _answer_unexpected)


async def _answer_mapped(request: Request, error: Exception) -> Response:
    return refusal(error, request.scope) or await _answer_unexpected(request, error)


async def _answer_validation(request: Request, error: Exception) -> Response:
    return _respond(request.scope, problem_of_validation(cast(RequestValidationError, error)))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    http_error = cast(HTTPException, error)
    if http_error.status_code < 400:
        return Response(status_code=http_error.status_code, headers=http_error.headers)
    problem = problem_of_http_exception(http_error)
    allowed = getattr(request.app.state, "allowed_methods", None)
    if problem.status == 405 and allowed is not None:  # the framework names the methods of one route that fits alone
        problem.headers["Allow"] = allowed(request.scope["path"]) or problem.headers.get("Allow", "")
    return _respond(request.scope, problem)


async def _answer_disconnect(request: Request, error: Exception) -> Response:
    # No client reads this; without it every client that goes away mid-upload would be logged as our fault.
    return _respond(request.scope, Problem(400, "malformed_request", "The client went away before the body ended."))


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    problem = problem_for(error)
    if problem is None:
        logger.exception(
            "unexpected error, request %s: %s %s",
            request_id_of(request.scope),
            request.method,
            request.url.path,
            exc_info=error,
        )
        problem = internal_problem()
    # Starlette raises the error again after this answer; the guard looks here to log it only once.
    request.scope.setdefault("state", {})["is_error_logged"] = True
    return _respond(request.scope, problem)


def internal_problem() -> Problem:
    """What a client learns about a fault of ours."""
    return Problem(500, "internal_error", _INTERNAL_DETAIL)


def request_id_of(scope: Mapping[str, Any]) -> str:
    """The id the guard gave the request; empty if no guard is before the app."""
    return str(scope.get("state", {}).get("request_id", ""))


def _respond(scope: Mapping[str, Any], problem: Problem) -> Response:
    return problem_response(problem, path=scope["path"], request_id=request_id_of(scope))


def _mapped(error: Exception, status: int, code: str) -> Problem:
    # Messages of faults on our side may name files or tables, so they are logged and not sent.
    is_open = status < 500 or code in WRITTEN_FOR_CLIENTS
    detail = str(error) if is_open else f"{code.replace('_', ' ').capitalize()}."
    retry_after_s = getattr(error, "retry_after_s", None)
    return Problem(
        status,
        code,
        detail,
        errors=_errors_of(error),
        retry_after_s=RETRY_AFTER_S.get(code) if retry_after_s is None else retry_after_s,
    )


def _errors_of(error: Exception) -> list[dict[str, Any]]:
    """The places an error names: its own list, or its findings."""
    findings = [finding.model_dump(mode="json") for finding in getattr(error, "findings", ())]
    return [*getattr(error, "errors", ()), *findings][:MAX_LISTED_ERRORS]


def _unparsable(item: Mapping[str, Any]) -> Problem:
    position = item["loc"][1] if len(item["loc"]) > 1 else 0
    reason = item.get("ctx", {}).get("error", "not valid JSON")
    return Problem(400, "malformed_request", f"The body is not valid JSON: {reason} (character {position}).")


def _place(item: Mapping[str, Any]) -> dict[str, Any]:
    """Where and why. The names in `loc` may be the client's own, so they are cut short."""
    location = [part if isinstance(part, int) else str(part)[:MAX_LOCATION_CHARS] for part in item["loc"]]
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "union_tag_invalid":  # the one message of pydantic that quotes the input
        message = f"The tag is none of the expected ones: {item.get('ctx', {}).get('expected_tags', '')}"
    return {"loc": location, "message": message}


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumped(document), status, headers, media_type="application/json")


def dumped(document: Any) -> bytes:
    """`document` as JSON; a number that is none is null."""
    try:
        return orjson.dumps(document)
    except TypeError:  # a lone surrogate: legal in a JSON request, not in UTF-8
        return orjson.dumps(_without_surrogates(document))


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(item) for item in value]
    return value
