"""Servers by name: ours with any settings or from any checkout, and the peers. One takes processor time at a time.

All run while a measurement lasts, and all but the one that is driven are paused. So rounds can go A B A B within
seconds, and no server's background work falls into another's figures.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.peers import PEERS
from benchmarks.processes import ROOT, Process, free_port
from benchmarks.service import Service, own_environment, versions, wait_until_ready

OURS = "polyhead"
BACKBONE = "minilm"
# The peers queue without bound; so do we where they are compared under a load that closes its own loop.
OPEN_ADMISSION = {"max_queue_delay_ms": "120000", "max_concurrent_requests": "8192", "request_timeout_s": "120"}
_MIN_COSINE = 0.99
_PROBES = ("a short text", "The company said it expects a profit for the third quarter. " * 60)


@dataclass(frozen=True, slots=True)
class Spec:
    """What the command line asks for: `naive`, `polyhead`, `polyhead:engine=onnx,threads=1`, `polyhead@../other`."""

    label: str
    kind: str
    settings: Mapping[str, str] = field(default_factory=dict)
    checkout: Path = ROOT


@dataclass(frozen=True, slots=True)
class Server:
    spec: Spec
    base_url: str
    path: str
    process: Process

    @property
    def label(self) -> str:
        return self.spec.label

    @property
    def is_ours(self) -> bool:
        return self.spec.kind == OURS

    @property
    def url(self) -> str:
        """Where every server takes `{"input": [...], "model": "minilm"}`."""
        return self.base_url + self.path

    @property
    def predict_url(self) -> str:
        """Of a server of ours."""
        return f"{self.base_url}/predict"

    def embed(self, texts: Sequence[str]) -> Any:
        """float[texts, hidden]. Raises `httpx.HTTPError`."""
        response = httpx.post(self.url, json={"input": list(texts), "model": BACKBONE}, timeout=30).raise_for_status()
        return np.asarray([row["embedding"] for row in response.json()["data"]])

    def settle(self) -> None:
        """Returns once nothing is under way."""
        self.process.wait_until_idle(quiet_s=0.3)

    @property
    def engine(self) -> str:
        """What runs the backbone now, by `GET /info`."""
        return str(Service(self.base_url).http.get("/info").json()["backbones"][BACKBONE]["engine"])

    def describe(self, environments: Path) -> dict[str, Any]:
        """For the results: how it was started and what it is made of."""
        if self.is_ours:
            info = Service(self.base_url).http.get("/info").raise_for_status().json()
            return {"settings": dict(self.spec.settings), "info": info}
        peer = PEERS[self.spec.kind]
        python = peer.environment(environments) / "bin" / "python"
        command = [word.rpartition("/")[2] for word in self.process.command]  # folders are this machine's alone
        return {"command": command, "versions": versions(peer.packages, python=str(python))}


def parse_spec(text: str) -> Spec:
    """Exits where the name or a setting is malformed."""
    name, _, settings = text.partition(":")
    kind, _, checkout = name.partition("@")
    if kind != OURS and (kind not in PEERS or settings or checkout):
        raise SystemExit(f"{text!r}: write {OURS}[@CHECKOUT][:SETTING=VALUE,…] or one of {', '.join(PEERS)}")
    pairs = [pair.partition("=") for pair in settings.split(",") if pair]
    if not all(key and value for key, _, value in pairs):
        raise SystemExit(f"{text!r}: write settings as engine=onnx,threads=1")
    folder = Path(checkout).resolve() if checkout else ROOT
    return Spec(text, kind, {key: value for key, _, value in pairs}, folder)


def start(
    spec: Spec,
    folder: Path,
    environments: Path,
    *,
    settings: Mapping[str, str] | None = None,
    data_dir: Path | None = None,
) -> Server:
    """Starts a server and returns at once. `settings` are ours unless the spec says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "log"
    base_url = f"http://127.0.0.1:{port}"
    if spec.kind != OURS:
        command = PEERS[spec.kind].command(environments, port)
        # Their usage statistics would leave the machine.
        return Server(spec, base_url, "/embeddings", Process(command, log=log, environment={"DO_NOT_TRACK": "1"}))
    environment = own_environment(data_dir or folder / "data", port, {**(settings or {}), **spec.settings})
    environment["PYTHONPATH"] = str(spec.checkout)
    process = Process([sys.executable, "-m", "service"], log=log, environment=environment, folder=spec.checkout)
    return Server(spec, base_url, "/v1/embeddings", process)


def wait_for_answer(server: Server, *, timeout_s: float = 300.0, pause_s: float = 0.02) -> None:
    """Returns with the first answer. Exits where the server ends or takes too long."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not server.process.has_ended:
        with contextlib.suppress(httpx.HTTPError):
            server.embed(_PROBES[:1])
            return
        time.sleep(pause_s)
    raise SystemExit(f"{server.label} gave no answer:\n{server.process.tail()}")


@contextlib.contextmanager
def started(
    specs: Sequence[Spec], environments: Path, *, settings: Mapping[str, str] | None = None
) -> Iterator[list[Server]]:
    """All servers, settled, shown to compute the same, and paused."""
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder, contextlib.ExitStack() as stack:
        servers = []
        for number, spec in enumerate(specs):
            server = start(spec, Path(folder, str(number)), environments, settings=settings)
            stack.callback(server.process.stop)
            wait_for_answer(server)
            server.process.wait_until_idle()
            servers.append(server)
            print(f"{server.label} is ready", flush=True)
        require_same_answers(servers)
        for server in servers:
            server.process.pause()
        yield servers


@contextlib.contextmanager
def started_with_data(spec: Spec, data_dir: Path, *, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """One server of ours over a data folder that was prepared, settled and with its models loaded."""
    if spec.kind != OURS:
        raise SystemExit(f"{spec.label}: only {OURS} can serve these models")
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        server = start(spec, Path(folder), Path(), settings=settings, data_dir=data_dir)
        try:
            wait_until_ready(Service(server.base_url), [server.process])
            server.process.wait_until_idle()
            yield server
        finally:
            server.process.stop()


def require_same_answers(servers: Sequence[Server]) -> None:
    """Exits where a server's vectors are not the first one's: another model, or a text cut elsewhere."""
    wanted = servers[0].embed(_PROBES)
    for server in servers[1:]:
        got = server.embed(_PROBES)
        cosine = ((wanted * got).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(got, axis=1)).min()
        if not cosine >= _MIN_COSINE:
            raise SystemExit(f"{server.label} computes something else than {servers[0].label}: cosine {cosine:.4f}")


def describe(servers: Sequence[Server], environments: Path) -> dict[str, Any]:
    described = {}
    for server in servers:
        with server.process.running():
            described[server.label] = server.describe(environments)
    return described


def rounds(servers: Sequence[Server], repeats: int) -> Iterator[tuple[int, Server]]:
    """A B C A B C …: each server in turn, resumed while it is its turn, and idle again before the next has its."""
    for number in range(repeats):
        for server in servers:
            with server.process.running():
                yield number, server
                server.settle()
