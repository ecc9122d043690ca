"""Starts the real processes for a measurement, and the few calls that measurements need."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx


class Service:
    """A running server and worker, spoken to as a user would."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)

    def upload(self, path: Path) -> str:
        with path.open("rb") as file:
            response = self.http.post("/datasets", files={"file": (path.name, file)}).raise_for_status()
        while (record := response.json())["status"] not in {"ready", "invalid"}:
            time.sleep(0.5)
            response = self.http.get(f"/datasets/{record['id']}").raise_for_status()
        if record["status"] == "invalid":
            raise SystemExit(f"{path.name}: {record['errors']}")
        return str(record["id"])

    def finetune(self, **request: Any) -> dict[str, Any]:
        """Starts a job and waits for its end. Exits where it fails."""
        job = self.http.post("/finetune", json=request).raise_for_status().json()
        while job["status"] not in {"succeeded", "failed", "cancelled"}:
            time.sleep(0.2)
            job = self.http.get(f"/finetune/{job['id']}").raise_for_status().json()
        if job["status"] != "succeeded":
            raise SystemExit(f"{job['id']}: {job['error']}")
        return dict(job)

    def evaluation(self, job: str) -> dict[str, Any]:
        return dict(self.http.get(f"/finetune/{job}/evaluation").raise_for_status().json())

    def answers(self, model: str, texts: Sequence[str], *, batch: int = 64) -> list[str]:
        """Labels by `POST /predict`, in the order of `texts`; waits while the model is still loading."""
        labels: list[str] = []
        for start in range(0, len(texts), batch):
            labels += self._predict(model, list(texts[start : start + batch]))
        return labels

    def _predict(self, model: str, texts: list[str]) -> list[str]:
        for _ in range(1200):
            response = self.http.post("/predict", json={"model": model, "inputs": texts, "parameters": {"top_k": 1}})
            if response.status_code not in {404, 429, 503}:
                break
            time.sleep(0.05)
        predictions = response.raise_for_status().json()["predictions"]
        return [row["label"] for row in predictions]


@contextlib.contextmanager
def running(**settings: str) -> Iterator[Service]:
    """Server and worker on a free port with a data folder of their own."""
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        port = _free_port()
        environment = os.environ | {
            "POLYHEAD_DATA_DIR": folder, "POLYHEAD_PORT": str(port), "POLYHEAD_WORKER_METRICS_PORT": "0",
            "POLYHEAD_DRAIN_DELAY_S": "0", **settings,
        }  # fmt: skip
        with Path(folder, "log").open("w") as log:
            processes = [
                subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=log, stderr=log)
                for module in ("service", "finetune")
            ]
            try:
                service = Service(f"http://127.0.0.1:{port}")
                _wait_until_ready(service, processes, Path(folder, "log"))
                yield service
                service.http.close()
            finally:
                for process in processes:
                    process.send_signal(signal.SIGTERM)
                for process in processes:
                    process.wait(60)


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    cpu = Path("/proc/cpuinfo").read_text()
    flags = next(line for line in cpu.splitlines() if line.startswith("flags")).split()
    model = next(line for line in cpu.splitlines() if line.startswith("model name"))
    return {
        "cpu": model.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags],
        "python": sys.version.split()[0],
    }


def write_results(name: str, document: dict[str, Any]) -> Path:
    target = Path(__file__).parent / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": machine(), **document}, indent=1) + "\n")
    return target


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(service: Service, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
    for _ in range(1200):
        with contextlib.suppress(httpx.TransportError):
            if service.http.get("/readyz").status_code == 200:
                return
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.25)
    raise SystemExit(f"the service did not become ready:\n{log.read_text()[-3000:]}")
