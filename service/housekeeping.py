"""What is done again and again so that nothing is left over: retention, and files of what was deleted.

Each chore is done by one of the processes that share the database; any may crash in the middle of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from finetune.jobs.store import JobStore
from model_registry.data_folder import DataFolder
from model_registry.errors import DatabaseUnavailable, StoreUnavailable
from model_registry.refs import DEFAULT_TENANT
from model_registry.removal import Keep, Removal

_log = logging.getLogger("service.housekeeping")
_SWEEP_S, _RETENTION_S = 60.0, 600.0


class Retention:
    """Which rule a model has: its own, by `name` or `tenant/name`, else the one for all."""

    def __init__(self, default: Keep, by_model: Mapping[str, Keep]) -> None:
        self._default, self._by_model = default, by_model

    def of(self, tenant: str, name: str) -> Keep:
        own = self._by_model.get(f"{tenant}/{name}")
        if own is None and tenant == DEFAULT_TENANT:
            own = self._by_model.get(name)
        return self._default if own is None else own


class Housekeeping:
    def __init__(
        self, removal: Removal, jobs: JobStore, folder: DataFolder, retention: Retention, *, is_dry: bool = False
    ) -> None:
        self._removal, self._jobs, self._folder = removal, jobs, folder
        self._retention, self._is_dry = retention, is_dry

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong once is tried again."""
        while True:
            try:
                await asyncio.to_thread(self.turn)
            except (DatabaseUnavailable, StoreUnavailable) as error:
                _log.warning(f"housekeeping put off: {error}", extra={"action": "housekeeping_put_off"})
            except Exception:
                _log.exception("housekeeping failed", extra={"action": "housekeeping_failed"})
            await asyncio.sleep(_SWEEP_S)

    def turn(self) -> None:
        """Does what is due and this process's turn. Raises `StoreUnavailable`: where the files are not, none are left
        to remove, and their rows must stay."""
        self._folder.check()
        if self._removal.take_turn("retention", every_s=_RETENTION_S):
            self.retain()
        if self._removal.take_turn("sweep", every_s=_SWEEP_S):
            self._removal.sweep(self._jobs.unfinished)
            self._sweep_jobs()

    def retain(self) -> None:
        for version in self._removal.retain(self._retention.of, is_dry=self._is_dry):
            rule = self._retention.of(version.tenant, version.name)
            _log.info(
                f"{'would delete' if self._is_dry else 'deleted'} {version.name}:{version.version}, which neither "
                f"keep_versions={rule.versions} nor keep_days={rule.days} keeps",
                extra={"action": "retention", "tenant": version.tenant, "is_dry": self._is_dry},
            )

    def _sweep_jobs(self) -> None:
        """Removes what a crash left of deleted jobs."""
        found = {path.stem for path in (self._folder.root / "logs" / "jobs").glob("ft_*.log")}
        found |= {path.name for path in (self._folder.root / "work").glob("ft_*")}
        for job_id in self._jobs.unknown(found):
            remove_job_files(self._folder.root, job_id)


def remove_job_files(data_dir: Path, job_id: str) -> None:
    """The log and what is left of the checkpoints of a job that is deleted; what cannot be removed is the sweep's."""
    with contextlib.suppress(OSError):
        (data_dir / "logs" / "jobs" / f"{job_id}.log").unlink(missing_ok=True)
    shutil.rmtree(data_dir / "work" / job_id, ignore_errors=True)
