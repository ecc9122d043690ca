"""How a model is named: `name`, `name@alias`, `name:7`. Pure text, no look-up."""

from __future__ import annotations

import re
from dataclasses import dataclass

from model_registry.errors import InvalidReference

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
MAX_VERSION = 999_999_999
CHAMPION = "champion"
DEFAULT_TENANT = "default"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model by alias (the default: `champion`) or by version number; exactly one of the two is set."""

    name: str
    alias: str | None = CHAMPION
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Reads `name`, `name@alias` or `name:7`. Raises `InvalidReference`."""
        name, at, alias = text.partition("@")
        if at:
            return cls(check_name(name), check_name(alias, what="alias"))
        name, colon, version = text.partition(":")
        if not colon:
            return cls(check_name(name))
        if not _VERSION.fullmatch(version):
            raise InvalidReference(f"{version[:20]!r} is not a version number; write name:7, name@alias or name")
        return cls(check_name(name), alias=None, version=int(version))

    def __str__(self) -> str:
        return f"{self.name}:{self.version}" if self.version is not None else f"{self.name}@{self.alias}"


def check_name(text: str, *, what: str = "model name") -> str:
    """Returns `text` if it is a well-formed name. Raises `InvalidReference`."""
    if not _NAME.fullmatch(text):
        raise InvalidReference(
            f"{text[:70]!r} is not a {what}: use 1 to 64 characters of a-z, 0-9, '.', '_' and '-', "
            "the first a letter or digit"
        )
    return text
