"""A hub that takes connections and says nothing: an import from it is refused in bounded time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

LOCATE = """
import time
import huggingface_hub
from modeling.backbone import locate
from modeling.errors import BackboneUnavailable
started = time.monotonic()
try:
    locate(f"hub:org/name@{'a' * 40}", offline=False)
except BackboneUnavailable:
    print(time.monotonic() - started)
"""


def test_a_hub_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        endpoint = f"http://127.0.0.1:{hole.getsockname()[1]}"
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        found = subprocess.run(
            [sys.executable, "-c", LOCATE], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
    assert float(found.stdout) < 10
