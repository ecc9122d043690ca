"""A checkpoint's folder as it arrives: the configuration without keys that name code, and what a modality reads of the
rest. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from modeling.errors import BackboneUnavailable, CheckpointRefused, ConfigRefused

if TYPE_CHECKING:
    from modeling.backbone import Backbone

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
MAX_JSON_BYTES = 64 << 20  # of one file; the largest that are published have some 35 MB
# Far beyond any encoder; what exceeds them would only fill memory before it fails.
_MOST: Mapping[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "num_attention_heads", "n_heads"), 1024),
    **dict.fromkeys(("hidden_size", "dim", "d_model", "embedding_size"), 1 << 16),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff", "type_vocab_size"), 1 << 20),
    "num_labels": 1 << 20,
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "position_buckets"), 1 << 23),
}


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

    def check_files(self, folder: Path) -> None:
        """Raise for what a folder's own files alone show to be unfit. Needs no torch. Raises as `check` does."""

    def check(self, folder: Path, taken: Backbone) -> None:
        """Raise unless what was taken of a folder is fit to serve and computes what the folder's own files compute.

        Raises `BackboneUnavailable`, `CheckpointRefused`.
        """


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` without its private keys. Raises `BackboneUnavailable`, `ConfigRefused` for keys that name code."""
    raw = read_json(folder / "config.json", {})
    if "model_type" not in raw:
        raise BackboneUnavailable(f"{folder.name}: config.json is missing or names no model_type")
    _check_numbers(raw)
    if isinstance(raw.get("id2label"), list):  # which transformers cannot read, and means the same
        raw["id2label"] = dict(enumerate(raw["id2label"]))
    refused = sorted(key for key, value in raw.items() if _names_code(key, value))
    if refused:
        raise ConfigRefused(f"config.json sets {', '.join(refused)}, which is never taken from a checkpoint; remove it")
    return {key: value for key, value in raw.items() if not key.startswith("_")}


def _names_code(key: str, value: Any) -> bool:
    is_plain = value is None or isinstance(value, bool | int | float)
    is_kernel = key.endswith("_implementation") and "/" in str(value)  # of the hub
    is_private = key.startswith("_") and key not in _HARMLESS_PRIVATE_KEYS
    return key in _REFUSED_KEYS or is_kernel or (is_private and not is_plain)


def _check_numbers(config: dict[str, Any]) -> None:
    """Raise `CheckpointRefused` for numbers that no encoder can be built with."""
    for key, number in _numbers(config):
        if not math.isfinite(number):
            raise CheckpointRefused(f"config.json: {key[:60]} is {number}; write a finite number, or remove the key")
    for key, value in config.items():
        if key.endswith(("_eps", "_epsilon")) and not (isinstance(value, int | float) and 0 < value < 1):
            raise CheckpointRefused(f"config.json: {key} is {str(value)[:40]}; write a number above 0 and below 1")
        most = _MOST.get(key)
        if most is not None and isinstance(value, int | float) and value > most:
            raise CheckpointRefused(f"config.json: {key} is {str(value)[:40]}, more than {most:,}; correct it")


def _numbers(document: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every fraction with the key that it is under; without recursion, since the document may be nested deep."""
    waiting: list[tuple[str, Any]] = list(document.items())
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, float):
            yield place, value
        elif isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((place, item) for item in value)


def read_json(path: Path, default: Value) -> Value:
    """A document of `default`'s kind, or `default` if there is no such file. Raises `BackboneUnavailable`, and
    `CheckpointRefused` if it is too large."""
    if not path.is_file():
        return default
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointRefused(f"{path.name} has more than {MAX_JSON_BYTES:,} bytes; save the checkpoint again")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneUnavailable(f"{path.name} is not JSON ({str(error)[:100]}); save the checkpoint again") from error
    if not isinstance(value, type(default)):
        raise BackboneUnavailable(f"{path.name} holds no {'object' if isinstance(default, dict) else 'list'}")
    return value
