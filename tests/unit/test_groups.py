"""Parallel processes of a test run share no file's tests: each would build anew what the file builds once."""

from __future__ import annotations

import os

import pytest


def test_a_file_belongs_to_one_process(request: pytest.FixtureRequest) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ or not request.config.getvalue("loadgroup"):
        pytest.skip("in one process, or distributed otherwise")
    assert request.node.nodeid.endswith("@unit/test_groups.py"), "pytest and pytest-xdist do not fit each other"
