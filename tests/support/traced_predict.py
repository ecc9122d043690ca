"""`python -P traced_predict.py FOLDER`: the project files that one request enters, as JSON, over all threads.

Runs the real server on a random backbone in FOLDER, warm, with a LoRA version. A file counts if each of several equal
requests enters it, so what the server does beside them does not. Runs on any checkout that PYTHONPATH names.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGES = ("service", "finetune", "modeling", "model_registry")
REQUESTS = 5
BODIES: dict[str, dict[str, Any]] = {
    "a LoRA version's label": {"model": "m", "inputs": "a good film"},
    "a backbone's embedding": {
        "model": "tiny",
        "inputs": "a good film",
        "parameters": {"return_embedding": True},
    },
}


class Trace:
    """A profile function for every thread. Keeps the files whose functions are called while it records."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.is_recording = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if self.is_recording and event == "call":
            self.files.add(frame.f_code.co_filename)


def project_files(files: set[str], root: Path) -> set[str]:
    """Relative to the root, those of the four packages alone."""
    inside = {str(Path(file).relative_to(root)) for file in files if Path(file).is_relative_to(root)}
    return {file for file in inside if file.split("/")[0] in PACKAGES}


def publish(folder: Path) -> Path:
    """A backbone and a promoted LoRA version of it in `folder`; returns the checkpoint."""
    from model_registry.db import Database
    from model_registry.migrations import migrate
    from model_registry.registry import Registry
    from model_registry.store import FileStore
    from modeling.backbone import ingest
    from modeling.encoder import load_encoder
    from modeling.multi_lora import Routing, route
    from modeling.networks import NETWORKS
    from modeling.testing import write_tiny_checkpoint
    from tests.support.adapters import random_adapter
    from tests.support.world import World

    database = Database(f"sqlite:///{folder / 'polyhead.db'}")
    migrate(database)
    store = FileStore(folder / "store")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint")
    world = World(Registry(database), store, ingest(store, checkpoint, name="tiny", source="file:tiny"), folder)
    layout = route(load_encoder(world.backbone.folder), Routing(), NETWORKS["text"])
    world.publish("m", promote=True, adapter=random_adapter(layout, rank=4, seed=1))
    database.dispose()
    return checkpoint


def ask(port: int, body: dict[str, Any]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/predict", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        answered = response.read()
        assert response.status == 200, answered
    finally:
        connection.close()


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def count(port: int, trace: Trace, root: Path) -> dict[str, list[str]]:
    until = time.monotonic() + 120
    while not is_ready(port):
        assert time.monotonic() < until, "the server is not ready"
        time.sleep(0.1)
    found = {}
    for name, body in BODIES.items():
        for _ in range(3):
            ask(port, body)
        entered = []
        for _ in range(REQUESTS):
            trace.files.clear()
            trace.is_recording = True
            ask(port, body)
            trace.is_recording = False
            entered.append(project_files(trace.files.copy(), root))
        found[name] = sorted(set.intersection(*entered))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    checkpoint = publish(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "POLYHEAD_DATA_DIR": str(folder),
        "POLYHEAD_BACKBONES": json.dumps({"tiny": f"file:{checkpoint}"}),
        "POLYHEAD_PORT": str(port),
        "POLYHEAD_ENGINE": "torch",
        "POLYHEAD_THREADS": "1",
        "POLYHEAD_DRAIN_DELAY_S": "0",
        "POLYHEAD_LOG_LEVEL": "error",
    }
    import service.__main__ as server

    trace = Trace()
    found: dict[str, list[str]] = {}

    def drive() -> None:
        try:
            found.update(count(port, trace, Path(server.__file__).parents[1]))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.setprofile(trace)  # for the threads that start from now on
    sys.setprofile(trace)
    threading.Thread(target=drive).start()
    server.main()
    sys.setprofile(None)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
