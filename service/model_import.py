"""Registers a Hugging Face sequence classifier that exists already: read in a process of its own, then published."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from model_registry.errors import DatabaseUnavailable, InvalidReference, RegistryError
from model_registry.manifest import MANIFEST_NAME, ModelManifest
from model_registry.registry import Registry
from model_registry.store import ArtifactStore, put_tree, space_errors
from modeling.child_process import ChildFailed
from modeling.intake import Imported, IntakeLimits, import_classifier
from service.inference.errors import ModelNotReady
from service.threads import on_process

_WAITING = 8


class ImportRefused(RegistryError):
    """Imports are off, or the source is outside the import root."""


class ImportsBusy(RegistryError):
    """As many imports wait as may."""

    retry_after_s = 30.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """One import. `folder` is None for a source on the hub."""

    tenant: str
    name: str
    source: str
    folder: Path | None


class ModelImports:
    """One checkpoint at a time; a few more may wait."""

    def __init__(
        self,
        registry: Registry,
        store: ArtifactStore,
        *,
        import_root: Path | None,
        is_offline: bool,
        limits: IntakeLimits,
        stop: threading.Event,
    ) -> None:
        """What is read when `stop` is set is given up."""
        self._registry, self._store, self._root = registry, store, import_root
        self._is_offline, self._limits, self._stop = is_offline, limits, stop
        self._one_at_a_time = asyncio.Semaphore(1)
        self._running: set[asyncio.Task[int]] = set()

    async def run(self, name: str, source: str, *, tenant: str, actor: str) -> int:
        """Returns the new version's number.

        Raises `ImportRefused`, `ImportsBusy`, `InvalidReference`, and `modeling.errors` if the checkpoint does not fit.
        """
        wanted = Wanted(tenant, name, source, await asyncio.to_thread(_folder, source, self._root))
        if len(self._running) > _WAITING:
            raise ImportsBusy(f"an import is running and {_WAITING} wait; repeat this one later")
        task = asyncio.create_task(self._in_turn(wanted, actor), name=f"import-{name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)  # a thread goes on if its caller leaves, and so does its turn

    async def _in_turn(self, wanted: Wanted, actor: str) -> int:
        async with self._one_at_a_time:
            try:
                return await on_process(self._import, wanted, actor)
            except ChildFailed as error:
                raise ModelNotReady("the service is shutting down", retry_after_s=1.0) from error

    def _import(self, wanted: Wanted, actor: str) -> int:
        with space_errors("the checkpoint"), tempfile.TemporaryDirectory(prefix="polyhead-import-") as temporary:
            staged = Path(temporary) / "version"
            imported = import_classifier(
                wanted.folder,
                staged,
                name=wanted.name,
                source=wanted.source,
                root=self._root,
                offline=self._is_offline,
                limits=self._limits,
                stop=self._stop,
            )
            self._registry.check_task(tenant=wanted.tenant, name=wanted.name, task=imported.task)
            card = f"# {wanted.name}\n\nImported from {wanted.source}; not evaluated here.\n"
            (staged / "MODEL_CARD.md").write_text(card)
            return self._published(self._reserved(wanted, imported), staged, actor)

    def _published(self, draft: ModelManifest, staged: Path, actor: str) -> int:
        try:
            manifest = draft.model_copy(update={"files": put_tree(self._store, draft.prefix, staged)})
            self._store.put_bytes(f"{manifest.prefix}/{MANIFEST_NAME}", manifest.to_bytes(), create_only=True)
            with self._registry.transaction() as connection:
                self._registry.publish(connection, manifest, actor=actor)
        except BaseException:
            with contextlib.suppress(DatabaseUnavailable):  # then it is abandoned a day later
                self._registry.abandon_version(tenant=draft.tenant, name=draft.name, version=draft.version)
            raise
        return manifest.version

    def _reserved(self, wanted: Wanted, imported: Imported) -> ModelManifest:
        """A manifest without files, under a number that is taken."""
        with self._registry.transaction() as connection:
            version = self._registry.reserve(
                connection,
                tenant=wanted.tenant,
                name=wanted.name,
                task=imported.task,
                kind="full",
                method="import",
                job_id=None,
            )
        return ModelManifest(
            tenant=wanted.tenant,
            name=wanted.name,
            version=version,
            kind="full",
            task=imported.task,
            method="import",
            labels=imported.labels,
            created_at=time.time(),
            files=(),
        )


def _folder(source: str, import_root: Path | None) -> Path | None:
    """The folder that a source means, None if it is on the hub. Raises `ImportRefused`, `InvalidReference`."""
    if source.startswith("hub:"):
        return None
    if import_root is None:
        raise ImportRefused("imports from a folder are off; the operator can set import_root")
    relative = Path(source.removeprefix("file:"))
    root = import_root.resolve()
    try:  # an absolute path stays itself, and is then outside or inside like any other
        folder = (root / relative).resolve()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, or not readable; a loop of links; a NUL
        raise InvalidReference(f"the folder {str(relative)[:200]!r} cannot be opened; name one that can") from error
    if not folder.is_relative_to(root):
        raise ImportRefused("the source must be below the import root")
    if not is_folder:
        raise InvalidReference(f"there is no folder {str(relative)[:200]!r} below the import root")
    return folder
