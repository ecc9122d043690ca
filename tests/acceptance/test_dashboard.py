"""Every query of the dashboard returns data when a real Prometheus scrapes the running processes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import Home
from tests.acceptance.processes import REPOSITORY, Client, free_port, until

PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus (Debian's package prometheus) is not installed")


def queries() -> list[str]:
    dashboard = json.loads((REPOSITORY / "deploy" / "grafana" / "polyhead.json").read_text())

    def panels(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for panel in found:
            yield panel
            yield from panels(panel.get("panels", []))

    expressions = [target["expr"] for panel in panels(dashboard["panels"]) for target in panel.get("targets", [])]
    return [text.replace("$__rate_interval", "20s").replace("$model", ".*") for text in expressions]


@pytest.mark.slow
def test_every_query_returns_data(make_home: Callable[..., Home], tmp_path: Path, words: Any) -> None:
    assert PROMETHEUS is not None
    worker_port, port = free_port(), free_port()
    home = make_home(POLYHEAD_WORKER_METRICS_PORT=str(worker_port))
    with home.server() as server, home.worker() as worker:
        server.wait_ready()
        worker.wait_ready()
        config = (REPOSITORY / "deploy" / "prometheus" / "prometheus.yml").read_text()
        config = config.replace("127.0.0.1:8000", server.url.removeprefix("http://"))
        config = config.replace("127.0.0.1:9109", f"127.0.0.1:{worker_port}").replace("15s", "1s")
        (tmp_path / "prometheus.yml").write_text(config)
        shutil.copy(REPOSITORY / "deploy" / "prometheus" / "alerts.yml", tmp_path)
        with (tmp_path / "prometheus.log").open("w") as log:
            prometheus = subprocess.Popen(
                [
                    PROMETHEUS,
                    f"--config.file={tmp_path}/prometheus.yml",
                    f"--storage.tsdb.path={tmp_path}/data",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            with Client(server.url) as client, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as asked:
                dataset = client.upload(words[0].csv)["id"]
                client.train(dataset, "watched", method="baseline")
                client.wait_served("watched", "a good film", within_s=10)

                def unanswered() -> list[str]:
                    client.predict("watched", ["a good film"])
                    return [query for query in queries() if not _has_data(asked, query)]

                until(lambda: not unanswered(), within_s=60, what="data for every query", every_s=1.0)
        finally:
            prometheus.terminate()
            prometheus.wait(20)


def _has_data(asked: httpx.Client, query: str) -> bool:
    try:
        answer = asked.get("/api/v1/query", params={"query": query}).json()
    except httpx.TransportError:
        return False
    assert answer["status"] == "success", f"{query}: {answer}"
    return bool(answer["data"]["result"])
