"""The schema's linear history. `migrate(database)` brings a database to the newest revision."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from model_registry.db import Database

_POSTGRES_LOCK = 0x706F6C79  # any constant: two processes that start together migrate one after the other

_PATIENCE_S = 600.0


def migrate(database: Database) -> None:
    """Applies missing revisions. Safe to call from several processes at once."""
    with database.write() as connection, database.patient(connection, _PATIENCE_S):
        if not database.is_sqlite:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_LOCK})
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config
