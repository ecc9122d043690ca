"""A PostgreSQL that freezes, as behind a connection of which only this half is left: every wait ends, callers after it
are refused at once, and all goes on when it answers again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from model_registry.db import Breaker, Database
from model_registry.errors import DatabaseUnavailable
from model_registry.migrations import migrate
from model_registry.registry import Registry
from tests.support.freezing_proxy import FreezingProxy

ENDS_S = 20.0  # of what would otherwise wait for good


@pytest.fixture
def proxy(new_postgres_url: str) -> Iterator[FreezingProxy]:
    with FreezingProxy(new_postgres_url) as proxy:
        yield proxy


@pytest.fixture
def database(proxy: FreezingProxy) -> Iterator[Database]:
    database = Database(proxy.url, busy_timeout_s=0.5)
    migrate(database)
    yield database
    proxy.thaw()
    database.dispose()


def outcome(act: Callable[[], object]) -> object:
    """What `act` returns or raises; it must end by itself."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(act())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ENDS_S)
    assert found, "it waits for a server that does not answer"
    return found[0]


def test_a_pooled_connection_and_a_new_one_both_give_up(database: Database, proxy: FreezingProxy) -> None:
    registry = Registry(database)
    assert registry.models("default") == []
    proxy.freeze()
    assert isinstance(outcome(lambda: registry.models("default")), DatabaseUnavailable)
    database.dispose()
    time.sleep(1.1)  # the breaker lets one through
    assert isinstance(outcome(lambda: registry.models("default")), DatabaseUnavailable)


def test_a_statement_under_way_gives_up(database: Database, proxy: FreezingProxy) -> None:
    def in_the_middle() -> None:
        with database.write() as connection:
            connection.execute(sa.text("SELECT 1"))
            proxy.freeze()
            connection.execute(sa.text("SELECT 2"))

    assert isinstance(outcome(in_the_middle), DatabaseUnavailable)


def test_after_one_wait_in_vain_the_others_are_refused_without_one(database: Database, proxy: FreezingProxy) -> None:
    registry = Registry(database)
    registry.epoch()
    proxy.freeze()
    assert isinstance(outcome(registry.epoch), DatabaseUnavailable)
    reached = proxy.accepted
    for _ in range(20):
        with pytest.raises(DatabaseUnavailable, match="does not answer"):
            registry.epoch()
    assert proxy.accepted == reached


def test_it_goes_on_when_the_server_answers_again(database: Database, proxy: FreezingProxy) -> None:
    registry = Registry(database)
    proxy.freeze()
    assert isinstance(outcome(registry.epoch), DatabaseUnavailable)
    proxy.thaw()
    deadline = time.monotonic() + ENDS_S
    while isinstance(outcome(registry.epoch), DatabaseUnavailable):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert registry.models("default") == []


def test_a_statement_that_takes_too_long_is_ended_by_the_server_and_the_connection_lives(database: Database) -> None:
    with pytest.raises(DatabaseUnavailable, match="QueryCanceled"), database.read() as connection:
        connection.execute(sa.text("SELECT pg_sleep(30)"))
    assert Registry(database).epoch() == 0


def test_a_migration_may_take_longer(database: Database) -> None:
    with database.write() as connection, database.patient(connection, 30.0):
        connection.execute(sa.text("SELECT pg_sleep(1.2)"))
    with pytest.raises(DatabaseUnavailable), database.read() as connection:
        connection.execute(sa.text("SELECT pg_sleep(30)"))


class Clock:
    time = 100.0

    def __call__(self) -> float:
        return self.time


def test_the_breaker_lets_one_a_second_through_until_it_is_reset() -> None:
    clock = Clock()
    breaker = Breaker(clock)

    def passes() -> bool:
        try:
            with breaker:
                return True
        except DatabaseUnavailable:
            return False

    assert passes()
    breaker.trip()
    assert [passes() for _ in range(3)] == [False] * 3
    clock.time += 1.01
    assert [passes() for _ in range(3)] == [True, False, False]
    clock.time += 1.01
    assert [passes() for _ in range(3)] == [True, False, False]
    breaker.reset()
    assert [passes() for _ in range(3)] == [True] * 3
