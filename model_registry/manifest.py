"""The versioned contract between trainer and server: what a version is made of.

A manifest lists every file with size and digest, and is written last: a version without one does
not exist. Nothing here opens a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_registry.errors import ManifestUnsupported
from model_registry.refs import NAME_PATTERN

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4_000_000
# Of one model. They are in its manifest, its card and its database row, and its golden rows hold a number for each.
MAX_LABELS = 10_000
MAX_LABEL_CHARACTERS = 1000
MAX_LABELS_BYTES = 256_000
_RETIRED = frozenset({"problem", "parent"})

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
VersionKind = Literal["baseline", "head", "lora", "full"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Model):
    """One file of an artefact; `path` is relative to the artefact's folder."""

    path: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,200}$")
    size: int = Field(ge=0)
    sha256: Sha256


class BackboneRef(_Model):
    """The backbone that a version was trained on, by content: `digest` covers weights, tokenizer and pooling."""

    name: str = Field(pattern=NAME_PATTERN)
    digest: Sha256
    source: str


class ModelManifest(_Model):
    """What a version is. `kind` says which files carry its weights:

    baseline: `baseline.safetensors` + `vocabulary.json`; head: `head.safetensors`;
    lora: `head.safetensors` + `adapter/`; full: `head.safetensors` + `full/`.

    `task` says what its outputs mean; `modeling.assemble` checks that it is known and fits the files.
    """

    schema_version: Literal[1] = 1
    tenant: str
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1)
    kind: VersionKind
    task: str = Field("text-classification", pattern=r"^[a-z][a-z-]{0,63}$")  # what manifests that name none mean
    method: str
    labels: tuple[str, ...]
    base: BackboneRef | None = None
    job_id: str | None = None
    created_at: float
    metrics: dict[str, float] = {}
    dataset: dict[str, Any] = {}
    files: tuple[FileEntry, ...]

    @model_validator(mode="before")
    @classmethod
    def _without_retired_fields(cls, values: Any) -> Any:
        """Manifests up to 0.1.0 name the task twice, and a parent that was never set."""
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if key not in _RETIRED}
        return values

    @property
    def prefix(self) -> str:
        """The artefact's folder in the store."""
        return version_prefix(self.tenant, self.name, self.version)

    def to_bytes(self) -> bytes:
        """Raises `ManifestUnsupported` for one that `from_bytes` could not read again."""
        content = self.model_dump_json(indent=2).encode()
        if len(content) > MAX_MANIFEST_BYTES:
            size = f"{len(content):,} bytes, more than {MAX_MANIFEST_BYTES:,}"
            raise ManifestUnsupported(f"manifest.json would have {size}")
        return content

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelManifest:
        """Raises `ManifestUnsupported` with the first field that does not fit."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "document"
            raise ManifestUnsupported(f"manifest.json: {place}: {first['msg']}") from error


def too_many_labels(labels: Iterable[str]) -> str | None:
    """Say in what labels exceed what a version can hold; None if they do not. Reads no further than it must."""
    count = total = 0
    for label in labels:
        count, total = count + 1, total + len(label.encode("utf-8", "surrogatepass"))
        if len(label) > MAX_LABEL_CHARACTERS:
            return f"the label {label[:40]!r}… has {len(label):,} characters, more than {MAX_LABEL_CHARACTERS:,}"
        if count > MAX_LABELS:
            return f"there are more than {MAX_LABELS:,} labels"
        if total > MAX_LABELS_BYTES:
            return f"the labels' names have more than {MAX_LABELS_BYTES:,} bytes"
    return None


def version_prefix(tenant: str, name: str, version: int) -> str:
    return f"models/{tenant}/{name}/{version}"


def backbone_prefix(digest: str) -> str:
    return f"backbones/{digest}"


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
