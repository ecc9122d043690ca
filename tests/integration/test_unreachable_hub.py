"""A hub that takes connections and says nothing: an import from it is refused in bounded time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LOCATE = """
import time
from huggingface_hub.utils import _http
from modeling import backbone
from modeling.backbone import locate
from modeling.errors import BackboneUnavailable
backbone._HUB_IS_SILENT_S = 0.5
_http.time.sleep = lambda _: None  # between its attempts
started = time.monotonic()
try:
    locate(f"hub:org/name@{'a' * 40}", offline=False)
except BackboneUnavailable:
    print(time.monotonic() - started)
"""


def seconds_until_refused(endpoint: str, cache: Path) -> float:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache)}
    command = [sys.executable, "-c", LOCATE]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return float(found.stdout)


def test_a_hub_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        assert seconds_until_refused(f"http://127.0.0.1:{hole.getsockname()[1]}", tmp_path) < 10


def test_so_is_one_that_falls_silent_after_its_first_answer(tmp_path: Path) -> None:
    def answer_once() -> None:
        connection, _ = hole.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        kept.append(connection)

    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as hole, ThreadPoolExecutor(1) as thread:
        hole.settimeout(60)
        thread.submit(answer_once)
        assert seconds_until_refused(f"http://127.0.0.1:{hole.getsockname()[1]}", tmp_path) < 60
    for connection in kept:
        connection.close()
