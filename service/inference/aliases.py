"""Which version each alias should serve, by the registry, and which it serves in this process. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from model_registry.refs import ModelRef
from model_registry.registry import ModelVersion, RegistrySnapshot

Key = tuple[str, str, int]
"""Tenant, name, version."""
AliasKey = tuple[str, str, str]
"""Tenant, name, alias."""


@dataclass(frozen=True, slots=True)
class AliasState:
    """`reason` says why `serving` is not `wanted`, `retry_at` (seconds since the epoch) when the next load starts."""

    wanted: int
    serving: int | None
    reason: str | None = None
    retry_at: float | None = None


class Aliases:
    """An alias moves in two steps: `follow` says what is wanted, `settle` that it serves. In between the old version
    goes on serving."""

    def __init__(self) -> None:
        self._snapshot = RegistrySnapshot(epoch=-1, aliases={}, versions={})
        self._serving: dict[AliasKey, int] = {}
        self._before: dict[AliasKey, int] = {}

    @property
    def is_read(self) -> bool:
        """Whether the registry has been read at all."""
        return self._snapshot.epoch >= 0

    def follow(self, snapshot: RegistrySnapshot) -> tuple[set[AliasKey], set[Key]]:
        """From now on `snapshot` says what is wanted, unless it is older than the last. Returns the aliases and the
        versions that it took away."""
        if snapshot.epoch < self._snapshot.epoch:
            return set(), set()
        gone = self._snapshot.aliases.keys() - snapshot.aliases.keys()
        deleted = self._snapshot.versions.keys() - snapshot.versions.keys()
        self._snapshot = snapshot
        for alias in gone:
            self._serving.pop(alias, None)
            self._before.pop(alias, None)
        self._before = {alias: number for alias, number in self._before.items() if (*alias[:2], number) not in deleted}
        return gone, deleted

    def unsettled(self) -> list[tuple[AliasKey, Key]]:
        """Each alias that does not serve what it should, with the version that it should serve."""
        return [
            (alias, (alias[0], alias[1], version))
            for alias, version in self._snapshot.aliases.items()
            if self._serving.get(alias) != version
        ]

    def settle(self, alias: AliasKey) -> None:
        """The version that is wanted is loaded and serves from now on."""
        if alias in self._serving:
            self._before[alias] = self._serving[alias]
        self._serving[alias] = self._snapshot.aliases[alias]

    def wanted(self, alias: AliasKey) -> int | None:
        return self._snapshot.aliases.get(alias)

    def serving(self, alias: AliasKey) -> int | None:
        return self._serving.get(alias)

    def serving_instead(self, key: Key) -> dict[str, int]:
        """Aliases that serve `key` until the version that they should serve is loaded, with that one."""
        tenant, name, version = key
        return {
            alias[2]: wanted
            for alias, wanted in dict(self._snapshot.aliases).items()
            if alias[:2] == (tenant, name) and self._serving.get(alias) == version != wanted
        }

    def version(self, key: Key) -> ModelVersion | None:
        """What the registry knows of a ready version."""
        return self._snapshot.versions.get(key)

    def resolve(self, tenant: str, ref: ModelRef) -> Key | None:
        """The version that answers for `ref`; while its alias serves none, the one that should. None: unknown here.

        What an alias serves answers for it also when it is deleted, until the version that is wanted takes over.
        """
        version = ref.version
        if version is None:
            alias = (tenant, ref.name, ref.alias or "")
            if alias in self._serving:
                return tenant, ref.name, self._serving[alias]
            version = self._snapshot.aliases.get(alias)
        if version is None or (tenant, ref.name, version) not in self._snapshot.versions:
            return None
        return tenant, ref.name, version

    def pinned(self) -> set[Key]:
        """Versions that must stay in memory: each that an alias serves or should serve."""
        return _keys(self._serving) | _keys(self._snapshot.aliases)

    def previous(self) -> set[Key]:
        """What aliases served before: kept as long as there is room, so that a rollback needs no load."""
        return _keys(self._before)

    def names(self) -> set[tuple[str, str]]:
        """Tenant and name of every model with a ready version."""
        return {(tenant, name) for tenant, name, _ in self._snapshot.versions}


def _keys(versions: dict[AliasKey, int]) -> set[Key]:
    return {(tenant, name, version) for (tenant, name, _), version in versions.items()}
