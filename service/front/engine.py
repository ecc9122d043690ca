"""The engine process: the whole application on Unix sockets, with front ends before it that take the connections.

The sockets lie in a folder made for this process, which only its user may enter (mode 0700). That is the boundary:
HTTP that comes through it is authenticated once more, but a frame is believed, with the tenant that it names.
"""

from __future__ import annotations

import errno
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import uvicorn

from service.api.deps import Services
from service.api.guard import DrainState
from service.app import create_app
from service.front import configuration
from service.front.configuration import Address, Configuration, Key
from service.front.exchange import exchange
from service.front.supervisor import FrontEnds
from service.metrics import ServingMetrics
from service.server import DrainingServer, DrainTimes, HeaderLimits, server_config
from service.settings import ServingSettings, front_end_environment

MAX_PATH_BYTES: Final = 107
"""Of a Unix socket, by the kernel."""
FRAME_ROOM_BYTES: Final = 64 * 1024
"""What a request may be longer as a frame than as the JSON it came in."""
INNER_HEADERS: Final = HeaderLimits(
    max_header_bytes=HeaderLimits().max_header_bytes + 1024, max_headers=HeaderLimits().max_headers + 4
)
"""A front end adds a few to what it has already held to the limits."""
LAST_WORDS_S: Final = 1.0
"""After the grace, for front ends to answer what they give up."""


@dataclass(frozen=True, slots=True)
class Sockets:
    """Where this process listens for its front ends."""

    folder: Path

    def __post_init__(self) -> None:
        if len(self.frames.encode()) > MAX_PATH_BYTES:
            raise SystemExit(f"{self.folder} is too long for the path of a socket; set TMPDIR to a shorter folder")

    @property
    def http(self) -> str:
        return str(self.folder / "http.sock")

    @property
    def frames(self) -> str:
        return str(self.folder / "frames.sock")


def serve_behind_front_ends(
    settings: ServingSettings,
    build: Callable[[], AbstractAsyncContextManager[Services]],
    drain: DrainState,
    metrics: ServingMetrics,
    times: DrainTimes,
) -> None:
    """Serves until a signal ends it. Exits with status 1 where the address is taken, 3 where the start fails."""
    held = hold(settings.host, settings.port)
    with tempfile.TemporaryDirectory(prefix="polyhead-", ignore_cleanup_errors=True) as folder:
        sockets = Sockets(Path(folder))
        front_ends = FrontEnds(
            settings.http_processes,
            configuration.encode(configured(settings, sockets, [address for address, _ in held])),
            environment=front_end_environment(),
            listening=metrics.front_ends,
            restarts=metrics.front_end_restarts_total,
        )

        @asynccontextmanager
        async def built() -> AsyncIterator[Services]:
            async with build() as services:
                listened = replace(services, is_listening=front_ends.have_listened)
                frames = exchange(
                    listened,
                    drain,
                    metrics,
                    path=sockets.frames,
                    max_request_bytes=settings.max_body_bytes + FRAME_ROOM_BYTES,
                )
                async with frames, front_ends.running():
                    yield listened

        app = create_app(settings, built, drain, metrics)
        config = server_config(app, INNER_HEADERS, uds=sockets.http, lifespan="on", timeout_keep_alive=75)
        try:
            EngineServer(config, drain, replace(times, grace_s=times.grace_s + LAST_WORDS_S), front_ends).run()
        finally:
            for _, holder in held:
                holder.close()


class EngineServer(DrainingServer):
    """A drain in step with the front ends: they refuse, and this process ends when they have."""

    def __init__(self, config: uvicorn.Config, state: DrainState, times: DrainTimes, front_ends: FrontEnds) -> None:
        super().__init__(config, state, times)
        self._front_ends = front_ends

    def begin_drain(self) -> None:
        super().begin_drain()
        self._front_ends.drain()

    def begin_refusing(self) -> None:
        super().begin_refusing()
        self._front_ends.refuse()

    def is_idle(self) -> bool:
        return super().is_idle() and self._front_ends.have_ended()


def hold(host: str, port: int) -> list[tuple[Address, socket.socket]]:
    """The addresses of `host`, each with a socket that keeps it ours and takes no connection.

    One that another program listens on is refused, though the kernel would share it among programs of one user. Raises
    `SystemExit`.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        held: list[tuple[Address, socket.socket]] = []
        for family, _, _, _, place in dict.fromkeys(found):
            address = Address(int(family), str(place[0]), held[0][0].port if held else port)
            try:
                with closing(address.bind(is_shared=False)) as alone:
                    alone.listen(1)
                    address = Address(address.family, address.host, alone.getsockname()[1])
                held.append((address, address.bind()))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # a family that this machine has not enabled
                    raise
        if not held:
            raise OSError(errno.EADDRNOTAVAIL, "no such address here")
    except OSError as error:
        raise SystemExit(f"cannot listen on {host}, port {port}: {error}") from error
    return held


def configured(settings: ServingSettings, sockets: Sockets, addresses: list[Address]) -> Configuration:
    """What a front end is told."""
    return Configuration(
        http_path=sockets.http,
        frames_path=sockets.frames,
        addresses=addresses,
        keys=[Key(key.name, key.sha256, sorted(key.scopes), key.tenant) for key in settings.api_keys],
        default_model=settings.default_model,
        request_timeout_s=settings.request_timeout_s,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        grace_s=settings.drain_grace_s,
        log_level=settings.log_level,
    )
