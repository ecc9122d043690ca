"""Errors of the registry.

RegistryError
├── ModelNotFound          no such model, version or alias
├── AliasConflict          the alias moved since the caller looked
├── InvalidReference       a name, alias or key that is not well formed
├── VersionNotServable     the version exists but is not in state `ready`
├── ArtifactError          a stored file is missing, altered or not allowed
│   ├── HashMismatch
│   ├── ManifestUnsupported
│   └── ArtifactExists     a create-only write found the key taken
├── StoreFull              no space left for the write; nothing was kept
└── DatabaseUnavailable    locked or gone for longer than the busy timeout
"""

from __future__ import annotations


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


class DatabaseUnavailable(RegistryError):
    """The metadata database is locked or gone."""
