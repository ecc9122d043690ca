"""Errors of the registry.

RegistryError
├── ModelNotFound          no such model, version or alias
├── AliasConflict          the alias moved since the caller looked
├── InvalidReference       a name, alias or key that is not well formed
├── VersionNotServable     the version exists but is not in state `ready`
├── StillNeeded            what should be deleted is in use; it says by what
│   ├── VersionInUse
│   └── ModelInUse
├── ArtifactError          a stored file is missing, altered or not allowed
│   ├── HashMismatch
│   ├── ManifestUnsupported
│   └── ArtifactExists     a create-only write found the key taken
├── StoreFull              no space left for the write; nothing was kept
├── StoreUnavailable       the data directory is gone, is another or cannot be written
└── DatabaseUnavailable    locked or gone for longer than the busy timeout
"""

from __future__ import annotations

from collections.abc import Sequence


class RegistryError(Exception):
    """Base of all errors of this package."""


class ModelNotFound(RegistryError):
    """No such model, version or alias."""


class AliasConflict(RegistryError):
    """The alias points elsewhere than the caller expected."""

    def __init__(self, message: str, *, current_version: int | None) -> None:
        super().__init__(message)
        self.current_version = current_version


class InvalidReference(RegistryError):
    """A name, alias, version or artefact key that is not well formed."""


class VersionNotServable(RegistryError):
    """The version exists but its artefact was never completed, or was withdrawn."""


class StillNeeded(RegistryError):
    """What should be deleted is in use. `errors` lists what needs it, as `{"loc": [...], "message": "..."}`."""

    def __init__(self, what: str, needed_by: Sequence[tuple[str, str]], *, fix: str) -> None:
        """`needed_by`: where, such as `aliases.champion`, and how."""
        listed = "; ".join(message for _, message in needed_by[:5])
        more = f"; and {len(needed_by) - 5} more" if len(needed_by) > 5 else ""
        super().__init__(f"{what} is needed: {listed}{more}. {fix}")
        self.errors = [{"loc": place.split("."), "message": message} for place, message in needed_by]


class VersionInUse(StillNeeded):
    """An alias points at the version, or it is being registered."""


class ModelInUse(StillNeeded):
    """Aliases point at versions of the model, or versions are being registered."""


class ArtifactError(RegistryError):
    """A stored file is missing, altered or of a kind that is not allowed."""


class HashMismatch(ArtifactError):
    """A stored file differs from the digest in its manifest."""


class ManifestUnsupported(ArtifactError):
    """The manifest cannot be read by this version of the software."""


class ArtifactExists(ArtifactError):
    """A create-only write found the key taken."""


class StoreFull(RegistryError):
    """No space left on the device (or the quota is used up); the partial write was removed."""


class StoreUnavailable(RegistryError):
    """The data directory is gone, is another than before, or cannot be written."""


class DatabaseUnavailable(RegistryError):
    """The metadata database is locked or gone."""
