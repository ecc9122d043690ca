"""Ended jobs in an MLflow tracking server, over its REST API: parameters, metrics by step, tags, where the version is.

The worker calls it after a job's end, never the training process. Knows HTTP and MLflow's names; decides
nothing. MLflow's own client would bring a web framework and a cloud's SDK for these five requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from finetune.jobs.records import FineTuneJob, JobEvent, JobStatus
from model_registry.manifest import version_prefix

# The server's limits for one request.
_METRICS_AT_ONCE, _PARAMS_AT_ONCE, _MOST_VALUE = 1000, 100, 6000
_STATUS = {JobStatus.SUCCEEDED: "FINISHED", JobStatus.FAILED: "FAILED", JobStatus.CANCELLED: "KILLED"}
_HEADLINE = (
    "accuracy",
    "macro_f1",
    "weighted_f1",
    "micro_f1",
    "subset_accuracy",
    "hamming_loss",
    "rmse",
    "mae",
    "r2",
    "loss",
    "ece_after",
)


class TrackingFailed(Exception):
    """The tracking server could not be reached or refused what it was sent."""


class MlflowSink:
    """One tracking server and experiment. `budget_s` bounds a whole job's record, `timeout_s` one request."""

    def __init__(
        self, uri: str, experiment: str, *, token: str | None = None, timeout_s: float = 5.0, budget_s: float = 30.0
    ) -> None:
        self._base, self._experiment = uri.rstrip("/") + "/api/2.0/mlflow", experiment
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout_s, self._budget_s = timeout_s, budget_s

    def record(self, job: FineTuneJob, events: Sequence[JobEvent]) -> str:
        """Writes the job as a new run and returns the run's id. Raises `TrackingFailed`."""
        deadline = time.monotonic() + self._budget_s
        with httpx.Client(base_url=self._base, headers=self._headers, timeout=self._timeout_s) as http:
            run_id = self._begin(http, job)
            for batch in batches(job, events):
                if time.monotonic() > deadline:
                    raise TrackingFailed(f"the record took more than {self._budget_s:.0f} s and is incomplete")
                _post(http, "runs/log-batch", {"run_id": run_id, **batch})
            ended = {"run_id": run_id, "status": _STATUS.get(job.status, "FINISHED"), "end_time": _ms(job.finished_at)}
            _post(http, "runs/update", ended)
        return run_id

    def _begin(self, http: httpx.Client, job: FineTuneJob) -> str:
        body = {
            "experiment_id": self._experiment_id(http),
            "run_name": f"{job.spec.register_as} {job.id}",
            "start_time": _ms(job.started_at or job.created_at),
            "tags": [{"key": key, "value": value} for key, value in tags(job).items()],
        }
        return str(_post(http, "runs/create", body)["run"]["info"]["run_id"])

    def _experiment_id(self, http: httpx.Client) -> str:
        found = _request(http, "GET", "experiments/get-by-name", params={"experiment_name": self._experiment})
        if found.status_code == 404:
            return str(_post(http, "experiments/create", {"name": self._experiment})["experiment_id"])
        return str(_checked(found)["experiment"]["experiment_id"])


def _post(http: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return _checked(_request(http, "POST", path, json=body))


def _request(http: httpx.Client, verb: str, path: str, **options: Any) -> httpx.Response:
    try:
        return http.request(verb, f"/{path}", **options)
    except httpx.HTTPError as error:
        raise TrackingFailed(f"{path}: {type(error).__name__}") from error


def _checked(response: httpx.Response) -> dict[str, Any]:
    try:
        if response.status_code == 200:
            return dict(response.json())
        reason = str(response.json().get("message", ""))
    except ValueError:
        reason = "the answer is not JSON"
    raise TrackingFailed(f"{response.request.url.path} was answered with {response.status_code}: {reason[:200]}")


def tags(job: FineTuneJob) -> dict[str, str]:
    """Who made the version, from what, and where its files are."""
    result, spec = job.result or {}, job.spec
    found = {
        "polyhead.job": job.id,
        "polyhead.tenant": job.tenant,
        "polyhead.status": str(job.status),
        "polyhead.model": spec.register_as,
        "polyhead.backbone": spec.backbone,
        "polyhead.dataset": spec.dataset,
    }
    if "version" in result:
        found["polyhead.version"] = str(result["version"])
        found["polyhead.is_champion"] = str(result.get("is_champion", "")).lower()
        found["polyhead.artifact"] = version_prefix(job.tenant, spec.register_as, int(result["version"]))
    if job.error:
        found["polyhead.error"] = str(job.error.get("code", ""))
    return found | {f"metadata.{key}": value for key, value in spec.metadata.items()}


def batches(job: FineTuneJob, events: Sequence[JobEvent]) -> Iterator[dict[str, Any]]:
    """Bodies of `runs/log-batch` within the server's limits."""
    params = [{"key": key, "value": value} for key, value in flat(job.plan or job.spec.hyperparameters)]
    for start in range(0, len(params), _PARAMS_AT_ONCE):
        yield {"params": params[start : start + _PARAMS_AT_ONCE]}
    metrics = [*_by_step(events), *_final(job)]
    for start in range(0, len(metrics), _METRICS_AT_ONCE):
        yield {"metrics": metrics[start : start + _METRICS_AT_ONCE]}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values by dotted name, as text; a list of methods by the method's name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif name == "methods" and isinstance(value, list | tuple):
            for method in value:
                yield from flat({key: one for key, one in method.items() if key != "method"}, f"{method['method']}.")
        else:
            yield f"{prefix}{name}"[:250], str(value)[:_MOST_VALUE]


def _by_step(events: Sequence[JobEvent]) -> Iterator[dict[str, Any]]:
    for event in events:
        data = event.data
        if event.type not in {"metrics", "baseline_ready"} or "values" not in data:
            continue
        for name, value in data["values"].items():
            if not math.isfinite(value):
                continue  # JSON has no such number
            key = f"{data.get('method', 'run')}/{data['split']}_{name}"
            yield _metric(key, value, step=int(data.get("step", 0)), at=event.created_at)


def _final(job: FineTuneJob) -> Iterator[dict[str, Any]]:
    for side in ("validation", "test"):
        numbers = (job.evaluation or {}).get(side) or {}
        for name in _HEADLINE:
            if name in numbers:
                yield _metric(f"{side}_{name}", numbers[name], step=0, at=job.finished_at)


def _metric(key: str, value: float, *, step: int, at: float | None) -> dict[str, Any]:
    return {"key": key, "value": float(value), "timestamp": _ms(at), "step": step}


def _ms(seconds: float | None) -> int:
    return int((seconds or 0) * 1000)
