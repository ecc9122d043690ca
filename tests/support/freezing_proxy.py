"""A PostgreSQL that stops answering without closing anything: a proxy before a real one that stops forwarding."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

_PIECE = 65536


class FreezingProxy:
    """On a port of this host; use as a context manager."""

    def __init__(self, server_url: str) -> None:
        self._behind = sa.make_url(server_url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._forwards = threading.Event()
        self._forwards.set()
        self._threads: list[threading.Thread] = []
        self._is_over = False
        self.accepted = 0

    @property
    def url(self) -> str:
        """Of the same database, through the proxy."""
        port = self._listener.getsockname()[1]
        behind = self._behind.set(host="127.0.0.1", port=port, query={})
        return behind.render_as_string(hide_password=False)

    def freeze(self) -> None:
        """What comes from either side is taken and kept; new connections are accepted and get no answer."""
        self._forwards.clear()

    def thaw(self) -> None:
        self._forwards.set()

    def __enter__(self) -> FreezingProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over = True
        self.thaw()
        # Shutting a socket down wakes its thread; the closing is left to the end, when no thread can meet it.
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            for each in (self._listener, *self._sockets):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            alive[0].join(0.1)
        for each in (self._listener, *self._sockets):
            each.close()

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while not self._is_over:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._sockets.append(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        self._forwards.wait()
        if self._is_over:
            return
        server = self._connect()
        self._sockets.append(server)
        self._start(self._forward, client, server)
        self._start(self._forward, server, client)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                self._forwards.wait()
                target.sendall(piece)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> socket.socket:
        folder = str(self._behind.query.get("host", ""))
        if not folder.startswith("/"):
            return socket.create_connection((self._behind.host or "127.0.0.1", self._behind.port or 5432))
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(next(Path(folder).glob(".s.PGSQL.*[0-9]"))))
        return server
