"""API keys: who calls, for which tenant, with which scopes. Runs before any route reads a body."""

from __future__ import annotations

import functools
import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from model_registry.refs import DEFAULT_TENANT
from service.api.guard import HEALTH_PATHS, PROBE_PATHS
from service.api.problems import Problem, problem_response, request_id_of
from service.settings import ApiKey, Scope, is_loopback

MAX_KEY_BYTES = 512


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller. Without configured keys everyone on loopback is `local` with every scope."""

    name: str
    tenant: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def demand(self, scope: str) -> None:
        """Raises 403 `forbidden`."""
        if not self.may(scope):
            raise Problem(403, "forbidden", f"this key lacks the scope {scope!r}")


LOCAL = Principal("local", DEFAULT_TENANT, frozenset({"admin"}))


class KeyAuthentication:
    """ASGI middleware: sets `scope["state"]["principal"]` or answers 401. Probes, metrics, limits and the page `/docs`
    need no key."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]) -> None:
        self._app = app
        self._keys = tuple(
            (bytes.fromhex(key.sha256), Principal(key.name, key.tenant, frozenset(key.scopes))) for key in keys
        )

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in HEALTH_PATHS:
            try:
                if scope["path"] in PROBE_PATHS or _is_of_docs(scope["path"]):
                    self._refuse_web_pages(scope["headers"])
                else:
                    scope.setdefault("state", {})["principal"] = self.admit(scope["headers"])
            except Problem as problem:
                response = problem_response(problem, path=scope["path"], request_id=request_id_of(scope))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def admit(self, headers: Sequence[tuple[bytes, bytes]]) -> Principal:
        """The caller. Raises 401 without a valid key, 403 for a web page's request where no keys are configured."""
        self._refuse_web_pages(headers)
        principal = self.identify(headers)
        if principal is None:
            raise Problem(
                401,
                "unauthenticated",
                "send a valid key as 'Authorization: Bearer <key>'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return principal

    def _refuse_web_pages(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        if not self._keys and _comes_from_elsewhere(headers):
            raise Problem(
                403,
                "forbidden",
                "without API keys only requests to a loopback name, and none from web pages, are taken",
            )

    def identify(self, headers: Sequence[tuple[bytes, bytes]]) -> Principal | None:
        """The caller by `Authorization: Bearer` or `X-API-Key`; any header is ignored where no keys are configured."""
        if not self._keys:
            return LOCAL
        presented = _presented_key(headers)
        if presented is None or len(presented) > MAX_KEY_BYTES:
            return None
        digest = hashlib.sha256(presented).digest()
        found = None
        for sha256, principal in self._keys:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(sha256, digest):
                found = principal
        return found


def _is_of_docs(path: str) -> bool:
    """The page and its files hold nothing of this service; the description that it shows needs a key."""
    return path == "/docs" or path.startswith("/docs/")


def _comes_from_elsewhere(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a browser sent this for another site (Origin), or a foreign name was made to point here (Host).

    A loopback address alone does not keep web pages out: they can post to it, and with a name that
    resolves to 127.0.0.1 they can read the answers too.
    """
    for name, value in headers:
        if name == b"origin" and not _is_loopback(value.partition(b"://")[2]):
            return True
        if name == b"host" and not _is_loopback(value):
            return True
    return False


@functools.lru_cache(maxsize=64)
def _is_loopback(authority: bytes) -> bool:
    """Whether `host[:port]` means this machine. Clients name few; reading one as an address takes 3 µs."""
    text = authority.decode("latin-1")
    return is_loopback(text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0])


def _presented_key(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else None
        if name == b"x-api-key":
            return value.strip()
    return None


def require(scope: Scope | None) -> Callable[[Request], Principal]:
    """A dependency: the caller, if it has `scope` (None: any valid key). Raises 403 `forbidden`."""

    def check(request: Request) -> Principal:
        principal = request.scope["state"]["principal"]
        assert isinstance(principal, Principal)
        if scope is not None:
            principal.demand(scope)
        return principal

    check.required_scope = scope  # type: ignore[attr-defined]
    return check
