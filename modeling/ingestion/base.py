"""A checkpoint's folder as it arrives: the configuration without keys that name code, and what a modality reads of the
rest. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from modeling.errors import BackboneUnavailable, ConfigRefused

Pooling = str
"""Names of `POOLING_MODES`; the vectors of several, as in `cls+max`, are joined in that order."""
POOLING_MODES: Final = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
DENSE_FILE: Final = "dense.safetensors"
"""Layers behind the pooling, as `TaskHead` writes its own; most backbones have none."""
PROMPTS_FILE: Final = "prompts.json"
"""`prompts` by name, and the `default` one, which comes before every text unless a request names another."""
Value = TypeVar("Value", dict[str, Any], list[Any])
# Configuration keys through which published attacks made a loader run code of the checkpoint's choosing.
_REFUSED_KEYS = frozenset(
    {"auto_map", "custom_pipelines", "trust_remote_code", "custom_generate", "quantization_config"}
)
_HARMLESS_PRIVATE_KEYS = frozenset({"_name_or_path", "_commit_hash", "_num_labels"})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is kept of a folder, and what is known of it before its weights are read.

    `files` are kept beside `config.json` and the weights, by name. `max_length` counts special tokens too,
    `hidden_size` is the output's width. `identity` is what else decides the answers, as JSON; it goes into the digest.
    `prompts` can be asked for by name.
    """

    config: dict[str, Any]
    files: Mapping[str, bytes]
    hidden_size: int
    layers: int
    max_length: int
    pooling: Pooling
    normalize: bool
    identity: Any
    prompts: Mapping[str, str] = field(default_factory=dict)


class Reader(Protocol):
    """`model_types` are those of `config.json` that this modality has."""

    model_types: frozenset[str]

    def read(self, folder: Path, config: dict[str, Any], *, has_head: bool = False) -> Checkpoint:
        """Read the files of an encoder; with `has_head` those of a classifier, whose states nothing pools.

        Raises `BackboneUnavailable`, `UnsupportedArchitecture`.
        """

    def prompts(self, folder: Path) -> Mapping[str, str]:
        """Return the prompts of a folder by name. Raises `BackboneUnavailable`."""

    def check_weights(self, folder: Path) -> None:
        """Raise `BackboneUnavailable` unless the folder's tensors are those of its encoder."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` without its private keys. Raises `BackboneUnavailable`, `ConfigRefused` for keys that name code."""
    raw = read_json(folder / "config.json", {})
    if "model_type" not in raw:
        raise BackboneUnavailable(f"{folder.name}: config.json is missing or names no model_type")
    refused = sorted(key for key, value in raw.items() if _names_code(key, value))
    if refused:
        raise ConfigRefused(f"config.json sets {', '.join(refused)}, which is never taken from a checkpoint; remove it")
    return {key: value for key, value in raw.items() if not key.startswith("_")}


def _names_code(key: str, value: Any) -> bool:
    is_plain = value is None or isinstance(value, bool | int | float)
    is_kernel = key.endswith("_implementation") and "/" in str(value)  # of the hub
    is_private = key.startswith("_") and key not in _HARMLESS_PRIVATE_KEYS
    return key in _REFUSED_KEYS or is_kernel or (is_private and not is_plain)


def read_json(path: Path, default: Value) -> Value:
    """A document of `default`'s kind, or `default` if there is no such file. Raises `BackboneUnavailable`."""
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BackboneUnavailable(f"{path.name} is not JSON ({str(error)[:100]}); save the checkpoint again") from error
    if not isinstance(value, type(default)):
        raise BackboneUnavailable(f"{path.name} holds no {'object' if isinstance(default, dict) else 'list'}")
    return value
