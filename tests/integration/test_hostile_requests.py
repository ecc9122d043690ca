"""Values that JSON, a path or a form can carry and a database cannot: a 4xx that says where, on both databases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from finetune.jobs.records import JobSpec
from model_registry.db import Database
from tests.support.asgi import Answered
from tests.support.management import ManagementApp

BIG = 10**20
LINE = b"\r\n"


@pytest.fixture
def app(database: Database, tmp_path: Path) -> Iterator[ManagementApp]:
    with closing(ManagementApp(database, tmp_path)) as app:
        yield app


def refused(answered: Answered, statuses: set[int] = frozenset({400, 422})) -> dict[str, Any]:  # type: ignore[assignment]
    assert answered.status in statuses, (answered.status, answered.body)
    assert answered.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answered.document
    assert document["detail"]
    return document


@pytest.mark.parametrize(
    "path",
    [
        "/finetune?after=%00",
        "/finetune?after=a%20b",
        "/finetune?after=" + "a" * 65,
        "/datasets?after=%00",
        "/datasets/ds_%00",
        "/datasets/ds_a%C3%A9",
        "/datasets/" + "a" * 300,
        "/datasets/ds_1/report?label=a%00b",
        "/finetune/ft_%00",
        "/finetune/ft_%00/events",
        f"/finetune/ft_1/events?after={BIG}",
        f"/finetune/ft_1/events?after={2**63}",
        "/finetune/ft_1/events?after=%C2%B2",
        "/models/a%00b",
        "/models/No%20Name",
        "/v1/models/a%00b",
        "/models/m/versions/%C2%B2",
        f"/models/m/versions/{BIG}",
        f"/models/m/versions/{BIG}/card",
        f"/models/m/versions/{2**31}/files/a",
        "/models/m/versions/1/files/a%00b",
        "/models/m/versions/0",
        "/models/m/aliases/a%00b/history",
        "/models/m/history?limit=" + "9" * 400,
        "/models/m/versions/1.0",
        "/models/m/versions/+1",
        "/models/m/versions/01",
        "/models/m/versions/%201",
        "/models/m/versions/1%0A/card",
        "/datasets?limit=1_0",
        "/finetune?limit=2.0",
        "/finetune/ft_1/events?after=+1",
    ],
)
def test_a_path_or_query_that_names_nothing(app: ManagementApp, path: str) -> None:
    refused(app.ask(path, b"", method="GET"))


@pytest.mark.parametrize("given", ["²", str(BIG), "-1", "abc", "9" * 500, "1_0", "1.0"])
@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
def test_a_last_event_id_that_is_none(app: ManagementApp, given: str, accept: str) -> None:
    headers = {"accept": accept, "last-event-id": given}
    refused(app.ask("/finetune/ft_1/events", b"", method="GET", headers=headers))


ALIAS = {"version": 1, "expected_version": None}


@pytest.mark.parametrize(
    ("method", "path", "body", "place"),
    [
        ("PUT", "/models/m/aliases/champion", {**ALIAS, "reason": "a\0b"}, "reason"),
        ("PUT", "/models/m/aliases/champion", {**ALIAS, "reason": "half \ud83d"}, "reason"),
        ("PUT", "/models/m/aliases/champion", {**ALIAS, "version": BIG}, "version"),
        ("PUT", "/models/m/aliases/champion", {**ALIAS, "expected_version": 2**63}, "expected_version"),
        ("POST", "/models/m/rollback", {"reason": "\0"}, "reason"),
        ("POST", "/models/m/rollback", {"reason": "\udc00"}, "reason"),
        ("POST", "/models/import", {"name": "m", "source": "file:a\0b"}, "source"),
        ("POST", "/models/import", {"name": "m", "source": "file:" + "a" * 300}, "source"),
        ("POST", "/models/import", {"name": "m", "source": "file:" + "é" * 200}, "source"),
        ("POST", "/finetune", {"dataset": "ds_\0", "register_as": "m"}, "dataset"),
        ("POST", "/finetune", {"dataset": "ds_1", "register_as": "m", "metadata": {"a": "\0"}}, "a"),
        ("POST", "/finetune", {"dataset": "ds_1", "register_as": "m", "metadata": {"\ud800": "a"}}, "metadata"),
        ("POST", "/finetune", {"dataset": "ds_1", "register_as": "m", "hyperparameters": {"seed": 2**63}}, "seed"),
        ("POST", "/finetune", {"dataset": "ds_1", "register_as": "m", "columns": {"label": "\ud800"}}, "label"),
    ],
)
def test_a_body_that_no_database_can_hold(
    app: ManagementApp, method: str, path: str, body: dict[str, Any], place: str
) -> None:
    document = refused(app.ask(path, json.dumps(body).encode(), method=method))
    assert place in document["errors"][0]["loc"], document
    assert place in document["detail"] + document["errors"][0]["message"]


@pytest.mark.parametrize("path", ["/models/m/rollback", "/finetune/ft_1/cancel"])
@pytest.mark.parametrize("kind", ["text/csv", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"])
@pytest.mark.parametrize("body", [b'{"reason": "a"}', b"[" * 3000 + b'"\\u0041"' + b"]" * 3000])
def test_a_body_of_another_type_where_it_may_be_left_out(app: ManagementApp, path: str, kind: str, body: bytes) -> None:
    refused(app.ask(path, body, headers={"content-type": kind}), {400, 415})


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/models/m/aliases/a"), ("POST", "/models/m/rollback"), ("POST", "/finetune"), ("POST", "/models/import")],
)
@pytest.mark.parametrize("body", [b'{"reason": NaN}', b'{"reason": -Infinity}', b'{"reason": ' + b"9" * 5000 + b"}"])
def test_numbers_that_are_no_json(app: ManagementApp, method: str, path: str, body: bytes) -> None:
    assert "NaN, infinite or too long" in refused(app.ask(path, body, method=method), {400})["detail"]


@pytest.mark.parametrize(
    ("method", "path", "body", "place"),
    [
        ("PUT", "/models/m/aliases/a", {**ALIAS, "version": "1"}, "version"),
        ("PUT", "/models/m/aliases/a", {**ALIAS, "version": 1.0}, "version"),
        ("PUT", "/models/m/aliases/a", {**ALIAS, "version": True}, "version"),
        ("PUT", "/models/m/aliases/a", {**ALIAS, "expected_version": "1"}, "expected_version"),
        ("POST", "/finetune/ft_1/cancel", {"keep_best": "no"}, "keep_best"),
        ("POST", "/finetune/ft_1/cancel", {"keep_best": 0}, "keep_best"),
        ("POST", "/finetune", {"dataset": "ds_1", "register_as": "m", "exclude_rows": ["5"]}, "exclude_rows"),
        ("POST", "/finetune", {"dataset": "ds_1", "register_as": "m", "exclude_rows": [5.0]}, "exclude_rows"),
    ],
)
def test_a_value_of_another_type(app: ManagementApp, method: str, path: str, body: dict[str, Any], place: str) -> None:
    assert place in refused(app.ask(path, json.dumps(body).encode(), method=method), {422})["errors"][0]["loc"]


def test_what_is_wrong_with_the_whole_body_has_a_place(app: ManagementApp) -> None:
    assert "; the body: " in refused(app.ask("/models/m/aliases/a", b"[]", method="PUT"))["detail"]


def form(fields: dict[str, bytes], boundary: str = "b") -> bytes:
    lines = []
    for name, value in {"file": b"text,label\na,b\n", "register_as": b"m", **fields}.items():
        disposition = f'Content-Disposition: form-data; name="{name}"' + (
            '; filename="a.csv"' if name == "file" else ""
        )
        lines += [f"--{boundary}".encode(), disposition.encode(), b"", value]
    return LINE.join([*lines, f"--{boundary}--".encode(), b""])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hyperparameters", b"[" * 1000 + b"]" * 1000),
        ("hyperparameters", b'{"a":' * 40 + b"1" + b"}" * 40),
        ("hyperparameters", b'{"seed": NaN}'),
        ("hyperparameters", b'{"seed": 99999999999999999999}'),
        ("hyperparameters", b'{"seed": ' + b"9" * 5000 + b"}"),
        ("metadata", b'{"a": "\\u0000"}'),
        ("metadata", b'{"a": "\\ud83d"}'),
        ("metadata", b'{"a": "\xff"}'),
        ("metadata", b"{'a': 1}"),
        ("backbone", b"a\x00b"),
        ("task", b"\xff\xfe"),
    ],
)
def test_a_field_of_a_form_is_read_like_a_body(app: ManagementApp, field: str, value: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    document = refused(app.ask("/finetune", form({field: value}), headers=headers))
    assert field in document["detail"] or any(field in place.get("loc", ()) for place in document["errors"]), document


def test_a_byte_order_mark_before_a_field(app: ManagementApp) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    body = form({"hyperparameters": b'\xef\xbb\xbf{"method": "no-such"}'})
    assert "method" in refused(app.ask("/finetune", body, headers=headers))["detail"]


@pytest.mark.parametrize("path", ["/finetune", "/datasets"])
def test_a_boundary_that_is_too_long(app: ManagementApp, path: str) -> None:
    headers = {"content-type": f"multipart/form-data; boundary={'b' * 300}"}
    assert "boundary" in refused(app.ask(path, form({}, "b" * 300), headers=headers))["detail"]


def test_what_looks_alike_and_can_be_stored_is_taken(app: ManagementApp) -> None:
    """Escapes themselves are no fault."""
    with app.registry.transaction() as connection:
        app.registry.reserve(
            connection, tenant="default", name="m", task="text-classification", kind="head", method="x", job_id=None
        )
    body = b'{"version": 1, "expected_version": null, "reason": "\\u00e9 \\ud83d\\ude00 \\\\u0000 \\\\ud800"}'
    refused(app.ask("/models/m/aliases/champion", body, method="PUT"), {409})  # the version is not ready


def test_a_page_of_jobs_counts_the_queue_in_one_query(app: ManagementApp, database: Database) -> None:
    spec = JobSpec(dataset="ds_1", backbone="tiny", register_as="m")
    ids = [app.jobs.enqueue(tenant, spec, is_data_ready=True).id for tenant in ("default", "other", "default")]
    reads = 0
    read = database.read

    def counted() -> Any:
        nonlocal reads
        reads += 1
        return read()

    database.read = counted  # type: ignore[method-assign]
    page = app.ask("/finetune", b"", method="GET").document["data"]
    assert {job["id"]: job["queue_position"] for job in page} == {ids[0]: 0, ids[2]: 2}
    assert reads == 2


def test_a_backbone_that_is_being_loaded_is_shown_as_that(app: ManagementApp) -> None:
    listed = app.ask("/v1/models", b"", method="GET").document["data"]
    assert [(model["id"], model["state"], model["reason"]) for model in listed] == [
        ("minilm", "loading", "it is being loaded")
    ]
    for path in ("/models/minilm", "/v1/models/minilm"):
        assert app.ask(path, b"", method="GET").document == listed[0]
