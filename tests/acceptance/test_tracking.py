"""A worker whose MLflow server is gone: the job ends as it would, and says that it was not recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.acceptance.conftest import Home, Table
from tests.acceptance.processes import Client, free_port


@pytest.mark.slow
def test_a_job_succeeds_without_its_tracking_server_and_says_so(
    make_home: Callable[..., Home], words: tuple[Table, Table]
) -> None:
    home = make_home()
    uri = f"http://127.0.0.1:{free_port()}"
    with home.server() as server, home.worker(POLYHEAD_MLFLOW_TRACKING_URI=uri) as worker:
        server.wait_ready()
        worker.wait_ready()
        with Client(server.url) as client:
            dataset = client.upload(words[0].csv)["id"]
            job = client.train(dataset, "m", method="baseline")
            warned = client.wait_event(job["id"], "data_warning", after=0)
            while warned["data"].get("code") != "tracking_failed":
                warned = client.wait_event(job["id"], "data_warning", after=warned["seq"])
            assert "ConnectError" in warned["message"]
            assert client.job(job["id"])["status"] == "succeeded"
            client.wait_served("m", "a good film", within_s=20)
            assert client.train(dataset, "m", method="baseline")["status"] == "succeeded"
