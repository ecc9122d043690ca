"""The protocol driven by hand: bytes in, no socket. What needs one is in tests/integration/test_http_edge.py."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from service.api.cancellation import CONNECTION_LOST
from service.http_limits import HeaderLimits, limited_protocol
from tests.support.turns import settled


class Transport(asyncio.Transport):
    """Notes whether the protocol wants to read."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 50000), "sockname": ("127.0.0.1", 8000)})
        self.is_read = True

    def write(self, data: Any) -> None: ...

    def close(self) -> None: ...

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True


def test_a_connection_is_read_while_its_request_is_served_so_that_its_end_is_seen() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        seen.append("complete")
        await scope["extensions"][CONNECTION_LOST]["future"]
        seen.append("lost")

    async def main() -> None:
        config = uvicorn.Config(app, http=limited_protocol(HeaderLimits()), ws="none", log_config=None)
        config.load()
        protocol = cast(Any, config.http_protocol_class)(config=config, server_state=ServerState(), app_state={})
        transport = Transport()
        protocol.connection_made(transport)
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        await settled()  # the application waits for the body
        protocol.data_received(b"1" * 100_000)  # above the mark at which uvicorn stops reading
        await settled()
        assert (seen, transport.is_read) == (["complete"], True)
        protocol.connection_lost(None)
        await settled()
        assert seen == ["complete", "lost"]

    asyncio.run(main())
