"""The first thing a request meets: pure ASGI, outermost, before any parser.

Knows bytes, time, the shape of JSON text and whether the process is draining; knows no route, model
or schema. The protocol in `service.http_limits` limits what ASGI never sees (headers, raw chunks); this
limits the body and refuses before work is done. It gives each request its id.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.cancellation import Interrupt
from service.api.problems import Problem, internal_problem, problem_response

logger = logging.getLogger("service")

HEALTH_PATHS = frozenset({"/livez", "/readyz", "/health"})
PROBE_PATHS = HEALTH_PATHS | {"/metrics", "/info"}

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_JSON_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{\]},]', re.DOTALL)
OFF_LOOP_BYTES = 64 * 1024
# What curl and others send when they were told no type is parsed as JSON by some routes too.
_TYPES_TAKEN_FOR_JSON = (b"", b"text/plain", b"application/x-www-form-urlencoded")


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """Bounds for one request. The size of a body is not here: it depends on the route."""

    max_body_chunks: int = 16_384
    """Messages a body may come in, empty ones included; one more is allowed for each KiB received."""
    min_body_bytes_per_s: int = 1024
    body_grace_s: float = 10.0
    """Time the server may spend waiting for a body before its rate counts."""
    max_body_gap_s: float = 30.0
    """Longest silence within a body, or a fast start would buy hours of waiting."""
    max_json_depth: int = 32
    max_json_tokens: int = 100_000
    """Opening brackets and commas outside strings: as many as the values a parser would make."""
    unbuffered_above_bytes: int = 64 * 1024 * 1024
    """Routes that take more than this stream their body; it is counted and timed, not kept."""
    drain_retry_after_s: float = 5.0


def body_limits(max_body_bytes: int, max_upload_bytes: int) -> Callable[[str, str], int]:
    """The largest body by path and method: uploads are large, everything else is not."""

    def limit(path: str, method: str) -> int:
        is_upload = method == "POST" and path in {"/datasets", "/finetune"}
        return max_upload_bytes if is_upload else max_body_bytes

    return limit


class DrainState:
    """What the server's shutdown and the guard tell each other.

    `draining`: requests are served, but the probe says no and connections close after their answer.
    `refusing`: new requests are refused; those in flight may finish.
    """

    def __init__(self) -> None:
        self.draining = False
        self.refusing = False
        self.in_flight = 0


class RequestGuard:
    """Counts, times and checks each request, then calls `app`.

    `body_limit(path, method)` gives the largest body in bytes. `clock` is in seconds and monotonic. `on_refusal` is
    told the method and the status of each answer that the guard gives in place of the app.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: GuardLimits,
        state: DrainState,
        body_limit: Callable[[str, str], int],
        *,
        clock: Callable[[], float] = time.monotonic,
        on_refusal: Callable[[str, int], None] | None = None,
    ) -> None:
        self.app = app
        self.on_refusal = on_refusal
        self.limits = limits
        self.state = state
        self.body_limit = body_limit
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["request_id"] = request_id_in(headers_of(scope))
        body = _BodyMeter(scope, receive, limits=self.limits, clock=self.clock)
        response = _Response(scope, send, state=self.state, body=body, on_refusal=self.on_refusal)
        if scope["path"] in PROBE_PATHS:
            await self._answer(scope, body, response)
            return
        self.state.in_flight += 1
        try:
            await self._answer(scope, body, response)
        finally:
            self.state.in_flight -= 1

    async def _answer(self, scope: Scope, body: _BodyMeter, response: _Response) -> None:
        """Runs the app and answers every refusal and fault that left the response unsent."""
        try:
            self._admit(scope, body)
            await self._run_app(scope, body, response)
        except _ClientGone:
            return
        except Problem as problem:
            if response.is_started:
                raise
            await response.refuse(problem)
        except asyncio.CancelledError:
            if self.state.refusing and not response.is_started:
                await response.refuse(self._draining())
            raise
        except Exception as error:
            await self._answer_fault(scope, response, error)
        if body.refusal is not None and not response.is_started:
            await response.refuse(body.refusal)

    def _admit(self, scope: Scope, body: _BodyMeter) -> None:
        """Refuses what its headers alone condemn, before a byte of the body is asked for."""
        path, method = scope["path"], scope["method"]
        if self.state.refusing and path not in PROBE_PATHS:
            raise self._draining()
        if b"content-encoding" in headers_of(scope) and _is_encoded(scope):
            raise Problem(
                415,
                "unsupported_media_type",
                "Request bodies are taken uncompressed only.",
                headers={"Accept-Encoding": "identity"},
            )
        body.max_bytes = self.body_limit(path, method)
        if body.declared_bytes is not None and body.declared_bytes > body.max_bytes:
            raise body.too_large()

    async def _run_app(self, scope: Scope, body: _BodyMeter, response: _Response) -> None:
        if not body.is_expected or body.max_bytes > self.limits.unbuffered_above_bytes:
            await self.app(scope, body.receive_streamed, response.send)
            return
        content = await body.read()
        if content and _is_json(scope):
            content = await checked_json(content, self.limits)
        message = {"type": "http.request", "body": content, "more_body": False}
        await self.app(scope, replay(message, body.receive), response.send)

    async def _answer_fault(self, scope: Scope, response: _Response, error: Exception) -> None:
        is_logged = scope["state"].get("is_error_logged", False)
        if response.body.refusal is not None:
            return  # the app stumbled over the end of a body that was refused
        if not response.is_started:
            if not is_logged:
                logger.exception("unexpected error, request %s", scope["state"]["request_id"], exc_info=error)
            await response.refuse(internal_problem())
        elif not (response.is_complete and is_logged):
            raise error

    def _draining(self) -> Problem:
        return Problem(
            503,
            "draining",
            "This server is shutting down; send the request again.",
            retry_after_s=self.limits.drain_retry_after_s,
        )


async def checked_json(content: bytes, limits: GuardLimits) -> bytes:
    """JSON text without a byte order mark, refused if it is no UTF-8, too deep or too large in number.

    It is not parsed. Raises `Problem`. Nearly all bodies pass on a few counts over the bytes; the others are scanned,
    off the event loop where that could be felt.
    """
    # A raw NUL is never JSON; with it, UTF-16 could hide its brackets from the scan below.
    if not _is_utf8(content) or b"\x00" in content:
        raise Problem(400, "malformed_request", "The body is not valid UTF-8 text.")
    content = content.removeprefix(codecs.BOM_UTF8)
    opened = content.count(b"[") + content.count(b"{")
    if opened <= limits.max_json_depth and opened + content.count(b",") <= limits.max_json_tokens:
        return content
    find = partial(json_fault, content, max_depth=limits.max_json_depth, max_tokens=limits.max_json_tokens)
    fault = find() if len(content) <= OFF_LOOP_BYTES else await asyncio.to_thread(find)
    if fault is not None:
        raise Problem(400, "malformed_request", fault)
    return content


def json_fault(content: bytes, *, max_depth: int, max_tokens: int) -> str | None:
    """The first bound that the text breaks, in words; None where it keeps them. Brackets in strings do not count."""
    depth = tokens = strings = 0
    for match in _JSON_TOKEN.finditer(content):
        first = content[match.start()]
        if first == 0x22:  # a string
            strings += 1
        elif first in b"[{":
            depth += 1
            tokens += 1
        elif first == 0x2C:  # a comma
            tokens += 1
        else:
            depth -= 1
        if depth > max_depth:
            return f"The JSON is nested more than {max_depth} deep."
        # Each value needs an opening or a comma before it and each member one key: more strings are no JSON.
        if tokens > max_tokens or strings > 2 * (max_tokens + 1):
            return f"The JSON has more than {max_tokens} values."
        if depth < 0:
            return "The body is not valid JSON: a bracket is closed that was never opened."
    return None


class _ClientGone(Exception):
    """The client left before its request was complete and waits for no answer."""


class _BodyMeter:
    """Receives a request body under the limits. Once `refusal` is set the app sees a disconnected client."""

    __slots__ = (
        "_chunks",
        "_received_bytes",
        "_waited_s",
        "clock",
        "declared_bytes",
        "is_expected",
        "is_finished",
        "limits",
        "max_bytes",
        "receive",
        "refusal",
    )

    def __init__(self, scope: Scope, receive: Receive, *, limits: GuardLimits, clock: Callable[[], float]) -> None:
        self.receive = receive
        self.limits = limits
        self.clock = clock
        self.max_bytes = 0
        headers = headers_of(scope)
        self.declared_bytes = _declared_bytes(headers)
        self.is_expected = bool(self.declared_bytes) or b"transfer-encoding" in headers
        self.is_finished = False
        self.refusal: Problem | None = None
        self._received_bytes = 0
        self._chunks = 0
        self._waited_s = 0.0

    async def read(self) -> bytes:
        """The whole body. Raises `Problem` where it breaks a limit, `_ClientGone` where it never ends."""
        parts: list[bytes] = []
        while not self.is_finished:
            message = await self._next()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            parts.append(message.get("body", b""))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def receive_streamed(self) -> Message:
        """`receive` for the app of a body that is not kept.

        A limit that breaks is remembered and shown as a disconnect: frameworks turn exceptions of
        their `receive` into answers of their own, which the guard would have to recognise.
        """
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        if self.is_finished:
            return await self.receive()
        try:
            return await self._next()
        except Problem as problem:
            self.refusal = problem
            return {"type": "http.disconnect"}

    def too_large(self) -> Problem:
        """The refusal of a body above `max_bytes`."""
        return Problem(
            413, "payload_too_large", f"The body is larger than the {self.max_bytes} bytes this route takes."
        )

    async def _next(self) -> Message:
        allowed_s = self.limits.body_grace_s + self._received_bytes / self.limits.min_body_bytes_per_s - self._waited_s
        started = self.clock()
        interrupt = Interrupt()
        timer = asyncio.get_running_loop().call_later(min(allowed_s, self.limits.max_body_gap_s), interrupt)
        try:
            message = await self.receive()
        except asyncio.CancelledError:
            if interrupt.is_cause():
                raise self._too_slow() from None
            raise
        finally:
            timer.cancel()
        # Only waiting counts: an app that is slow to ask for more is not the client's fault.
        waited_s = self.clock() - started
        self._waited_s += waited_s
        if message["type"] == "http.request":
            self._count(message)
            if not self.is_finished and waited_s > min(allowed_s, self.limits.max_body_gap_s):
                raise self._too_slow()
        return message

    def _count(self, message: Message) -> None:
        self._received_bytes += len(message.get("body", b""))
        self._chunks += 1
        self.is_finished = not message.get("more_body", False)
        if self._received_bytes > self.max_bytes:
            raise self.too_large()
        if self._chunks > self.limits.max_body_chunks + self._received_bytes // 1024:
            raise Problem(400, "malformed_request", "The body comes in too many small pieces.")

    def _too_slow(self) -> Problem:
        detail = f"The body came slower than {self.limits.min_body_bytes_per_s} bytes a second."
        return Problem(408, "request_timeout", detail, headers={"Connection": "close"})


class _Response:
    """Passes a response on with our headers; drops what an app answers to a body that was refused."""

    __slots__ = ("_on_refusal", "_send", "_state", "body", "is_complete", "is_started", "scope")

    def __init__(
        self,
        scope: Scope,
        send: Send,
        *,
        state: DrainState,
        body: _BodyMeter,
        on_refusal: Callable[[str, int], None] | None,
    ) -> None:
        self._on_refusal = on_refusal
        self.scope = scope
        self.body = body
        self.is_started = False
        self.is_complete = False
        self._send = send
        self._state = state

    async def send(self, message: Message) -> None:
        if self.body.refusal is not None and not self.is_started:
            return
        await self._pass_on(message)

    async def refuse(self, problem: Problem) -> None:
        """Answers with `problem` in place of the app."""
        if self._on_refusal is not None:
            self._on_refusal(self.scope["method"], problem.status)
        response = problem_response(problem, path=self.scope["path"], request_id=self.scope["state"]["request_id"])
        await response(self.scope, _never_receive, self._pass_on)

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_started = True
            message = {**message, "headers": self._with_ours(message.get("headers", ()))}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True
        await self._send(message)

    def _with_ours(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        kept = [(name, value) for name, value in headers if name.lower() != b"x-request-id"]
        kept.append((b"x-request-id", self.scope["state"]["request_id"].encode("ascii")))
        # The rest of an unread body would have to be read and thrown away before the next request.
        is_body_left = self.body.is_expected and not self.body.is_finished
        if (self._state.draining or is_body_left) and not any(name.lower() == b"connection" for name, _ in kept):
            kept.append((b"connection", b"close"))
        return kept


def replay(message: Message, receive: Receive) -> Receive:
    """`receive` that gives `message` once more, then what the server says (a disconnect, after a whole body)."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return message

    return replayed


async def _never_receive() -> Message:
    return {"type": "http.disconnect"}


def headers_of(scope: Scope) -> Mapping[bytes, bytes]:
    """The request's headers by their names in lower case, the first of each name; made once a request."""
    state = scope.setdefault("state", {})
    headers: Mapping[bytes, bytes] | None = state.get("headers")
    if headers is None:
        headers = state["headers"] = dict(reversed(scope["headers"]))
    return headers


def request_id_in(headers: Mapping[bytes, bytes]) -> str:
    """The one that the client gave, where it is well-formed, else a new one."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return os.urandom(16).hex()


def _declared_bytes(headers: Mapping[bytes, bytes]) -> int | None:
    """`Content-Length`; one that is no sane number counts as larger than any limit."""
    value = headers.get(b"content-length")
    if value is None:
        return None
    return int(value) if value.isdigit() and len(value) <= 18 else 10**18


def _is_encoded(scope: Scope) -> bool:
    """Whether any `Content-Encoding` is more than `identity`; there may be several such headers, each a list."""
    values = [value for name, value in scope["headers"] if name == b"content-encoding"]
    encodings = [part.strip().lower() for value in values for part in value.split(b",")]
    return any(encoding not in (b"", b"identity") for encoding in encodings)


def _is_json(scope: Scope) -> bool:
    value = headers_of(scope).get(b"content-type")
    if value is None:
        return True
    media_type = value.partition(b";")[0].strip().lower()
    return b"json" in media_type or media_type in _TYPES_TAKEN_FOR_JSON


def _is_utf8(content: bytes) -> bool:
    if content.isascii():
        return True
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
