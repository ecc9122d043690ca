"""Backbones: where they come from, and what of them is kept.

`ingest` copies a source into the store once, under the digest of its content; from then on both
processes load it from there, so a version's backbone cannot change or vanish. Only safetensors,
`tokenizer.json` and a configuration reduced to known keys are kept: nothing that can carry code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.resources
import json
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from model_registry.errors import ArtifactExists
from model_registry.manifest import backbone_prefix
from model_registry.store import ArtifactStore
from modeling.errors import BackboneUnavailable, ConfigRefused, UnsupportedArchitecture

Pooling = Literal["mean", "cls"]
_FIRST_MODALITY = "text"
BACKBONE_FILE = "backbone.json"
GRAPHS_FOLDER = "graphs"  # of a backbone that came with its export
# Modules beside the plain weights, see `modeling.adapters_in_encoder`; most backbones have none.
COMPOSITION_FILE = "composition.json"
COMPOSITION_WEIGHTS = "composition.safetensors"

# Encoders whose output is a row of token states; each was checked against this loader.
SUPPORTED_MODEL_TYPES = frozenset(
    {"albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"}
)
# Configuration keys through which published attacks made a loader run code of the checkpoint's choosing.
_REFUSED_KEYS = frozenset(
    {"auto_map", "custom_pipelines", "trust_remote_code", "custom_generate", "quantization_config"}
)
_HARMLESS_PRIVATE_KEYS = frozenset({"_name_or_path", "_commit_hash", "_num_labels"})
_HUB_SOURCE = re.compile(r"(?P<repo>[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)?)@(?P<revision>[0-9a-f]{40})")
_HUB_FILES = [
    "config.json",
    "tokenizer.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*/config.json",
    "modules.json",
    "sentence_bert_config.json",
]


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
        """Whether an engine's speed with one tells of the other: equal but for the pooler of some encoders, which a
        fine-tune leaves out, and for what is done to the vector afterwards."""
        same = (self.model_type, self.hidden_size, self.layers, self.pooling)
        of_other = (other.model_type, other.hidden_size, other.layers, other.pooling)
        pooler = self.hidden_size * (self.hidden_size + 1)
        return same == of_other and abs(self.parameters - other.parameters) in {0, pooler}


@dataclass(frozen=True, slots=True)
class Backbone:
    """A backbone's folder on this host, with what is known about it. No weights are loaded yet."""

    info: BackboneInfo
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Backbone:
        """Raises `BackboneUnavailable`."""
        try:
            return cls(BackboneInfo(**json.loads((folder / BACKBONE_FILE).read_bytes())), folder)
        except (OSError, ValueError, TypeError) as error:
            raise BackboneUnavailable(f"{folder.name} holds no readable {BACKBONE_FILE}") from error


def locate(source: str, *, offline: bool, cache_dir: Path | None = None) -> Path:
    """The local folder of a source. Raises `BackboneUnavailable` with what to do.

    `pkg:module/path` lies inside an installed package, `file:/folder` on this host, and
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

    try:
        return Path(
            snapshot_download(
                match["repo"],
                revision=match["revision"],
                allow_patterns=_HUB_FILES,
                local_files_only=offline,
                cache_dir=cache_dir,
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated classes for "not there"
        where = "in the local cache (offline)" if offline else "on the hub"
        raise BackboneUnavailable(f"hub:{rest} could not be found {where} ({type(error).__name__})") from error


def ingest(store: ArtifactStore, folder: Path, *, name: str, source: str) -> Backbone:
    """Copies a checkpoint's encoder into the store, once per content. Returns it as stored.

    Raises `BackboneUnavailable`, `ConfigRefused`, `UnsupportedArchitecture`.
    """
    note = f"backbones/sources/{_source_digest(folder)}"
    if store.exists(note):
        stored = Backbone.open(store.local_path(backbone_prefix(store.get_bytes(note, max_bytes=64).decode())))
        return replace(stored, info=replace(stored.info, name=name, source=source))
    with tempfile.TemporaryDirectory(prefix="polyhead-ingest-") as temporary:
        config = read_config(folder)
        files = {"config.json": Path(temporary, "config.json"), "tokenizer.json": folder / "tokenizer.json"}
        files["config.json"].write_text(json.dumps(config, indent=2, sort_keys=True))
        files |= {path.name: path for path in weight_files(folder)}
        info = describe(folder, config, name=name, source=source, digest=content_digest(folder, files))
        prefix = backbone_prefix(info.digest)
        if not store.exists(f"{prefix}/{BACKBONE_FILE}"):
            for file_name, path in files.items():
                store.put_file(f"{prefix}/{file_name}", path)
            # Another process may ingest the same content at the same time.
            with contextlib.suppress(ArtifactExists):
                store.put_bytes(f"{prefix}/{BACKBONE_FILE}", info_bytes(info), create_only=True)
    with contextlib.suppress(ArtifactExists):
        store.put_bytes(note, info.digest.encode(), create_only=True)
    return Backbone(info, store.local_path(prefix))


def _source_digest(folder: Path) -> str:
    """Over everything in a source that decides what is kept of it, so that a known one needs no library to read."""
    digest = hashlib.sha256(importlib.metadata.version("transformers").encode())
    documents = [*folder.glob("*.json"), *folder.glob("*/config.json")]
    for path in sorted({*documents, *weight_files(folder)}):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)}\0{content}\n".encode())
    return digest.hexdigest()


def info_bytes(info: BackboneInfo) -> bytes:
    values = asdict(info)
    if values["modality"] == _FIRST_MODALITY:  # which earlier releases leave out
        del values["modality"]
    return json.dumps(values, indent=2).encode()


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` reduced to the keys that its model type knows.

    Raises `ConfigRefused` for keys that name code, `UnsupportedArchitecture` for other model types.
    """
    try:
        raw = json.loads((folder / "config.json").read_bytes())
        model_type = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneUnavailable(f"{folder.name}: config.json is missing, not JSON or names no model_type") from error
    refused = sorted(key for key in raw if _is_refused(key))
    if refused:
        raise ConfigRefused(f"config.json sets {', '.join(refused)}, which is never taken from a checkpoint; remove it")
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(sorted(SUPPORTED_MODEL_TYPES))
        raise UnsupportedArchitecture(
            f"model_type {str(model_type)[:40]!r} is not supported; supported are {supported}"
        )
    from transformers import AutoConfig

    known = set(AutoConfig.for_model(model_type).to_dict()) | {"id2label", "label2id", "problem_type", "architectures"}
    return {key: value for key, value in raw.items() if key in known and not key.startswith("_")}


def _is_refused(key: str) -> bool:
    return key in _REFUSED_KEYS or (key.startswith("_") and key not in _HARMLESS_PRIVATE_KEYS)


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
    shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    if any("/" in name or not name.endswith(".safetensors") for name in shards):
        raise BackboneUnavailable(f"{folder.name}: the index names files that are not safetensors shards beside it")
    return [index, *(folder / name for name in shards)]


def content_digest(folder: Path, files: dict[str, Path]) -> str:
    """One digest over names and contents of the kept files and over the pooling: the backbone's identity."""
    digest = hashlib.sha256(json.dumps(_pooling(folder)).encode())
    for name in sorted(files):
        if not files[name].is_file():
            raise BackboneUnavailable(f"{folder.name} has no {name}")
        with files[name].open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def describe(folder: Path, config: dict[str, Any], *, name: str, source: str, digest: str) -> BackboneInfo:
    from transformers import AutoConfig

    full = AutoConfig.for_model(**config)
    pooling, normalize, length = _pooling(folder)
    # Position tables of the RoBERTa family start behind the padding index.
    offset = (full.pad_token_id or 0) + 1 if full.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"} else 0
    positions = int(full.max_position_embeddings) - offset
    return BackboneInfo(
        digest=digest,
        name=name,
        source=source,
        model_type=full.model_type,
        hidden_size=int(full.hidden_size),
        layers=int(full.num_hidden_layers),
        max_length=min(length or positions, positions),
        pooling=pooling,
        normalize=normalize,
        parameters=count_parameters(folder),
    )


def _pooling(folder: Path) -> tuple[Pooling, bool, int | None]:
    """Pooling, normalisation and length limit by the sentence-transformers files; a plain encoder gets mean pooling."""
    modules = _optional_json(folder / "modules.json") or []
    normalize = any(str(module.get("type", "")).endswith("Normalize") for module in modules)
    length = (_optional_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    own = _optional_json(folder / BACKBONE_FILE)
    if own:
        return own["pooling"], own["normalize"], own["max_length"]
    folders = [module["path"] for module in modules if str(module.get("type", "")).endswith("Pooling")]
    if folders and re.fullmatch(r"[A-Za-z0-9_]{1,40}", folders[0]):
        pooling = _optional_json(folder / folders[0] / "config.json") or {}
        if pooling.get("pooling_mode_cls_token"):
            return "cls", normalize, length
        if not pooling.get("pooling_mode_mean_tokens", True):
            raise UnsupportedArchitecture("this sentence-transformers pooling is not supported; mean and cls are")
    return "mean", normalize, length


def _optional_json(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.is_file() else None


def count_parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    count = 1
                    for size in file.get_slice(key).get_shape():
                        count *= size
                    total += count
    return total
