"""Uploads over a real server: broken connections, archives, what report and preview answer."""

from __future__ import annotations

import io
import os
import shutil
import socket
import struct
import tarfile
import time
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from service.dataset_intake import _remove_abandoned
from tests.acceptance.conftest import Service
from tests.acceptance.processes import until

BOUNDARY = b"----words"
HEAD = (
    b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n'
    b"Content-Type: text/csv\r\n\r\ntext,label\n"
)


def request_head(service: Service, length: int) -> bytes:
    return (
        f"POST /datasets HTTP/1.1\r\nHost: {service.server.url.removeprefix('http://')}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def datasets_folder(service: Service) -> Path:
    return service.home.data / "datasets"


def left(service: Service) -> tuple[set[str], set[str]]:
    """Everything below the datasets' folder, and every record."""
    walked = os.walk(datasets_folder(service))  # unlike `rglob` it bears with what goes meanwhile
    files = {f"{folder}/{name}" for folder, *names in walked for name in chain(*names)}
    return files, {record["id"] for record in service.client.get("/datasets", limit=100)["data"]}


@pytest.mark.parametrize("ending", ["closed", "reset"])
@pytest.mark.parametrize("sent", [0, 3_000_000])
def test_a_broken_connection_leaves_nothing_behind(lone: Service, ending: str, sent: int) -> None:
    lone.client.upload("text,label\na,b\n")
    before = left(lone)
    connection = socket.create_connection(("127.0.0.1", lone.server.port), timeout=30)
    connection.sendall(request_head(lone, 50_000_000) + HEAD + b"some words,label\n" * (sent // 17))
    is_receiving = until(lambda: list(datasets_folder(lone).glob(".incoming-*/raw")), within_s=30, what="the upload")
    assert is_receiving, "otherwise nothing was there to be left behind"
    if ending == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: _is_nothing_new(left(lone), before), within_s=30, what="the upload to be cleared away")


def _is_nothing_new(now: tuple[set[str], set[str]], before: tuple[set[str], set[str]]) -> bool:
    """What the upload before left to clear away may have gone meanwhile."""
    return now[0] <= before[0] and now[1] == before[1]


def test_what_a_dead_server_was_receiving_is_removed_and_what_arrives_is_not(tmp_path: Path) -> None:
    for name in (".incoming-old", ".incoming-new", "default"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "raw").write_bytes(b"text")
    long_ago = time.time() - 5000
    for path in (
        tmp_path / ".incoming-old" / "raw",
        tmp_path / ".incoming-old",
        tmp_path / "default" / "raw",
        tmp_path / "default",
        tmp_path / ".incoming-new",
    ):
        os.utime(path, (long_ago, long_ago))
    _remove_abandoned(tmp_path, older_than_s=3600)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".incoming-new", "default"]
    shutil.rmtree(tmp_path / ".incoming-new")


def packed_tar(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def test_class_folders_become_a_table_over_http(lone: Service) -> None:
    files = {
        f"films/{label}/{number}.txt": f"a {label} film, number {number}".encode()
        for number in range(3)
        for label in ("good", "bad")
    }
    dataset = lone.client.upload(packed_tar(files), "films.tar.gz")
    assert (dataset["status"], dataset["format"], dataset["rows"]) == ("ready", "tar", 6)
    preview = lone.client.get(f"/datasets/{dataset['id']}/preview", limit=2)
    assert preview["columns"] == ["file_name", "text", "label"]
    assert preview["rows"][1] == {
        "row": 2,
        "values": {"file_name": "films/bad/0.txt", "text": "a bad film, number 0", "label": "bad"},
    }
    assert preview["classes"] == {"column": "label", "is_guess": True, "rows": {"good": 3, "bad": 3}}
    assert [
        path.name for path in (datasets_folder(lone) / "default" / dataset["id"]).iterdir() if path.name[0] == "."
    ] == []


def test_an_unsafe_archive_is_refused_with_the_entry_named(lone: Service) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("pos/1.txt", "words")
        archive.writestr("../../escaped.txt", "words")
    dataset = lone.client.upload(sink.getvalue(), "films.zip")
    (error,) = dataset["errors"]
    assert (dataset["status"], error["code"], error["rows"]) == ("invalid", "archive_unsafe", [2])
    assert "../../escaped.txt" in error["message"]
    assert not list(lone.home.folder.rglob("escaped.txt"))
    answer = lone.client.http.post("/finetune", json={"dataset": dataset["id"], "register_as": "m", "backbone": "tiny"})
    assert answer.status_code == 422 and answer.json()["code"] == "dataset_invalid"


def test_the_report_counts_the_classes_of_any_column(lone: Service) -> None:
    dataset = lone.client.upload("text,topic,source\na,x,web\nb,y,web\nc,x,mail\n,x,\n")
    path = f"/datasets/{dataset['id']}/report"
    answer = lone.client.get(path)
    assert (answer["status"], answer["report"]["rows"], answer["report"]["findings"]) == ("ready", 4, [])
    assert answer["classes"] == {"column": "topic", "is_guess": True, "rows": {"x": 3, "y": 1}}
    text, _, source = answer["report"]["columns"]
    assert (text["empty"], text["distinct"], source["empty"], source["counts"]) == (1, 3, 1, {"web": 2, "mail": 1})
    named = lone.client.get(path, label="source")["classes"]
    assert named == {"column": "source", "is_guess": False, "rows": {"web": 2, "mail": 1}}
    missing = lone.client.http.get(path, params={"label": "sauce"})
    assert missing.status_code == 422 and "source" in missing.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"columns": {"slices": ["origin"]}}, "origin"),
        ({"hyperparameters": {"split": {"strategy": "group", "group_column": "customer"}}}, "customer"),
        ({"hyperparameters": {"split": {"strategy": "time", "time_column": "when"}}}, "when"),
        ({"columns": {"slices": ["a", "b", "c", "d", "e", "f"]}}, "slices"),
        ({"columns": {"txt": "text"}}, "txt"),
    ],
)
def test_columns_that_are_not_there_are_refused_at_once(
    lone: Service, lone_words: str, fields: dict[str, object], named: str
) -> None:
    answer = lone.client.http.post(
        "/finetune", json={"dataset": lone_words, "register_as": "m", "backbone": "tiny", **fields}
    )
    assert answer.status_code == 422 and named in answer.json()["detail"]


def test_a_dry_run_tells_what_is_wrong_with_the_rows_before_anything_is_spent(lone: Service) -> None:
    rows = [f"text number {number} of many,{'ab'[number % 2]}" for number in range(40)]
    train = lone.client.upload("text,label\n" + "\n".join([*rows, "one of a kind,c"]) + "\n")["id"]
    test = lone.client.upload("text,label\nText  Number 3 of many,b\nanother text,zebra\n")["id"]
    body = {"dataset": train, "test_dataset": test, "register_as": "m", "backbone": "tiny"}

    def ask() -> dict[str, Any] | None:
        answer = lone.client.http.post("/finetune", params={"dry_run": True}, json=body)
        assert answer.status_code in {200, 503}, answer.text
        return answer.json() if answer.status_code == 200 else None

    found = {
        (finding["code"], finding["severity"]): finding["rows"]
        for finding in until(ask, within_s=60, what="the plan")["findings"]
    }
    assert found["class_too_small", "warning"] == [41]
    assert found["unknown_label", "error"] == [2]
    assert found["split_overlap", "warning"] == [1]
