"""The real processes, started and ended as an operator would, and a client of the service's own routes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from tests.support import openapi

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 120.0
JOB_S = 150.0
LEASE_S = 3.0
QUICK = {
    "POLYHEAD_DRAIN_DELAY_S": "0",
    "POLYHEAD_DRAIN_GRACE_S": "10",
    "POLYHEAD_REGISTRY_POLL_S": "0.1",
    "POLYHEAD_DATABASE_TIMEOUT_S": "1",
    "POLYHEAD_WORKER_METRICS_PORT": "0",
    "POLYHEAD_LEASE_S": str(LEASE_S),
    "POLYHEAD_HEARTBEAT_S": "0.5",
    "POLYHEAD_POLL_S": "0.1",
    "POLYHEAD_CANCEL_GRACE_S": "20",
    # Tiny models gain nothing from more, and threads that wait for each other on busy cores take ages.
    "POLYHEAD_THREADS": "1",
    # Measuring engines takes a processor for a minute; the test that is about it says so.
    "POLYHEAD_ENGINE": "torch",
    "POLYHEAD_CPU_THREADS": "1",
    # It imports torch for some seconds of a processor; the service that all share has one.
    "POLYHEAD_SPARE_PROCESS": "false",
}
Result = TypeVar("Result")


class Process:
    """`python -m <module>` of the code in `checkout`, in a session of its own, its output in a file."""

    running: list[Process] = []  # noqa: RUF012 (every test's failure report looks here)

    def __init__(
        self,
        module: str,
        settings: Mapping[str, str],
        log_file: Path,
        *,
        checkout: Path = REPOSITORY,
        cwd: Path | None = None,
    ) -> None:
        self.name, self.log_file = module, log_file
        with log_file.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=cwd or checkout,
                env=environment({"PYTHONPATH": str(checkout), **settings}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running.append(self)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def is_alive(self) -> bool:
        return self.popen.poll() is None

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def terminate(self, *, within_s: float = 40.0) -> int:
        """SIGTERM, then the exit code."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(within_s)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def close(self) -> None:
        """Ends what a test left running. The exit code must be 0, unless the test killed it itself."""
        try:
            if self.is_alive:
                assert self.terminate() == 0, f"{self.name} ended with {self.popen.returncode}:\n{self.log()[-4000:]}"
        finally:
            if self.is_alive:
                self.kill()
            self.running.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Process):
    """The serving process on a free port. `module` may be one that starts it with something changed."""

    def __init__(self, settings: Mapping[str, str], log_file: Path, *, module: str = "service", **where: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        super().__init__(module, {**settings, "POLYHEAD_PORT": str(self.port)}, log_file, **where)

    def wait_ready(self) -> Server:
        def is_ready() -> bool:
            assert self.is_alive, f"the server ended with {self.popen.returncode}:\n{self.log()[-4000:]}"
            try:
                return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
            except httpx.TransportError:
                return False

        until(is_ready, within_s=START_S, what="the server to be ready", every_s=0.1)
        return self


class Worker(Process):
    """The fine-tune worker."""

    def __init__(self, settings: Mapping[str, str], log_file: Path, **where: Path) -> None:
        super().__init__("finetune", settings, log_file, **where)

    def wait_ready(self) -> Worker:
        def is_ready() -> bool:
            assert self.is_alive, f"the worker ended with {self.popen.returncode}:\n{self.log()[-4000:]}"
            return "worker ready" in self.log()

        until(is_ready, within_s=START_S, what="the worker to be ready", every_s=0.1)
        return self

    def training_child(self) -> int:
        """The process id of the run in progress."""
        return until(
            lambda: next(iter(children(self.pid, "finetune.worker.child")), 0), within_s=30, what="a training process"
        )


class Client:
    """The native routes over HTTP, every answer held to the OpenAPI document. `http` is there for what has no method
    here; a server of another release `is_ours` not, and may answer otherwise."""

    def __init__(self, url: str, *, key: str | None = None, is_ours: bool = True) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = url
        hooks = {"response": [openapi.check]} if is_ours else {}
        self.http = httpx.Client(base_url=url, timeout=60, headers=headers, event_hooks=hooks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def upload(self, content: bytes | str, filename: str = "data.csv") -> dict[str, Any]:
        response = self.http.post("/datasets", files={"file": (filename, content)})
        assert response.status_code == 201, response.text
        dataset: dict[str, Any] = response.json()
        return until(
            lambda: self._settled(dataset["id"]), within_s=60, what="the check of the dataset"
        )  # at once, unless the machine is very busy

    def _settled(self, dataset_id: str) -> dict[str, Any] | None:
        dataset = self.get(f"/datasets/{dataset_id}")
        return dataset if dataset["status"] in {"ready", "invalid"} else None

    def get(self, path: str, **params: Any) -> Any:
        response = self.http.get(path, params=params)
        assert response.status_code == 200, response.text
        return response.json()

    def finetune(self, dataset: str, register_as: str, *, test: str | None = None, **hyperparameters: Any) -> str:
        """Submits a job on the backbone `tiny` (or the one given) and returns its id."""
        backbone = hyperparameters.pop("backbone", "tiny")
        body = {
            "dataset": dataset,
            "test_dataset": test,
            "backbone": backbone,
            "register_as": register_as,
            "hyperparameters": hyperparameters,
        }
        response = self.http.post("/finetune", json=body)
        assert response.status_code == 202, response.text
        assert response.headers["location"] == f"/finetune/{response.json()['id']}"
        return str(response.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.get(f"/finetune/{job_id}")
        return job

    def wait(self, job_id: str, *, status: str = "succeeded", within_s: float = JOB_S) -> dict[str, Any]:
        """The job once it has ended, which must be in `status`."""

        def ended() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["status"] in {"succeeded", "failed", "cancelled"} else None

        job = until(ended, within_s=within_s, what=f"the end of {job_id}", every_s=0.05)
        assert job["status"] == status, f"{job['status']}: {job['error']}"
        return job

    def train(self, dataset: str, register_as: str, **options: Any) -> dict[str, Any]:
        return self.wait(self.finetune(dataset, register_as, **options))

    def events(self, job_id: str, *, after: int = 0) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        while True:
            page = self.get(f"/finetune/{job_id}/events", after=after, limit=1000)
            events += page["data"]
            if not page["has_more"]:
                return events
            after = events[-1]["seq"]

    def wait_event(self, job_id: str, type_: str, *, after: int = 0, within_s: float = 90.0) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            return next((event for event in self.events(job_id, after=after) if event["type"] == type_), None)

        return until(found, within_s=within_s, what=f"the event {type_}", every_s=0.03)

    def predict(self, model: str, inputs: list[str], **parameters: Any) -> httpx.Response:
        body = {"model": model, "inputs": inputs, "parameters": parameters}
        return self.http.post("/predict", json=body)

    def labels(self, model: str, inputs: list[str]) -> list[str]:
        """The answers for `inputs`, in requests of 100."""
        found: list[str] = []
        for start in range(0, len(inputs), 100):
            response = self.predict(model, inputs[start : start + 100])
            assert response.status_code == 200, response.text
            found += [prediction["label"] for prediction in response.json()["predictions"]]
        return found

    def wait_served(self, model: str, text: str, *, within_s: float) -> dict[str, Any]:
        """The first answer of a model that may still be loading."""

        def answer() -> dict[str, Any] | None:
            response = self.predict(model, [text])
            assert response.status_code in {200, 404, 503}, response.text
            return response.json() if response.status_code == 200 else None

        return until(answer, within_s=within_s, what=f"an answer of {model}", every_s=0.05)

    def versions(self, model: str) -> list[dict[str, Any]]:
        versions: list[dict[str, Any]] = self.get(f"/models/{model}/versions")["data"]
        return versions

    def move_alias(self, model: str, version: int, expected: int | None, alias: str = "champion") -> httpx.Response:
        body = {"version": version, "expected_version": expected, "reason": "a test"}
        return self.http.put(f"/models/{model}/aliases/{alias}", json=body)


def until(look: Callable[[], Result | None], *, within_s: float, what: str, every_s: float = 0.05) -> Result:
    """The first true value of `look`. Fails when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {within_s:g} s for {what}"
        time.sleep(every_s)
    return found


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Ours without any polyhead setting, then `settings`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("POLYHEAD_")}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | dict(settings)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def children(parent: int, module: str) -> Iterator[int]:
    """Living children of `parent` that run `python -m module`, from /proc."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended while we looked
        if int(ppid) == parent and state != "Z" and module.encode() in command:
            yield int(folder.name)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The document of a refusal, which must be one: RFC 9457 with our members."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["code"] == code, document
    assert document["status"] == status
    assert document["request_id"] == response.headers["x-request-id"]
    assert document["detail"]
    assert "Traceback" not in response.text
    return document
