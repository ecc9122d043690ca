"""What the processes share is away: a volume that is unmounted, an empty one at start, a database that freezes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.conftest import Home, Table
from tests.acceptance.processes import Client, problem, until
from tests.support.freezing_proxy import FreezingProxy


@contextmanager
def volume(source: Path, target: Path) -> Iterator[Callable[[bool], None]]:
    """`source` mounted at `target`; what is yielded mounts and unmounts it."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    for folder in (source, target):
        folder.mkdir(exist_ok=True)

    def mount(is_mounted: bool) -> None:
        places = [str(source), str(target)]
        command = ["mount", "--bind", *places] if is_mounted else ["umount", "--lazy", places[1]]
        subprocess.run(command, check=True, capture_output=True)

    try:
        mount(True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"nothing can be mounted here: {error.stderr.decode().strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)


@pytest.mark.slow
def test_a_volume_that_is_unmounted_takes_nothing_along(
    make_home: Callable[..., Home], words: tuple[Table, Table]
) -> None:
    home = make_home(is_new=True)
    with volume(home.folder / "volume", home.data) as mount, home.server() as server, Client(server.url) as client:
        server.wait_ready()
        before = client.upload(words[0].csv)["id"]
        mount(False)
        files = {"file": ("data.csv", words[0].csv)}
        problem(client.http.post("/datasets", files=files), 503, "storage_unavailable")
        problem(client.http.post("/finetune", json={"dataset": before, "register_as": "m"}), 503, "storage_unavailable")
        until(lambda: client.http.get("/readyz").status_code == 503, within_s=10, what="the probe to tell")
        assert "data directory" in client.http.get("/readyz").json()["reason"]
        assert client.http.post("/v1/embeddings", json={"model": "tiny", "input": "a good film"}).status_code == 200
        assert list(home.data.iterdir()) == [], "nothing is made in its place"
        mount(True)
        until(lambda: client.http.get("/readyz").status_code == 200, within_s=10, what="the service to be back")
        after = client.upload(words[0].csv)["id"]
        assert {item["id"] for item in client.get("/datasets")["data"]} == {before, after}


@pytest.mark.slow
def test_an_empty_volume_beside_a_database_that_knows_more_is_refused_at_start(
    make_home: Callable[..., Home], words: tuple[Table, Table], new_postgres_url: str
) -> None:
    home = make_home(POLYHEAD_DATABASE_URL=new_postgres_url)
    with home.server() as server, Client(server.wait_ready().url) as client:
        dataset = client.upload(words[0].csv)["id"]
    shutil.move(home.data, home.folder / "away")
    home.data.mkdir()
    for process in (home.server(), home.worker()):
        process.popen.wait(120)
        assert process.popen.returncode != 0 and "Mount its volume" in process.log()
        process.running.remove(process)
    assert list(home.data.iterdir()) == []
    home.data.rmdir()
    shutil.move(home.folder / "away", home.data)
    with home.server() as server, Client(server.wait_ready().url) as client:
        assert client.get(f"/datasets/{dataset}")["status"] == "ready"


def test_a_frozen_database_holds_no_request_and_the_probe_tells(
    make_home: Callable[..., Home], new_postgres_url: str
) -> None:
    with FreezingProxy(new_postgres_url) as proxy:
        home = make_home(POLYHEAD_DATABASE_URL=proxy.url)
        with home.server() as server, Client(server.wait_ready().url) as client:
            assert client.get("/readyz")["degraded"] == []
            proxy.freeze()
            for path in ("/models", "/datasets", "/finetune"):
                problem(client.http.get(path, timeout=20), 503, "database_unavailable")
            until(lambda: client.get("/readyz")["degraded"], within_s=10, what="the probe to tell")
            assert client.http.post("/v1/embeddings", json={"model": "tiny", "input": "a film"}).status_code == 200
            proxy.thaw()
            until(lambda: client.http.get("/models").status_code == 200, within_s=20, what="the database")
            until(lambda: not client.get("/readyz")["degraded"], within_s=20, what="the probe")
