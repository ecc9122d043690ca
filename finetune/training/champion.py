"""The champion as an opponent: read from the store, run as a server would, with what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.training.run_context import Run, embed
from model_registry.manifest import ModelManifest
from model_registry.store import ArtifactStore, load_manifest
from modeling.assemble import VersionParts, read_version
from modeling.backbone import Backbone
from modeling.engines.build import REFERENCE, EngineOptions, build_engine
from modeling.engines.protocol import Engine
from modeling.errors import BackboneUnavailable
from modeling.inputs import Example, open_preprocessor
from modeling.tasks import Calibration
from modeling.weights import FloatArray

_KEY = "champion"
FINGERPRINT = "data/fingerprint.json"


@dataclass(frozen=True, slots=True)
class Champion:
    """`logits` gives the outputs of examples, which mean what `task` and `answering` say. `seen` holds the hashes of
    its training and validation rows, None where the version does not tell."""

    version: int
    labels: tuple[str, ...]
    seen: frozenset[str] | None
    logits: Callable[[Sequence[Example]], FloatArray]
    task: str
    answering: Calibration


def read_champion(store: ArtifactStore, run: Run, pointer: dict[str, Any], *, tenant: str, name: str) -> Champion:
    """`pointer` holds `version` and `manifest_sha256`. Raises `ArtifactError` and `ModelingError` and their kinds."""
    version = int(pointer["version"])
    manifest = load_manifest(store, tenant=tenant, name=name, version=version, sha256=pointer["manifest_sha256"])
    parts = read_version(store, manifest)
    return Champion(
        version,
        manifest.labels,
        _seen(store, manifest),
        _logits(store, run, parts),
        task=manifest.task,
        answering=parts.calibration,
    )


def _seen(store: ArtifactStore, manifest: ModelManifest) -> frozenset[str] | None:
    if FINGERPRINT not in {file.path for file in manifest.files}:
        return None
    path: Path = store.local_path(f"{manifest.prefix}/{FINGERPRINT}")
    hashes = json.loads(path.read_bytes()).get("row_hashes")
    if hashes is None:
        return None
    return frozenset(hashes["train"]) | frozenset(hashes["validation"])


def _logits(store: ArtifactStore, run: Run, parts: VersionParts) -> Callable[[Sequence[Example]], FloatArray]:
    if parts.linear is not None:
        return parts.linear.margins
    head = parts.head
    assert head is not None
    if parts.backbone is None and parts.adapter is None and _base(store, run, parts) is run.backbone:
        return lambda examples: head.logits(
            run.reference.of(examples, max_length=parts.max_length or run.backbone.info.max_length)
        )
    engine = _engine(store, run, parts)
    preprocessor = open_preprocessor(parts.backbone or _base(store, run, parts), limit=parts.max_length)
    adapter = None
    if parts.adapter is not None:
        engine.load_adapter(_KEY, parts.adapter)
        adapter = _KEY
    return lambda examples: head.logits(embed(engine, preprocessor, examples, adapter=adapter))


def _engine(store: ArtifactStore, run: Run, parts: VersionParts) -> Engine:
    backbone = parts.backbone or _base(store, run, parts)
    if backbone is run.backbone:
        return run.engine
    return build_engine(REFERENCE, backbone, None, EngineOptions(run.plan.device))


def _base(store: ArtifactStore, run: Run, parts: VersionParts) -> Backbone:
    base = parts.manifest.base
    if base is None:
        raise BackboneUnavailable("the champion names no backbone")
    if base.digest == run.backbone.info.digest:
        return run.backbone
    return Backbone.open(store.local_path(f"backbones/{base.digest}"))
