"""What an alias serves and what state a version is in, with the reasons: for operators, from any thread."""

from __future__ import annotations

import time

from service.inference.aliases import Aliases, AliasKey, AliasState, Key
from service.inference.engine_director import EngineDirector
from service.inference.lanes import BackboneLane, Lane
from service.inference.loader import Loader
from service.inference.residency import Residency


class PoolStatus:
    def __init__(self, aliases: Aliases, residency: Residency, loader: Loader, engines: EngineDirector) -> None:
        self._aliases, self._residency, self._loader, self._engines = aliases, residency, loader, engines
        self.hidden: set[tuple[str, str]] = set()
        """Tenant and name of models whose name a backbone answers for."""

    def version(self, key: Key) -> tuple[str, str | None]:
        """State of a version here and, if its last load failed, the reason; `unloaded` if it was never asked for."""
        model, failure = self._residency.get(key), self._loader.failure(key)
        if model is not None:
            return model.state, None
        if failure is not None:
            return "failed", failure.reason
        return "loading" if self._loader.is_loading(key) else "unloaded", None

    def alias(self, alias: AliasKey, wanted: int) -> AliasState:
        """What an alias serves here that should serve `wanted`, and why it does not."""
        tenant, name, _ = alias
        key, serving = (tenant, name, wanted), self._aliases.serving(alias)
        if serving == wanted:
            return AliasState(wanted, serving)
        failure, is_loading = self._loader.failure(key), self._loader.is_loading(key)
        if failure is not None:
            retry_at = None if is_loading else time.time() + max(0.0, self._loader.pause_s(key))
            return AliasState(wanted, serving, failure.reason, retry_at)
        reason = f"{name}:{wanted} is being loaded" if is_loading else "this replica has not seen the change yet"
        return AliasState(wanted, serving, reason)

    def serves_instead(self, tenant: str, name: str, version: int) -> dict[str, int]:
        """Aliases that serve a version here although they should serve another, with that one."""
        return self._aliases.serving_instead((tenant, name, version))

    def engine_of(self, key: Key) -> str | None:
        model = self._residency.get(key)
        return None if model is None else model.lane.engine_name

    def engine_reason(self, key: Key) -> str | None:
        """Why a version that is in memory runs on another engine than the settings ask for; None if it does not."""
        model = self._residency.get(key)
        return None if model is None else self.reason_of(model.lane)

    def reason_of(self, lane: Lane) -> str | None:
        return self._engines.reasons.get(lane.backbone.info.digest) if isinstance(lane, BackboneLane) else None
