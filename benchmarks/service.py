"""Our own processes for a measurement, the few calls that measurements need, and what figures are written with."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.processes import ROOT, Process, free_port

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "onnxruntime", "openvino", "transformers", "tokenizers", "uvicorn", "fastapi")
_PRINT_VERSIONS = """
import importlib.metadata, json, sys
installed = {found.name.lower(): found.version for found in importlib.metadata.distributions()}
print(json.dumps({name: installed[name] for name in sys.argv[1:] if name in installed}))
"""
_GEMM_SIZE = 2048
_CHOICE_S = 900.0


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

    def version(self, model: str, number: int) -> dict[str, Any]:
        return dict(self.http.get(f"/models/{model}/versions/{number}").raise_for_status().json())

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

    def chosen_engine(self) -> str:
        """Waits until the server has measured its engines, as it has long before most jobs: its choice is theirs."""
        ends = time.monotonic() + _CHOICE_S
        while time.monotonic() < ends:
            models = self.http.get("/models").raise_for_status().json()["data"]
            if reports := [report for model in models for report in model.get("engine_reports", [])]:
                return str(reports[0]["chosen"])
            time.sleep(1)
        raise SystemExit("the server chose no engine")

    def metric(self, name: str) -> dict[str, float]:
        """The values of `polyhead_<name>` by their labels, as the exposition format writes them."""
        values = {}
        for line in self.http.get("/metrics").raise_for_status().text.splitlines():
            series, _, value = line.rpartition(" ")
            found, _, labels = series.partition("{")
            if found == f"polyhead_{name}":
                values[labels.rstrip("}")] = float(value)
        return values


def own_environment(data_dir: Path, port: int, settings: Mapping[str, str]) -> dict[str, str]:
    """`settings` by their names in lower case, as in `engine`."""
    return {
        "POLYHEAD_DATA_DIR": str(data_dir),
        "POLYHEAD_PORT": str(port),
        "POLYHEAD_DRAIN_DELAY_S": "0",
        **{f"POLYHEAD_{name.upper()}": value for name, value in settings.items()},
    }


@contextlib.contextmanager
def running(**settings: str) -> Iterator[Service]:
    """Server and worker on a free port with a data folder of their own."""
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as name:
        folder, port = Path(name), free_port()
        environment = own_environment(folder / "data", port, settings) | {"POLYHEAD_WORKER_METRICS_PORT": "0"}
        processes = [
            Process([sys.executable, "-m", module], environment=environment, log=folder / "log")
            for module in ("service", "finetune")
        ]
        try:
            service = Service(f"http://127.0.0.1:{port}")
            wait_until_ready(service, processes)
            yield service
            service.http.close()
        finally:
            for process in processes:
                process.stop()


def wait_until_ready(service: Service, processes: Sequence[Process]) -> None:
    for _ in range(1200):
        with contextlib.suppress(httpx.TransportError):
            if service.http.get("/readyz").status_code == 200:
                return
        if any(process.has_ended for process in processes):
            break
        time.sleep(0.1)
    raise SystemExit(f"the service did not become ready:\n{processes[0].tail()}")


def machine() -> dict[str, Any]:
    """What a figure depends on. The products are measured, so nothing else should run."""
    cpu = Path("/proc/cpuinfo").read_text()
    flags = next(line for line in cpu.splitlines() if line.startswith("flags")).split()
    model = next(line for line in cpu.splitlines() if line.startswith("model name"))
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": model.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in known if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "governor": _governor(),
        "python": sys.version.split()[0],
        "gemm_gflops": {precision: _gemm_gflops(precision) for precision in ("float32", "bfloat16")},
    }


def write_results(name: str, document: dict[str, Any]) -> Path:
    target = RESULTS / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": _revision(),
        "machine": machine(),
        "versions": versions(),
    }
    target.write_text(_to_json({**about, **document}))
    print(f"wrote {target}", flush=True)
    return target


def versions(packages: Sequence[str] = _PACKAGES, *, python: str = sys.executable) -> dict[str, str]:
    """Versions installed in the environment of `python`; what is not installed is left out."""
    done = subprocess.run([python, "-c", _PRINT_VERSIONS, *packages], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def _to_json(document: dict[str, Any]) -> str:
    """Indented, but a line for each of `rows`: a result is read by people and compared line by line."""
    rows = document.pop("rows", None)
    text = json.dumps(document, indent=1)
    if rows is not None:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        text = f'{text.removesuffix("}").rstrip()},\n "rows": [\n  {lines}\n ]\n}}'
    return text + "\n"


def _revision() -> str:
    """The commit of this checkout, with a plus where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else None


def _gemm_gflops(precision: str) -> float:
    """The best of five products of two square matrices: what the arithmetic could give at most."""
    import torch

    a = torch.ones(_GEMM_SIZE, _GEMM_SIZE, dtype=getattr(torch, precision))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return round(2 * _GEMM_SIZE**3 / best / 1e9)
