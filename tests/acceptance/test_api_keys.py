"""API keys over every route of the service: who may, who may not, and what a tenant can learn of another."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from service.api.guard import PROBE_PATHS
from tests.acceptance.conftest import Home, Table
from tests.acceptance.processes import Client, problem

SCOPES = ("predict", "datasets", "finetune", "models:promote", "models:delete")
# What each route asks for; None: any valid key. A route that is missing here fails the test.
ROUTES: dict[tuple[str, str], str | None] = {
    ("post", "/predict"): "predict",
    ("post", "/v1/models/{model}/predict"): "predict",
    ("post", "/v1/embeddings"): "predict",
    ("post", "/datasets"): "datasets",
    ("get", "/datasets"): "datasets",
    ("get", "/datasets/{dataset_id}"): "datasets",
    ("delete", "/datasets/{dataset_id}"): "datasets",
    ("get", "/datasets/{dataset_id}/report"): "datasets",
    ("get", "/datasets/{dataset_id}/preview"): "datasets",
    ("post", "/finetune"): "finetune",
    ("get", "/finetune"): "finetune",
    ("get", "/finetune/{job_id}"): "finetune",
    ("get", "/finetune/{job_id}/events"): "finetune",
    ("get", "/finetune/{job_id}/evaluation"): "finetune",
    ("post", "/finetune/{job_id}/cancel"): "finetune",
    ("post", "/finetune/{job_id}/pause"): "finetune",
    ("post", "/finetune/{job_id}/resume"): "finetune",
    ("post", "/finetune/{job_id}/rerun"): "finetune",
    ("get", "/finetune/{job_id}/suspects"): "finetune",
    ("get", "/models"): None,
    ("get", "/v1/models"): None,
    ("get", "/models/{name}"): None,
    ("get", "/v1/models/{name}"): None,
    ("get", "/models/{name}/versions"): None,
    ("get", "/models/{name}/versions/{version}"): None,
    ("get", "/models/{name}/versions/{version}/card"): None,
    ("get", "/models/{name}/versions/{version}/files/{path}"): None,
    ("get", "/models/{name}/history"): None,
    ("get", "/models/{name}/aliases/{alias}/history"): None,
    ("put", "/models/{name}/aliases/{alias}"): "models:promote",
    ("post", "/models/{name}/rollback"): "models:promote",
    ("post", "/models/import"): "admin",
    ("delete", "/models/{name}"): "models:delete",
    ("delete", "/models/{name}/versions/{version}"): "models:delete",
    ("delete", "/models/{name}/aliases/{alias}"): "models:promote",
    ("delete", "/finetune/{job_id}"): "finetune",
}
VALUES = {"version": "1"}


@dataclass
class Keyed:
    """A server with keys: one for each scope, one with none, and `admin` keys of two tenants."""

    url: str
    keys: dict[str, str]
    home: Home

    def client(self, key: str) -> Client:
        return Client(self.url, key=self.keys[key])


@pytest.fixture(scope="module")
def keyed(make_home: Callable[..., Home]) -> Iterator[Keyed]:
    scopes = {"nothing": [], "ours": ["admin"], "theirs": ["admin"], **{scope: [scope] for scope in SCOPES}}
    keys = {name: f"sk-{name}-0123456789" for name in scopes}
    listed = [
        {
            "name": name.replace(":", "-"),
            "sha256": hashlib.sha256(keys[name].encode()).hexdigest(),
            "scopes": scopes[name],
            "tenant": "them" if name == "theirs" else "us",
        }
        for name in scopes
    ]
    home = make_home(POLYHEAD_API_KEYS=json.dumps(listed))
    with home.server() as server, home.worker() as worker:
        server.wait_ready()
        worker.wait_ready()
        yield Keyed(server.url, keys, home)


@pytest.fixture(scope="module")
def ours(keyed: Keyed, words: tuple[Table, Table]) -> dict[str, str]:
    """What the first tenant has: a dataset, a job and a model, by the parameter's name in paths."""
    with keyed.client("ours") as client:
        dataset = client.upload(words[0].csv)["id"]
        job = client.train(dataset, "secret", method="baseline")
        client.wait_served("secret", "a good film", within_s=10)
    return {"dataset_id": dataset, "job_id": job["id"], "name": "secret", "model": "secret"}


@pytest.fixture(scope="module")
def routes(keyed: Keyed) -> list[tuple[str, str]]:
    """Every method and path of the OpenAPI document, but for the probes."""
    with keyed.client("nothing") as client:
        document = client.get("/openapi.json")
    return [(method, path) for path, item in document["paths"].items() for method in item if path not in PROBE_PATHS]


def ask(client: Client, method: str, path: str, values: dict[str, str] | None = None) -> httpx.Response:
    known = VALUES | (values or {})
    filled = re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], "none"), path)
    return client.http.request(method, filled, json=None if method in {"get", "delete"} else {})


def test_the_table_of_this_test_is_complete(routes: list[tuple[str, str]]) -> None:
    assert set(routes) == set(ROUTES)


def test_without_a_valid_key_every_route_answers_401(keyed: Keyed, routes: list[tuple[str, str]]) -> None:
    with Client(keyed.url) as nobody, Client(keyed.url, key="sk-wrong") as wrong:
        for method, path in [*routes, ("get", "/openapi.json"), ("get", "/no-such-route")]:
            for client in (nobody, wrong):
                response = ask(client, method, path)
                problem(response, 401, "unauthenticated")
                assert response.headers["www-authenticate"] == "Bearer"


def test_the_page_that_shows_the_api_needs_no_key_and_asks_for_one(keyed: Keyed) -> None:
    with Client(keyed.url) as nobody:
        page = nobody.http.get("/docs")
        assert page.status_code == 200 and "html" in page.headers["content-type"]
        assert nobody.http.get("/docs/page.js").status_code == 200
        assert nobody.http.get("/docs/no-such-file").status_code == 404
        problem(nobody.http.get("/openapi.json"), 401, "unauthenticated")


def test_probes_need_no_key(keyed: Keyed) -> None:
    with Client(keyed.url) as nobody:
        for path in sorted(PROBE_PATHS):
            assert nobody.http.get(path).status_code == 200, path
        text = nobody.http.get("/info").text + nobody.http.get("/metrics").text
    assert not any(key in text or hashlib.sha256(key.encode()).hexdigest() in text for key in keyed.keys.values())


def test_a_key_opens_only_what_its_scopes_name(keyed: Keyed, routes: list[tuple[str, str]]) -> None:
    for key in ("nothing", *SCOPES):
        with keyed.client(key) as client:
            for method, path in routes:
                response = ask(client, method, path)
                if ROUTES[method, path] in {None, key}:
                    assert response.status_code not in {401, 403}, (key, method, path, response.text)
                elif path == "/v1/embeddings":
                    assert response.status_code == 403, (key, response.text)
                else:
                    document = problem(response, 403, "forbidden")
                    assert repr(ROUTES[method, path]) in document["detail"]


def test_promoting_through_a_job_needs_the_scope_that_promoting_does(keyed: Keyed) -> None:
    body = {"dataset": "ds_none", "register_as": "m", "promote": "if_better"}
    with keyed.client("finetune") as client, keyed.client("ours") as admin:
        refusal = problem(client.http.post("/finetune", json=body), 403, "forbidden")
        assert "models:promote" in refusal["detail"]
        problem(client.http.post("/finetune", json=body | {"promote": "manual"}), 404, "dataset_not_found")
        problem(admin.http.post("/finetune", json=body), 404, "dataset_not_found")


def test_a_key_may_come_in_either_header(keyed: Keyed) -> None:
    with Client(keyed.url) as client:
        assert client.http.get("/models", headers={"X-API-Key": keyed.keys["nothing"]}).status_code == 200
        basic = client.http.get("/models", headers={"Authorization": f"Basic {keyed.keys['nothing']}"})
        problem(basic, 401, "unauthenticated")


def test_what_belongs_to_another_tenant_looks_as_if_it_did_not_exist(
    keyed: Keyed, ours: dict[str, str], routes: list[tuple[str, str]]
) -> None:
    missing = {"dataset_id": "ds_" + "0" * 24, "job_id": "ft_" + "0" * 24, "name": "nosuch", "model": "nosuch"}
    named = [(method, path) for method, path in routes if any(f"{{{name}}}" in path for name in ours)]
    assert len(named) > 15
    bodies = {
        "/models/{name}/aliases/{alias}": {"version": 1, "expected_version": None},
        "/v1/models/{model}/predict": {"inputs": "a good film"},
    }
    with keyed.client("theirs") as theirs, keyed.client("ours") as mine:
        for method, path in named:
            body: dict[str, Any] = {"json": bodies.get(path, {})} if method in {"post", "put"} else {}
            foreign, absent = (
                theirs.http.request(
                    method, path.format(**values, version=1, alias="champion", path="labels.json"), **body
                )
                for values in (ours, missing)
            )
            assert foreign.status_code == absent.status_code == 404, (method, path, foreign.text)
            assert anonymous(foreign, ours) == anonymous(absent, missing), (method, path)
        for path, model, field in (
            ("/predict", "{}", "inputs"),
            ("/predict", "{}:1", "inputs"),
            ("/v1/embeddings", "{}", "input"),
        ):
            foreign, absent = (
                theirs.http.post(path, json={"model": model.format(values["name"]), field: "a good film"})
                for values in (ours, missing)
            )
            assert foreign.status_code == absent.status_code == 404
            assert anonymous(foreign, ours) == anonymous(absent, missing)
        for values in (ours, missing):
            started = theirs.http.post("/finetune", json={"dataset": values["dataset_id"], "register_as": "mine"})
            problem(started, 404, "dataset_not_found")
        for path in ("/datasets", "/finetune"):
            assert theirs.get(path)["data"] == []
        assert [model["id"] for model in theirs.get("/models")["data"]] == ["tiny"]
        # And it is all still there for its owner.
        assert mine.get(f"/datasets/{ours['dataset_id']}")["status"] == "ready"
        assert mine.predict("secret", ["a good film"]).status_code == 200


def test_two_tenants_may_use_the_same_name(keyed: Keyed, ours: dict[str, str], words: tuple[Table, Table]) -> None:
    with keyed.client("theirs") as theirs, keyed.client("ours") as mine:
        swapped = Table(words[0].texts, ["dislike" if label == "good" else "like" for label in words[0].labels])
        dataset = theirs.upload(swapped.csv)["id"]
        theirs.train(dataset, ours["name"], method="baseline")
        theirs.wait_served("secret", "a good film", within_s=10)
        assert theirs.labels("secret", ["a great film"]) == ["dislike"]
        assert mine.labels("secret", ["a great film"]) == ["good"]
        assert mine.get("/models/secret")["aliases"] == {"champion": 1}


def anonymous(response: httpx.Response, names: dict[str, str]) -> str:
    """The body without what may differ: the request's id, its path, and the name asked for."""
    document = response.json()
    for name in ("request_id", "instance"):
        document.pop(name, None)
    text = json.dumps(document)
    for name in set(names.values()):
        text = text.replace(name, "…")
    return text
