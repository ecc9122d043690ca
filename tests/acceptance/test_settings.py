"""Settings that are not safe or not known: the process refuses to start and says why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.acceptance.conftest import Home
from tests.acceptance.processes import REPOSITORY, environment


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"POLYHEAD_HOST": "0.0.0.0"}, "api_keys must be set"),
        ({"POLYHEAD_HOST": "::"}, "api_keys must be set"),
        ({"POLYHEAD_DRAIN_DELY_S": "5"}, "POLYHEAD_DRAIN_DELY_S: unknown setting"),
        ({"POLYHEAD_PORT": "many"}, "POLYHEAD_PORT: Input should be a valid integer"),
        ({"POLYHEAD_MAX_BATCH_ROWS": "0"}, "POLYHEAD_MAX_BATCH_ROWS: "),
        ({"POLYHEAD_DEFAULT_BACKBONE": "other"}, "default_backbone 'other' is not among backbones"),
        ({"POLYHEAD_API_KEYS": json.dumps([{"name": "a", "sha256": "secret", "scopes": []}])}, "SHA256: "),
    ],
)
def test_the_server_refuses_to_start(make_home: Callable[..., Home], settings: dict[str, str], complaint: str) -> None:
    home = make_home(is_new=True, **settings)
    ended = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=REPOSITORY,
        env=environment(home.settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not home.data.exists()
