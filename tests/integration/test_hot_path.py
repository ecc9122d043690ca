"""How many of the project's files one `/predict` passes through: what a reader opens to follow a request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import traced_predict

ROOT = Path(__file__).resolve().parents[2]
# What `tests/support/traced_predict.py` counted on commit 32b24a3, where the path was first measured.
BEFORE = {"a LoRA version's label": 34, "a backbone's embedding": 33}
SHARE = 0.65


@pytest.fixture(scope="module")
def entered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    ended = subprocess.run(
        [sys.executable, "-P", traced_predict.__file__, str(tmp_path_factory.mktemp("data"))],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, list[str]] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize("request_kind", BEFORE)
def test_one_request_enters_few_files(entered: dict[str, list[str]], request_kind: str) -> None:
    files = entered[request_kind]
    assert len(files) <= SHARE * BEFORE[request_kind], "\n".join(files)


def test_the_whole_path_is_seen(entered: dict[str, list[str]]) -> None:
    """From the protocol over the preprocessor's and the engine's threads to the answer."""
    for files in entered.values():
        assert {"service/http_limits.py", "service/inference/preprocessing.py", "modeling/engines/torch.py"} <= set(
            files
        )
