"""What the engine process tells a front end when it starts it: one JSON line on its standard input.

Hashes of keys are among it, so it stands neither on the command line nor in the environment, which others can read.
"""

from __future__ import annotations

import socket

import msgspec
from msgspec import Struct


class Address(Struct, frozen=True):
    """Where to listen, resolved; `family` is of `socket`."""

    family: int
    host: str
    port: int

    def bind(self, *, is_shared: bool = True) -> socket.socket:
        """A socket of its own on the address, not listening yet. With `is_shared` several processes of this user can
        have one, and the kernel deals connections out among those that listen. Raises `OSError`."""
        found = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if is_shared:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if self.family == socket.AF_INET6:
                found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            found.bind((self.host, self.port))
        except OSError:
            found.close()
            raise
        return found


class Key(Struct, frozen=True):
    """As `settings.ApiKey`."""

    name: str
    sha256: str
    scopes: list[str]
    tenant: str


class Configuration(Struct, frozen=True):
    http_path: str
    frames_path: str
    addresses: list[Address]
    keys: list[Key]
    default_model: str | None
    request_timeout_s: float
    max_body_bytes: int
    max_upload_bytes: int
    grace_s: float
    log_level: str


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Configuration).decode
