"""What each engine measured for a backbone on a device. A cache: losing it costs a new measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from model_registry.db import Database
from model_registry.tables import engine_reports


@dataclass(frozen=True, slots=True)
class EngineMeasurement:
    """`engines` holds a row per candidate, `chosen` names the one that serves on this kind of device."""

    digest: str
    device_key: str
    device: dict[str, Any]
    chosen: str
    engines: list[dict[str, Any]]
    created_at: float = 0.0


class EngineReports:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, digest: str, device_key: str) -> EngineMeasurement | None:
        with self._database.read() as connection:
            row = connection.execute(_of(sa.select(engine_reports), digest, device_key)).first()
        return None if row is None else EngineMeasurement(**row._mapping)

    def put(self, measurement: EngineMeasurement) -> None:
        """Replaces what was measured before for the same weights and device."""
        with self._database.write() as connection:
            connection.execute(_of(sa.delete(engine_reports), measurement.digest, measurement.device_key))
            connection.execute(
                engine_reports.insert().values(
                    digest=measurement.digest,
                    device_key=measurement.device_key,
                    device=measurement.device,
                    chosen=measurement.chosen,
                    engines=measurement.engines,
                    created_at=self._database.now(connection),
                )
            )

    def of(self, digests: Sequence[str]) -> list[EngineMeasurement]:
        """All devices' rows for these weights, the newest first."""
        query = sa.select(engine_reports).where(engine_reports.c.digest.in_(digests))
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(engine_reports.c.created_at.desc()))
            return [EngineMeasurement(**row._mapping) for row in rows]


def _of(query: Any, digest: str, device_key: str) -> Any:
    return query.where(engine_reports.c.digest == digest, engine_reports.c.device_key == device_key)
