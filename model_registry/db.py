"""One metadata database, SQLite or PostgreSQL.

Knows how to open it, begin a transaction, ask it for the time and report that it is away.
Knows no table. Leases and history use the database's clock, so hosts need not agree on theirs.

A PostgreSQL that is frozen, or behind a connection of which only this half is left, answers nothing and closes nothing.
So every wait for it has an end here too (`Patience`), and once one was in vain, others are refused at once until it has
answered again (`Breaker`): otherwise each would wait as long, and threads would run out.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from model_registry.errors import DatabaseUnavailable

_SQLITE_NOW = sa.text("SELECT (julianday('now') - 2440587.5) * 86400.0")
_POSTGRES_NOW = sa.text("SELECT extract(epoch FROM clock_timestamp())")

_IDS_IN_A_QUERY = 500
_REST_S = 1.0
_PING_S = 2.0
_GRACE_S = 0.5  # the server's own end of a statement comes first


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
        self.is_made = False  # from then on the file of SQLite is not made again
        self._breaker = Breaker()
        if self.is_sqlite:
            self.engine = sa.create_engine(
                self.url, connect_args={"timeout": busy_timeout_s, "check_same_thread": False}
            )
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
            event.listen(self.engine, "do_connect", self._refuse_new_file)
            self._reader = self.engine
        else:
            self.engine = sa.create_engine(
                self.url,
                pool_pre_ping=True,
                pool_size=pool_size,
                pool_timeout=busy_timeout_s,
                connect_args=_connect_args(busy_timeout_s),
            )
            event.listen(self.engine, "do_connect", Patience(busy_timeout_s, self._breaker).connect)
            # One view for all statements of a block; under READ COMMITTED each sees what was committed before it.
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A read transaction: one consistent view. Raises `DatabaseUnavailable`."""
        with self._breaker, _availability(), self._reader.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A write transaction, committed at the end of the block or rolled back by an exception.

        On SQLite it takes the write lock at once (`BEGIN IMMEDIATE`): a deferred transaction that
        upgrades later fails with SQLITE_BUSY without ever waiting. Raises `DatabaseUnavailable`.
        """
        with (
            self._breaker,
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

    @contextlib.contextmanager
    def patient(self, connection: sa.Connection, seconds: float) -> Iterator[None]:
        """Until the block ends, statements of this transaction may take so long: a migration's, say."""
        driver: Any = connection.connection.dbapi_connection
        if self.is_sqlite:
            yield
            return
        connection.execute(sa.text(f"SET LOCAL statement_timeout = {int(seconds * 1000)}"))
        usual_s, driver.patience_s = driver.patience_s, seconds
        try:
            yield
        finally:
            driver.patience_s = usual_s

    def dispose(self) -> None:
        self.engine.dispose()

    def _refuse_new_file(self, dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        """SQLite would make an empty database in the place of one whose volume is away."""
        if self.is_made and self.url.database and not Path(self.url.database).exists():
            raise sqlite3.OperationalError("the database's file is gone")


class Breaker:
    """Refuses at once what would wait in vain: for a second after each wait that had no answer, all but one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._closed_until = 0.0  # 0: it answers
        self.is_open = True

    def trip(self) -> None:
        """A wait had no answer."""
        with self._lock:
            self.is_open, self._closed_until = False, self._clock() + _REST_S

    def reset(self) -> None:
        """It answers."""
        self.is_open = True

    def __enter__(self) -> None:
        """Raises `DatabaseUnavailable`. One caller a second goes through, to see whether it answers again."""
        if self.is_open:
            return
        with self._lock:
            now = self._clock()
            if not self.is_open and now < self._closed_until:
                raise DatabaseUnavailable("the metadata database does not answer")
            self._closed_until = now + _REST_S

    def __exit__(self, *error: object) -> None: ...


class Patience:
    """Connections to PostgreSQL of which no wait is longer than `seconds`, however the other end is gone."""

    def __init__(self, seconds: float, breaker: Breaker) -> None:
        self._seconds, self._breaker = seconds, breaker

    def connect(self, dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
        import psycopg

        try:
            connection = _bounded_class().connect(*arguments, **options)
        except psycopg.errors.ConnectionTimeout:
            self._breaker.trip()
            raise
        connection.patience_s, connection.breaker = self._seconds, self._breaker
        return connection


@functools.cache
def _bounded_class() -> Any:
    """A psycopg connection that gives up on a server which does not answer."""
    import psycopg

    class Bounded(psycopg.Connection[Any]):
        patience_s = 60.0  # while it is being set up
        breaker = Breaker()

        def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
            # A look whether a pooled connection still lives, before its use: no statement, no lock to wait for.
            patience_s = min(_PING_S, self.patience_s) if self.autocommit else self.patience_s
            answer = super().wait(self._until(gen, time.monotonic() + patience_s + _GRACE_S), *arguments, **options)
            self.breaker.reset()
            return answer

        def _until(self, gen: Any, deadline: float) -> Any:
            ready = None
            while True:
                try:
                    waits_for = gen.send(ready)
                except StopIteration as stopped:
                    return stopped.value
                ready = yield waits_for
                if not ready and time.monotonic() > deadline:
                    self.breaker.trip()
                    self.pgconn.finish()  # whatever it answers now belongs to nothing
                    raise psycopg.OperationalError("the server did not answer in time")

    return Bounded


def _connect_args(timeout_s: float) -> dict[str, Any]:
    """Ends by the server for statements and locks, by the kernel for a peer that is gone."""
    timeout_ms = int(timeout_s * 1000)
    return {
        "connect_timeout": max(1, int(timeout_s)),
        "options": f"-c lock_timeout={timeout_ms} -c statement_timeout={timeout_ms}",
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": max(timeout_ms, 1000),
    }


def ids_among(
    connection: sa.Connection, query: sa.Select[Any], column: sa.ColumnElement[str], ids: Collection[str]
) -> set[str]:
    """Those of `ids`, however many, that `query` finds in `column`."""
    listed = list(ids)
    pieces = (listed[start : start + _IDS_IN_A_QUERY] for start in range(0, len(listed), _IDS_IN_A_QUERY))
    return {id_ for piece in pieces for id_ in connection.scalars(query.where(column.in_(piece)))}


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
