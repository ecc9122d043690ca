"""Registers a Hugging Face sequence classifier that exists already: taken apart, proven equal, then published."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from model_registry.errors import InvalidReference, RegistryError
from model_registry.manifest import MANIFEST_NAME, ModelManifest
from model_registry.registry import Registry
from model_registry.store import ArtifactStore, put_tree
from modeling.assemble import GoldenRow, write_version_files
from modeling.backbone import locate
from modeling.engines.protocol import EngineBatch
from modeling.inputs import open_preprocessor, single

_GOLDEN_TEXTS = (
    "It works.",
    "This is not what I expected at all.",
    "The quick brown fox jumps over the lazy dog.",
    "Shares rose 3.5 % after the company reported its results.",
    "Where can I find the manual?",
    "I would recommend it to anyone who asks.",
    "a",
    "One two three four five six seven eight nine ten.",
)


class ImportRefused(RegistryError):
    """Imports are off, or the source is outside the import root."""


def import_checkpoint(
    name: str,
    source: str,
    *,
    tenant: str,
    actor: str,
    registry: Registry,
    store: ArtifactStore,
    import_root: Path | None,
    offline: bool,
) -> int:
    """Returns the new version's number. Blocking.

    Raises `ImportRefused`, `InvalidReference`, and `modeling.errors` where the checkpoint does not fit.
    """
    # torch takes seconds and 200 MB, and a server on another engine needs it for nothing else.
    from modeling.checkpoints import import_classifier
    from modeling.engines.torch import TorchEngine

    folder = _folder(source, import_root, offline=offline)
    with tempfile.TemporaryDirectory(prefix="polyhead-import-") as temporary:
        staged = Path(temporary)
        parts = import_classifier(folder, staged / "full", name=name, source=source)
        registry.check_task(tenant=tenant, name=name, task=parts.task.name)
        pooled = (
            TorchEngine(parts.backbone)
            .run(EngineBatch(single(open_preprocessor(parts.backbone).encode(_GOLDEN_TEXTS))))
            .pooled
        )
        golden = [
            GoldenRow(text, row.tolist()) for text, row in zip(_GOLDEN_TEXTS, parts.head.logits(pooled), strict=True)
        ]
        write_version_files(
            staged,
            head=parts.head,
            labels=parts.labels,
            max_length=parts.backbone.info.max_length,
            temperature=1.0,
            golden=golden,
            task=parts.task.name,
        )
        (staged / "MODEL_CARD.md").write_text(f"# {name}\n\nImported from {source}; not evaluated here.\n")
        with registry.transaction() as connection:
            version = registry.reserve(
                connection,
                tenant=tenant,
                name=name,
                task=parts.task.name,
                kind="full",
                method="import",
                job_id=None,
            )
        draft = ModelManifest(
            tenant=tenant,
            name=name,
            version=version,
            kind="full",
            task=parts.task.name,
            method="import",
            labels=parts.labels,
            created_at=time.time(),
            files=(),
        )
        manifest = draft.model_copy(update={"files": put_tree(store, draft.prefix, staged)})
    store.put_bytes(f"{manifest.prefix}/{MANIFEST_NAME}", manifest.to_bytes(), create_only=True)
    with registry.transaction() as connection:
        registry.publish(connection, manifest, actor=actor)
    return version


def _folder(source: str, import_root: Path | None, *, offline: bool) -> Path:
    if source.startswith("hub:"):
        return locate(source, offline=offline)
    if import_root is None:
        raise ImportRefused("imports from a folder are off; the operator can set import_root")
    relative = Path(source.removeprefix("file:"))
    root = import_root.resolve()
    folder = (root / relative).resolve()  # an absolute path stays itself, and is then outside or inside like any other
    if not folder.is_relative_to(root):
        raise ImportRefused("the source must be below the import root")
    if not folder.is_dir():
        raise InvalidReference(f"there is no folder {str(relative)[:200]!r} below the import root")
    return folder
