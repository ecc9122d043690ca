"""The Python client: one method for one route, plain dictionaries back. The command line is thin over it.

with Client() as client:
    dataset = client.upload_dataset("reviews.csv")
    job = client.wait(client.finetune(dataset["id"], "reviews")["id"])
    client.predict("reviews", ["a film that holds to the end"])
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
FINAL = frozenset({"succeeded", "failed", "cancelled"})
Json = dict[str, Any]
T = TypeVar("T")

_UNREACHABLE = 0
_AWAY = frozenset({_UNREACHABLE, 429, 502, 503, 504})
_PATIENCE_S = 60.0
"""A service that restarts is waited for so long, by `upload_dataset` and `wait`, before its error is raised."""
_LOADING_S = 10.0
"""A model that is being loaded is waited for so long, by `predict` and `embeddings`."""


class PolyheadError(Exception):
    """What the service refused, as its problem document says it.

    `status` is the HTTP status, 0 where no answer came (`code` is then `unreachable` or `timeout`);
    `errors` are places in the request or findings in a dataset. `retry_after_s` is set if coming back can help.
    """

    def __init__(
        self, status: int, code: str, detail: str, errors: Sequence[Json] = (), *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(f"{detail} ({status} {code})" if status else f"{detail} ({code})")
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.retry_after_s = retry_after_s


class Client:
    """Every method raises `PolyheadError`. Not for several threads at once."""

    def __init__(self, url: str | None = None, *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        """`url` and `api_key` default to the variables POLYHEAD_URL and POLYHEAD_API_KEY."""
        self.url = (url or os.environ.get("POLYHEAD_URL") or DEFAULT_URL).rstrip("/")
        key = api_key or os.environ.get("POLYHEAD_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            # http_proxy would catch loopback too, where no_proxy does not exclude it.
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout_s, trust_env=not is_loopback(self.url)
            )
        except (httpx.InvalidURL, UnicodeEncodeError, ValueError) as error:
            raise PolyheadError(_UNREACHABLE, "invalid_url", f"{self.url}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # Inference

    def predict(self, model: str, inputs: str | Sequence[str] | Sequence[tuple[str, str]], **parameters: Any) -> Json:
        """The answer with `version` and `predictions`, one for each input in order; `top_k=3` and the like go along.

        A model that is still being loaded is waited for, up to 10 s; so is it by `embeddings`.
        """
        return self._once_ready("/predict", {"model": model, "inputs": inputs, "parameters": parameters})

    def embeddings(self, model: str, inputs: str | Sequence[str]) -> list[list[float]]:
        """One vector for each input, in order."""
        answer = self._once_ready("/v1/embeddings", {"model": model, "input": inputs})
        return [item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])]

    # Fine-tuning

    def upload_dataset(self, path: str | Path, *, timeout_s: float | None = None, poll_s: float = 0.5) -> Json:
        """Uploads and waits for the check: the dataset with status `ready`, or `invalid` and its `errors`.

        Raises `OSError` where the file cannot be read, `TimeoutError` after `timeout_s`.
        """
        with Path(path).open("rb") as file:
            dataset = self._send("POST", "/datasets", files={"file": (Path(path).name, file)})
        waiting = _Waiting(timeout_s, poll_s)
        while dataset["status"] not in {"ready", "invalid"}:
            waiting.pause(f"the check of {dataset['id']}")
            dataset = waiting.keep_trying(self.dataset, dataset["id"]) or dataset
        return dataset

    def dataset(self, dataset_id: str) -> Json:
        return self._get(f"/datasets/{_part(dataset_id)}")

    def delete_dataset(self, dataset_id: str, *, reason: str = "") -> None:
        """`dataset_in_use` while jobs that have not ended need it."""
        self._delete(f"/datasets/{_part(dataset_id)}", {"reason": reason})

    def finetune(
        self,
        dataset: str,
        register_as: str,
        *,
        validation_dataset: str | None = None,
        test_dataset: str | None = None,
        backbone: str | None = None,
        task: str | None = None,
        columns: Mapping[str, str] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Json:
        """Starts a job and returns it, `queued`. A repeat with the same `idempotency_key` returns the first job."""
        body = {
            "dataset": dataset,
            "register_as": register_as,
            "validation_dataset": validation_dataset,
            "test_dataset": test_dataset,
            "backbone": backbone,
            "task": task,
            "columns": columns,
            "hyperparameters": hyperparameters,
            "metadata": metadata,
        }
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        given = {name: value for name, value in body.items() if value is not None}
        return self._send("POST", "/finetune", json=given, headers=headers)

    def job(self, job_id: str) -> Json:
        return self._get(f"/finetune/{_part(job_id)}")

    def jobs(self, *, status: str | None = None, limit: int = 20) -> list[Json]:
        """Newest first."""
        return self._list("/finetune", {"limit": limit} | ({"status": status} if status else {}))

    def events(self, job_id: str, after: int = 0) -> list[Json]:
        """Every event with a `seq` larger than `after`, in order."""
        found: list[Json] = []
        while True:
            page = self._get(f"/finetune/{_part(job_id)}/events", {"after": after, "limit": 1000})
            found += page["data"]
            if not page["has_more"] or not page["data"]:
                return found
            after = found[-1]["seq"]

    def follow(
        self, job_id: str, after: int = 0, *, timeout_s: float | None = None, poll_s: float = 0.5
    ) -> Iterator[Json]:
        """Every event as it comes, until the job has ended. Rides out restarts of the service."""
        waiting = _Waiting(timeout_s, poll_s)
        while True:
            # The state first: what is written before it became final is then certainly read.
            job = waiting.keep_trying(self.job, job_id)
            events = waiting.keep_trying(self.events, job_id, after)
            for event in events or ():
                after = event["seq"]
                yield event
            if job is not None and events is not None and job["status"] in FINAL:
                return
            waiting.pause(job_id)

    def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 0.5) -> Json:
        """The job once it has ended, however it did: look at its `status`. Raises `TimeoutError`."""
        waiting = _Waiting(timeout_s, poll_s)
        while True:
            job = waiting.keep_trying(self.job, job_id)
            if job is not None and job["status"] in FINAL:
                return job
            waiting.pause(job_id)

    def delete_job(self, job_id: str, *, reason: str = "") -> None:
        """`job_not_deletable` until it has ended. Versions that it registered stay."""
        self._delete(f"/finetune/{_part(job_id)}", {"reason": reason})

    # Models

    def models(self) -> list[Json]:
        """Backbones first."""
        return self._list("/models")

    def model(self, name: str) -> Json:
        return self._get(f"/models/{_part(name)}")

    def set_alias(self, name: str, alias: str, *, version: int, expected_version: int | None, reason: str = "") -> Json:
        """Moves the alias from `expected_version` (None: it does not exist yet), else `alias_conflict`.

        Returns an `alias.change` if the version serves, and an `alias.pending` with `wanted`, `serving`, `reason` and
        `retry_at` if the service has not been able to load it within 10 s: it serves by itself as soon as it can.
        """
        body = {"version": version, "expected_version": expected_version, "reason": reason}
        return self._send("PUT", f"/models/{_part(name)}/aliases/{_part(alias)}", json=body)

    def rollback(self, name: str, *, alias: str = "champion", reason: str = "") -> Json:
        """Points the alias back to where it was. Returns what `set_alias` returns."""
        return self._post(f"/models/{_part(name)}/rollback", {"alias": alias, "reason": reason})

    def delete_model(self, name: str, *, force: bool = False, reason: str = "") -> None:
        """Deletes all its versions, and with `force` its aliases too; else `model_in_use` while it has any.

        Like every `delete_…`, it does nothing the second time.
        """
        self._delete(f"/models/{_part(name)}", {"force": force, "reason": reason})

    def delete_version(self, name: str, version: int, *, reason: str = "") -> None:
        """`version_in_use` while an alias points at it."""
        self._delete(f"/models/{_part(name)}/versions/{version}", {"reason": reason})

    def delete_alias(self, name: str, alias: str, *, expected_version: int | None = None, reason: str = "") -> None:
        """The version stays. With `expected_version`, `alias_conflict` if the alias points elsewhere."""
        expected = {} if expected_version is None else {"expected_version": expected_version}
        self._delete(f"/models/{_part(name)}/aliases/{_part(alias)}", {"reason": reason} | expected)

    # Operations

    def info(self) -> Json:
        """Version, backbones and every effective limit of the service."""
        return self._get("/info")

    # HTTP

    def _list(self, path: str, parameters: Mapping[str, Any] | None = None) -> list[Json]:
        data: list[Json] = self._get(path, parameters)["data"]
        return data

    def _get(self, path: str, parameters: Mapping[str, Any] | None = None) -> Json:
        return self._send("GET", path, params=parameters)

    def _post(self, path: str, body: Json) -> Json:
        return self._send("POST", path, json=body)

    def _delete(self, path: str, parameters: Mapping[str, Any]) -> None:
        self._answered("DELETE", path, params=parameters)

    def _once_ready(self, path: str, body: Json) -> Json:
        """Posts again while the model is being loaded, as often as the service says."""
        ends = time.monotonic() + _LOADING_S
        while True:
            try:
                return self._post(path, body)
            except PolyheadError as error:
                pause_s = error.retry_after_s or 1.0
                if error.code != "model_not_ready" or time.monotonic() + pause_s > ends:
                    raise
                time.sleep(pause_s)

    def _send(self, method: str, path: str, **arguments: Any) -> Json:
        response = self._answered(method, path, **arguments)
        try:
            document: Json = response.json()
        except ValueError as error:
            raise PolyheadError(response.status_code, "not_json", f"{self.url} is not this service") from error
        return document

    def _answered(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """The answer, if it is a success."""
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TimeoutException as error:
            raise PolyheadError(_UNREACHABLE, "timeout", f"{self.url} did not answer in time") from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            detail = f"cannot reach {self.url} ({error}); is it running? `polyhead up` starts it"
            raise PolyheadError(_UNREACHABLE, "unreachable", detail) from error
        if not response.is_success:
            raise _refusal(response)
        return response


class _Waiting:
    """A deadline, a pause, and how long a service that is away has been away."""

    def __init__(self, timeout_s: float | None, poll_s: float) -> None:
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._started = time.monotonic()
        self._away_since: float | None = None

    def pause(self, what: str) -> None:
        if self._timeout_s is not None and time.monotonic() - self._started > self._timeout_s:
            raise TimeoutError(f"{what} has not ended within {self._timeout_s:g} s")
        time.sleep(self._poll_s)

    def keep_trying(self, call: Callable[..., T], *arguments: Any) -> T | None:
        """What `call` returns, or None while the service is away and may come back."""
        try:
            answer = call(*arguments)
        except PolyheadError as error:
            now = time.monotonic()
            self._away_since = self._away_since or now
            if error.status not in _AWAY or now - self._away_since > _PATIENCE_S:
                raise
            return None
        self._away_since = None
        return answer


def is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refusal(response: httpx.Response) -> PolyheadError:
    """Problem documents, and the shape of OpenAI's errors on the routes under /v1."""
    status = response.status_code
    try:
        document = response.json()
    except ValueError:
        document = None
    seconds = response.headers.get("Retry-After", "")
    retry_after_s = float(seconds) if seconds.isdecimal() else None
    if isinstance(document, dict) and isinstance(document.get("error"), dict):
        error = document["error"]
        return PolyheadError(status, str(error.get("code")), str(error.get("message")), retry_after_s=retry_after_s)
    if isinstance(document, dict) and "code" in document:
        detail, errors = document.get("detail", ""), document.get("errors", ())
        if "retry_after_ms" in document:
            retry_after_s = document["retry_after_ms"] / 1000
        return PolyheadError(status, document["code"], detail, errors, retry_after_s=retry_after_s)
    return PolyheadError(status, f"http_{status}", response.reason_phrase or "the answer is no problem document")


def _part(text: str) -> str:
    """One part of a path, whatever is in it."""
    return quote(text, safe="")
