"""A guarded application behind a real socket, in a thread of this process, and raw bytes to and from it."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import uvicorn

from service.api.guard import RequestGuard
from service.http_limits import HeaderLimits, limited_protocol
from service.server import DrainingServer, DrainTimes

WAIT_S = 10.0


@dataclass
class Edge:
    """A running server and ways to talk to it."""

    port: int
    server: DrainingServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def exchange(self, *parts: bytes, ends_input: bool = False) -> bytes:
        """Sends the parts on one connection and returns all that comes back until it closes, at an end or a reset.
        With `ends_input` the client says that it sends no more."""
        with closing(self.connect()) as connection:
            with suppress(ConnectionError):  # refused while it was still sending
                for part in parts:
                    connection.sendall(part)
                if ends_input:
                    connection.shutdown(socket.SHUT_WR)
            return read_all(connection)


@contextmanager
def serving(
    guard: RequestGuard, header_limits: HeaderLimits | None = None, *, lifespan: Literal["on", "off"] = "on"
) -> Iterator[Edge]:
    """Serves `guard` on a free port of 127.0.0.1 until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        guard,
        http=limited_protocol(header_limits or HeaderLimits()),
        loop="uvloop",
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    server = DrainingServer(config, guard.state, DrainTimes(drain_delay_s=0, grace_s=1, exit_within_s=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Edge(listener.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        listener.close()
        assert not thread.is_alive()


def wait_until(is_true: Callable[[], Any], within_s: float = WAIT_S) -> None:
    end = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def read_answer(connection: socket.socket) -> bytes:
    """One response with a Content-Length; the connection may stay open."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def problem_in(raw: bytes) -> dict[str, Any]:
    """The problem document of the one response in `raw`, after checks that hold for each of them."""
    head, _, body = raw.partition(b"\r\n\r\n")
    assert raw.count(b"HTTP/1.1 ") == 1, raw
    assert b"content-type: application/problem+json" in head
    document: dict[str, Any] = json.loads(body)
    assert head.startswith(f"HTTP/1.1 {document['status']} ".encode())
    assert f"x-request-id: {document['request_id']}".encode() in head
    assert b"Traceback" not in raw
    return document


def refusal(raw: bytes) -> tuple[int, str]:
    document = problem_in(raw)
    assert b"connection: close" in raw.lower()
    return document["status"], document["code"]


def post(path: str, *headers: str, media_type: str = "application/json") -> bytes:
    """A request's line and headers, the blank line included."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {media_type}", *headers, "", ""]
    return "\r\n".join(lines).encode()


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
