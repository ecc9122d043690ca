"""Backbones: where they come from, and what of them is kept.

`ingest` copies a source into the store once, under the digest of its content; from then on both
processes load it from there, so a version's backbone cannot change or vanish. Only safetensors and what
`modeling.ingestion` reads of the rest are kept: nothing that can carry code.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import importlib.metadata
import importlib.resources
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from model_registry.errors import ArtifactExists
from model_registry.manifest import backbone_prefix
from model_registry.store import ArtifactStore
from modeling.errors import BackboneUnavailable
from modeling.ingestion import READERS, Checkpoint, Pooling, modality_of, read_config
from modeling.ingestion.base import DENSE_FILE, PROMPTS_FILE, read_json

_FIRST_MODALITY = "text"
BACKBONE_FILE = "backbone.json"
GRAPHS_FOLDER = "graphs"  # of a backbone that came with its export
# Modules beside the plain weights, see `modeling.adapters_in_encoder`; most backbones have none.
COMPOSITION_FILE = "composition.json"
COMPOSITION_WEIGHTS = "composition.safetensors"
# What a folder of ours has beside the checkpoint; it is believed where we wrote it.
OWN_FILES = (BACKBONE_FILE, DENSE_FILE, PROMPTS_FILE, COMPOSITION_FILE, COMPOSITION_WEIGHTS)

_HUB_SOURCE = re.compile(r"(?P<repo>[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)?)@(?P<revision>[0-9a-f]{40})")
_HUB_FILES = ["*.json", "*.safetensors"]
_HUB_ANSWERS_S, _HUB_IS_SILENT_S = 5.0, 15.0
# Raise it when the same files are to be read otherwise: every source is then ingested anew. A backbone whose answers
# stay keeps its digest, and versions keep the one that they were trained on.
_SCHEMA = 3


@dataclass(frozen=True, slots=True)
class BackboneInfo:
    """What `backbone.json` says. `max_length` counts special tokens too; `hidden_size` is the output width."""

    digest: str
    name: str
    source: str
    model_type: str
    hidden_size: int
    layers: int
    max_length: int
    pooling: Pooling
    normalize: bool
    parameters: int
    modality: str = _FIRST_MODALITY

    def runs_like(self, other: BackboneInfo) -> bool:
        """Whether an engine's speed with one tells of the other: equal but for what a fine-tune leaves out, the pooler
        and the position ids of old checkpoints, and for what is done to the vector afterwards."""
        same = (self.model_type, self.hidden_size, self.layers, self.pooling)
        of_other = (other.model_type, other.hidden_size, other.layers, other.pooling)
        pooler = self.hidden_size * (self.hidden_size + 1)
        surplus, ids = abs(self.parameters - other.parameters), self.parameters // 1000
        return same == of_other and any(abs(surplus - left_out) <= ids for left_out in (0, pooler))


@dataclass(frozen=True, slots=True)
class Backbone:
    """A backbone's folder on this host, with what is known about it. No weights are loaded yet. `prompts` can be asked
    for by name."""

    info: BackboneInfo
    folder: Path
    prompts: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Backbone:
        """Raises `BackboneUnavailable`."""
        try:
            prompts = folder / PROMPTS_FILE
            by_name = json.loads(prompts.read_bytes())["prompts"] if prompts.is_file() else {}
            return cls(BackboneInfo(**json.loads((folder / BACKBONE_FILE).read_bytes())), folder, by_name)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BackboneUnavailable(f"{folder.name} holds no readable {BACKBONE_FILE}") from error


def locate(source: str, *, offline: bool, cache_dir: Path | None = None) -> Path:
    """The local folder of a source. Raises `BackboneUnavailable` with what to do.

    `pkg:module/path` is inside an installed package, `file:/folder` on this host, and
    `hub:org/name@revision` on the Hugging Face hub; a revision is required, so that a name always
    means the same weights, and with `offline` only what is in the cache is used.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "pkg":
        return _in_package(rest)
    if scheme == "file":
        folder = Path(rest)
        if not folder.is_dir():
            raise BackboneUnavailable(f"{source}: there is no such folder")
        return folder
    if scheme == "hub":
        return _from_hub(rest, offline=offline, cache_dir=cache_dir)
    raise BackboneUnavailable(f"{source}: write pkg:module/path, file:/folder or hub:org/name@revision")


def _in_package(rest: str) -> Path:
    module, _, inner = rest.partition("/")
    try:
        folder = Path(str(importlib.resources.files(module).joinpath(inner)))
    except ModuleNotFoundError as error:
        raise BackboneUnavailable(f"pkg:{rest}: the package {module} is not installed") from error
    if not folder.is_dir():
        raise BackboneUnavailable(f"pkg:{rest}: the package {module} has no folder {inner!r}")
    return folder


def _from_hub(rest: str, *, offline: bool, cache_dir: Path | None) -> Path:
    match = _HUB_SOURCE.fullmatch(rest)
    if match is None:
        raise BackboneUnavailable(
            f"hub:{rest}: name a commit of 40 hex digits, as in hub:org/name@<commit>; branches and tags can move"
        )
    from huggingface_hub import snapshot_download

    def snapshot(*, is_local: bool) -> Path:
        return Path(
            snapshot_download(
                match["repo"],
                revision=match["revision"],
                allow_patterns=_HUB_FILES,
                local_files_only=is_local,
                cache_dir=cache_dir,
            )
        )

    try:
        folder = snapshot(is_local=True)  # a commit never changes
        if offline or all(path.is_file() for path in weight_files(folder)):
            return folder
    except Exception as error:  # the hub client raises a dozen unrelated classes for "not there"
        if offline:
            name = type(error).__name__
            raise BackboneUnavailable(f"hub:{rest} is not in the local cache, and offline is set ({name})") from error
    _check_reachable(rest)
    try:
        return snapshot(is_local=False)
    except Exception as error:
        raise BackboneUnavailable(f"hub:{rest} could not be found on the hub ({type(error).__name__})") from error


def _check_reachable(rest: str) -> None:
    """Raise at once if the hub does not answer: its client tries again for half a minute, and waits for ever for a hub
    that falls silent."""
    from huggingface_hub import constants, get_session

    # Requests say that they wait for ever, so a timeout of the client would not do.
    hooks = (session := get_session()).event_hooks
    if _bound_request not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _bound_request]}
    try:
        session.head(constants.ENDPOINT, timeout=_HUB_ANSWERS_S)
    except Exception as error:
        raise BackboneUnavailable(
            f"hub:{rest}: the hub cannot be reached from here ({type(error).__name__}); allow the connection, or copy "
            "the checkpoint to a folder and name that"
        ) from error


def _bound_request(request: Any) -> None:
    given = request.extensions["timeout"]
    request.extensions["timeout"] = {
        kind: _HUB_IS_SILENT_S if seconds is None else seconds for kind, seconds in given.items()
    }


def ingest(store: ArtifactStore, folder: Path, *, name: str, source: str) -> Backbone:
    """Copies a checkpoint's encoder into the store, once per content. Returns it as stored.

    Raises `BackboneUnavailable`, `CheckpointRefused`, `ConfigRefused`, `UnsupportedArchitecture`.
    """
    note = _note(folder)
    if (known := _ingested(store, note, folder, name=name, source=source)) is not None:
        return known
    config = read_config(folder)
    modality = modality_of(config)
    checkpoint = READERS[modality].read(folder, config)
    with tempfile.TemporaryDirectory(prefix="polyhead-ingest-") as temporary:
        info, files = describe(checkpoint, folder, Path(temporary), name=name, source=source)
        READERS[modality].check(folder, _as_stored(info, files, Path(temporary)))
        prefix = backbone_prefix(info.digest)
        if not store.exists(f"{prefix}/{BACKBONE_FILE}"):
            for file_name, path in files.items():
                store.put_file(f"{prefix}/{file_name}", path)
            # Another process may ingest the same content at the same time.
            with contextlib.suppress(ArtifactExists):
                store.put_bytes(f"{prefix}/{BACKBONE_FILE}", info_bytes(info), create_only=True)
    with contextlib.suppress(ArtifactExists):
        store.put_bytes(note, info.digest.encode(), create_only=True)
    return Backbone(info, store.local_path(prefix), checkpoint.prompts)


def find_ingested(store: ArtifactStore, folder: Path, *, name: str, source: str) -> Backbone | None:
    """What `ingest` made of the same content before, without a look into it. Raises `BackboneUnavailable`."""
    return _ingested(store, _note(folder), folder, name=name, source=source)


def _note(folder: Path) -> str:
    return f"backbones/sources/{_source_digest(folder)}"


def _ingested(store: ArtifactStore, note: str, folder: Path, *, name: str, source: str) -> Backbone | None:
    if not store.exists(note):
        return None
    stored = Backbone.open(store.local_path(backbone_prefix(store.get_bytes(note, max_bytes=64).decode())))
    prompts = READERS[stored.info.modality].prompts(folder)
    return replace(stored, info=replace(stored.info, name=name, source=source), prompts=prompts)


def _as_stored(info: BackboneInfo, files: Mapping[str, Path], folder: Path) -> Backbone:
    """The backbone in `folder`, which holds what was written for it, before it is copied."""
    for file_name, path in files.items():
        if path.parent != folder:
            (folder / file_name).symlink_to(path.absolute())
    (folder / BACKBONE_FILE).write_bytes(info_bytes(info))
    return Backbone(info, folder)


def _source_digest(folder: Path) -> str:
    """Over everything in a source that decides what is kept of it, so that a known one needs no library to read."""
    digest = hashlib.sha256(f"{_SCHEMA} {importlib.metadata.version('transformers')}".encode())
    documents = [*folder.glob("*.json"), *folder.glob("*/config.json"), *folder.glob("*/*.safetensors")]
    for path in sorted({*documents, *weight_files(folder)}):
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BackboneUnavailable(
                f"{folder.name}: {path.name} cannot be read ({error.strerror}); copy the whole checkpoint again"
            ) from error
        digest.update(f"{path.relative_to(folder)}\0{content}\n".encode())
    return digest.hexdigest()


def why_retrain(store: ArtifactStore, digest: str, now: Backbone) -> str | None:
    """Why a version that was trained on the backbone `digest` should be trained again on the one that its name means
    `now`; None if they are the same."""
    if digest == now.info.digest:
        return None
    prefix, changes = backbone_prefix(digest), "the earlier reading is no longer in the store"
    if store.exists(f"{prefix}/{BACKBONE_FILE}"):
        changes = _changes(store.local_path(prefix), now.folder)
    return (
        f"the backbone {now.info.name} is read otherwise now ({changes}); this version goes on with what it was "
        "trained on, in memory of its own: train it again"
    )


@lru_cache(maxsize=256)
def _changes(before: Path, now: Path) -> str:
    """What differs between two stored backbones."""
    try:
        infos = [asdict(Backbone.open(folder).info) for folder in (before, now)]
        configs = [json.loads((folder / "config.json").read_bytes()) for folder in (before, now)]
        weights = [_plain_weight_files(folder) for folder in (before, now)]
    except (BackboneUnavailable, OSError, ValueError):
        return "the earlier reading cannot be read"
    found = [
        f"{name} {infos[0][name]} before, {infos[1][name]} now"
        for name in ("model_type", "pooling", "normalize", "max_length", "hidden_size")
        if infos[0][name] != infos[1][name]
    ]
    keys = sorted(key for key in {*configs[0], *configs[1]} if configs[0].get(key) != configs[1].get(key))
    found += [f"config.json: {', '.join(keys[:10])}"] if keys else []
    files = {"tokenizer.json": "its tokenizer", DENSE_FILE: "its Dense layers", PROMPTS_FILE: "its default prompt"}
    found += [words for name, words in files.items() if not _are_same([before / name, now / name])]
    same = len(weights[0]) == len(weights[1]) and all(map(_are_same, zip(*weights, strict=False)))
    found += [] if same else ["its weights"]
    return "; ".join(found) or "its composition"


def _are_same(paths: Sequence[Path]) -> bool:
    one, other = paths
    if not one.is_file() or not other.is_file():
        return one.is_file() == other.is_file()
    return filecmp.cmp(one, other, shallow=False)


def info_bytes(info: BackboneInfo) -> bytes:
    values = asdict(info)
    if values["modality"] == _FIRST_MODALITY:  # which earlier releases leave out
        del values["modality"]
    return json.dumps(values, indent=2).encode()


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards and their index, and what a composition adds. Raises `BackboneUnavailable`."""
    composition = [folder / COMPOSITION_FILE, folder / COMPOSITION_WEIGHTS]
    return [*_plain_weight_files(folder), *(composition if composition[0].is_file() else [])]


def _plain_weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise BackboneUnavailable(
            f"{folder.name} has no model.safetensors; pickled weights are never loaded, convert them"
        )
    places = read_json(index, {}).get("weight_map")
    shards = set(map(str, places.values())) if isinstance(places, dict) else set()
    if not shards or any("/" in name or not name.endswith(".safetensors") for name in shards):
        raise BackboneUnavailable(f"{folder.name}: the index names files that are not safetensors shards beside it")
    return [index, *(folder / name for name in sorted(shards))]


def describe(
    checkpoint: Checkpoint, weights: Path, target: Path, *, name: str, source: str
) -> tuple[BackboneInfo, dict[str, Path]]:
    """Write what is kept of a checkpoint beside its weights into `target`. Returns the backbone's description and all
    its files by name. The digest is over names and contents of the files and what else decides the answers."""
    config = json.dumps(checkpoint.config, indent=2, sort_keys=True).encode()
    files = {path.name: path for path in weight_files(weights)}
    for file_name, content in {"config.json": config, **checkpoint.files}.items():
        files[file_name] = target / file_name
        files[file_name].write_bytes(content)
    digest = hashlib.sha256(json.dumps(checkpoint.identity).encode())
    for file_name in sorted(files):
        with files[file_name].open("rb") as file:
            digest.update(f"{file_name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    info = BackboneInfo(
        digest=digest.hexdigest(),
        name=name,
        source=source,
        model_type=checkpoint.config["model_type"],
        hidden_size=checkpoint.hidden_size,
        layers=checkpoint.layers,
        max_length=checkpoint.max_length,
        pooling=checkpoint.pooling,
        normalize=checkpoint.normalize,
        parameters=sum(map(_parameters, files.values())),
        modality=modality_of(checkpoint.config),
    )
    return info, files


def _parameters(path: Path) -> int:
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return 0
    try:
        with safe_open(str(path), framework="numpy") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise BackboneUnavailable(
            f"{path.name} is not a complete safetensors file ({error}); copy the checkpoint again"
        ) from error
