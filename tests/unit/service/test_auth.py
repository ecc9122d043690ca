"""Keys, scopes, and what keeps web pages out where there are none."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from fastapi.routing import APIRoute

from service.api import datasets, finetune, health, models
from service.api.auth import KeyAuthentication
from service.api.guard import PROBE_PATHS
from service.api.problems import Problem
from service.settings import ApiKey

KEY = ApiKey(name="ci", sha256=hashlib.sha256(b"secret").hexdigest(), scopes=frozenset({"predict"}), tenant="acme")


def admit(keys: list[ApiKey], **headers: str) -> Any:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return KeyAuthentication(lambda *_: None, keys).admit(raw)  # type: ignore[arg-type]


def test_a_valid_key_names_its_tenant_and_scopes() -> None:
    for headers in ({"authorization": "Bearer secret"}, {"x_api_key": "secret"}, {"authorization": "bearer secret"}):
        principal = admit([KEY], **headers)
        assert (principal.name, principal.tenant) == ("ci", "acme")
        assert principal.may("predict") and not principal.may("admin")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic secret"},
        {"authorization": "secret"},
        {"x_api_key": ""},
        {"authorization": "Bearer " + "x" * 10_000},
    ],
)
def test_anything_else_is_unauthenticated(headers: dict[str, str]) -> None:
    with pytest.raises(Problem) as refused:
        admit([KEY], **headers)
    assert (refused.value.status, refused.value.code) == (401, "unauthenticated")


def test_without_keys_any_authorization_header_is_ignored() -> None:
    assert admit([], host="127.0.0.1:8000", authorization="Bearer whatever").may("admin")
    assert admit([], host="localhost:8000").may("admin")
    assert admit([], host="[::1]:8000", origin="http://localhost:3000").may("admin")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1", "origin": "https://evil.example"},
        {"host": "127.0.0.1", "origin": "null"},
    ],
)
def test_without_keys_web_pages_and_foreign_names_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(Problem) as refused:
        admit([], **headers)
    assert refused.value.status == 403


def test_every_route_but_the_probes_asks_for_a_scope() -> None:
    """Of the framework's; the inference routes ask for theirs in one place."""
    routes = [route for module in (datasets, finetune, models, health) for route in module.router.routes]
    for route in routes:
        assert isinstance(route, APIRoute)
        checks = [d.call for d in route.dependant.dependencies if hasattr(d.call, "required_scope")]
        assert bool(checks) != (route.path in PROBE_PATHS), f"{route.path} has {len(checks)} scope checks"
