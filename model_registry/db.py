"""One metadata database, SQLite or PostgreSQL.

Knows how to open it, begin a transaction, ask it for the time and report that it is away.
Knows no table. Leases and history use the database's clock, so hosts need not agree on theirs.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from model_registry.errors import DatabaseUnavailable

_SQLITE_NOW = sa.text("SELECT (julianday('now') - 2440587.5) * 86400.0")
_POSTGRES_NOW = sa.text("SELECT extract(epoch FROM clock_timestamp())")


class Database:
    """Transactions on the metadata database.

    `url` is an SQLAlchemy URL (`sqlite:///path` or `postgresql+psycopg://…`). `clock` replaces the
    database's clock in tests; it returns seconds since the epoch.
    """

    def __init__(
        self, url: str, *, busy_timeout_s: float = 5.0, clock: Callable[[], float] | None = None, pool_size: int = 8
    ) -> None:
        self._clock = clock
        self.url = sa.make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self.engine = sa.create_engine(
                self.url, connect_args={"timeout": busy_timeout_s, "check_same_thread": False}
            )
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = sa.create_engine(
                self.url,
                pool_pre_ping=True,
                pool_size=pool_size,
                pool_timeout=busy_timeout_s,
                connect_args={
                    "connect_timeout": max(1, int(busy_timeout_s)),
                    "options": f"-c lock_timeout={int(busy_timeout_s * 1000)}",
                },
            )

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A read transaction: one consistent view. Raises `DatabaseUnavailable`."""
        # SQLite's reads are of one moment anyway.
        view = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with _availability(), self.engine.connect().execution_options(**view) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A write transaction, committed at the end of the block or rolled back by an exception.

        On SQLite it takes the write lock at once (`BEGIN IMMEDIATE`): a deferred transaction that
        upgrades later fails with SQLITE_BUSY without ever waiting. Raises `DatabaseUnavailable`.
        """
        with (
            _availability(),
            self.engine.connect().execution_options(polyhead_write=True) as connection,
            connection.begin(),
        ):
            yield connection

    def now(self, connection: sa.Connection) -> float:
        """Seconds since the epoch by the database's clock (the wall clock, not the transaction's start)."""
        if self._clock is not None:
            return self._clock()
        return float(connection.execute(_SQLITE_NOW if self.is_sqlite else _POSTGRES_NOW).scalar_one())

    def dispose(self) -> None:
        self.engine.dispose()


@contextlib.contextmanager
def _availability() -> Iterator[None]:
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
        original = getattr(error, "orig", None) or error
        # The driver's message can name hosts and files, so it stays in the cause and out of the text.
        raise DatabaseUnavailable(f"the metadata database is unavailable ({type(original).__name__})") from error


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    is_write = connection.get_execution_options().get("polyhead_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")
