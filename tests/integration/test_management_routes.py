"""What all management routes have in common: their metrics, their documents, and the page that shows them."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from model_registry.db import Database
from model_registry.migrations import migrate
from service.settings import ApiKey, ServingSettings
from service.threads import on_database
from tests.support.asgi import Answered
from tests.support.management import ManagementApp
from tests.support.openapi import fault_in

KEY = ApiKey(name="k", sha256="0" * 64, scopes=frozenset({"admin"}))


@pytest.fixture
def app(tmp_path: Path) -> Iterator[ManagementApp]:
    database = Database(f"sqlite:///{tmp_path / 'polyhead.db'}")
    migrate(database)
    with closing(ManagementApp(database, tmp_path)) as app:
        yield app
    database.dispose()


def counted(app: ManagementApp) -> dict[tuple[str, str, str], float]:
    """Answers by method, route and status."""
    found = {}
    series = r'polyhead_management_requests_total\{code="(\d+)",method="(\w+)",route="(.*)"\} (\S+)'
    for line in app.metrics.render()[0].decode().splitlines():
        if match := re.fullmatch(series, line):
            found[match[2], match[3], match[1]] = float(match[4])
    return found


def get(app: ManagementApp, path: str, **options: Any) -> Answered:
    return app.ask(path, b"", method=options.pop("method", "GET"), **options)


def test_every_route_has_its_series_from_the_start(app: ManagementApp) -> None:
    series = counted(app)
    for route in ("/models", "/models/{name}/versions/{version}/files/{path:path}", "/finetune/{job_id}/events"):
        assert {series["GET", route, code] for code in ("200", "500", "503")} == {0.0}
    assert series["DELETE", "/datasets/{dataset_id}", "500"] == 0.0


def test_answers_are_counted_by_route_and_not_by_what_clients_choose(
    app: ManagementApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(app, "/models")
    get(app, "/models/nothing")
    get(app, "/finetune/ft_nothing")
    get(app, "/no/such/route")
    get(app, "/models", headers={"host": "evil.example"})
    get(app, "/models", headers={"content-encoding": "gzip"})
    get(app, "/models", method="BREW")
    monkeypatch.setattr(app.registry, "models", lambda *_: 1 / 0)
    assert get(app, "/models").status == 500
    series = {labels: count for labels, count in counted(app).items() if count}
    assert series == {
        ("GET", "/models", "200"): 1,
        ("GET", "/models/{name}", "404"): 1,
        ("GET", "/finetune/{job_id}", "404"): 1,
        ("GET", "", "404"): 1,
        ("GET", "", "403"): 1,
        ("GET", "", "415"): 1,
        ("other", "/models", "405"): 1,
        ("GET", "/models", "500"): 1,
    }


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/datasets", "GET, POST"),
        ("/datasets/ds_1", "DELETE, GET"),
        ("/finetune", "GET, POST"),
        ("/models/import", "POST"),
        ("/models/reviews", "DELETE, GET"),
        ("/models/m/versions/1/files/eval/report.json", "GET"),
        ("/readyz", "GET"),
        ("/docs", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(app: ManagementApp, path: str, methods: str) -> None:
    refused = get(app, path, method="PATCH")
    assert (refused.status, refused.headers["allow"]) == (405, methods)


def test_what_a_drain_refuses_is_counted(app: ManagementApp) -> None:
    app.drain.refusing = True
    assert get(app, "/models").status == 503
    assert counted(app)["GET", "", "503"] == 1


def test_the_page_asks_nobody_else(app: ManagementApp) -> None:
    """Every file that it names comes from the service, and the browser may fetch no other."""
    page = get(app, "/docs")
    named = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
    assert {"docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "docs/page.js"} <= set(named)
    for name in named:
        answered = get(app, f"/{name}")
        assert answered.status == 200 and len(answered.body) > 100, name
        assert answered.headers["x-content-type-options"] == "nosniff"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "connect-src 'self'" in policy
    assert "://" not in page.body.decode() + get(app, "/docs/page.js").body.decode() + policy
    for hidden in ("/docs/index.html", "/docs/..%2Fauth.py", "/docs/VENDORED.md", "/docs/"):
        assert get(app, hidden).status == 404


def test_the_page_is_open_and_what_it_shows_is_not(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'polyhead.db'}")
    migrate(database)
    with closing(ManagementApp(database, tmp_path, ServingSettings(api_keys=(KEY,)))) as app:
        assert get(app, "/docs").status == get(app, "/docs/page.js").status == 200
        assert get(app, "/openapi.json").status == get(app, "/docsx").status == 401
    database.dispose()


def test_without_keys_a_foreign_page_cannot_show_it(app: ManagementApp) -> None:
    assert get(app, "/docs", headers={"host": "evil.example"}).status == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/models"),
        ("GET", "/models/minilm"),
        ("GET", "/models/nothing"),
        ("GET", "/models/nothing/versions"),
        ("GET", "/datasets"),
        ("GET", "/datasets/ds_nothing"),
        ("GET", "/finetune"),
        ("GET", "/finetune?limit=0"),
        ("GET", "/finetune/ft_nothing/evaluation"),
        ("POST", "/finetune/ft_nothing/cancel"),
        ("POST", "/finetune"),
        ("PUT", "/models/m/aliases/champion"),
        ("GET", "/livez"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
    ],
)
def test_answers_are_as_documented(app: ManagementApp, method: str, path: str) -> None:
    answered = get(app, path, method=method)
    kind = answered.headers["content-type"]
    body = answered.document if "json" in kind else None
    assert fault_in(method, path.partition("?")[0], answered.status, kind, body) is None


def test_a_fault_of_the_document_is_found() -> None:
    """Or the checks of this document would show nothing."""
    assert "418" in str(fault_in("GET", "/models", 418, "application/json", {}))
    assert "text/html" in str(fault_in("GET", "/models", 200, "text/html", None))
    assert "data" in str(fault_in("GET", "/models", 200, "application/json", {"object": "list"}))
    assert "object" in str(fault_in("GET", "/models", 200, "application/json", {"object": 1, "data": []}))
    assert fault_in("GET", "/models", 200, "application/json", {"object": "list", "data": []}) is None


def test_a_database_that_is_away_holds_up_no_upload_and_no_metrics(app: ManagementApp) -> None:
    """More queries wait than there are threads for them."""
    blocked, entered = threading.Event(), threading.Semaphore(0)

    async def wait() -> None:
        def query() -> None:
            entered.release()
            blocked.wait(30)

        await on_database(query)

    async def hold_all() -> list[Any]:
        tasks = [asyncio.create_task(wait()) for _ in range(40)]
        await asyncio.sleep(0)
        return tasks

    tasks = app._runner.run(hold_all())
    try:
        assert entered.acquire(timeout=10)
        assert get(app, "/metrics").status == 200
        headers = {"content-type": "multipart/form-data; boundary=b"}
        body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n\r\n--b--\r\n'
        assert app.ask("/datasets", body, headers=headers).document["code"] == "empty_input"
    finally:
        blocked.set()

    async def end() -> None:
        for task in tasks:
            await task

    app._runner.run(end())
