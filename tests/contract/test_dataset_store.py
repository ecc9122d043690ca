"""One suite for the dataset store over SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune.data.errors import DatasetInUse, DatasetNotFound
from finetune.data.records import ColumnReport, DatasetRecord, DatasetReport, DatasetStatus, Finding
from finetune.data.store import DatasetStore, new_dataset_id
from model_registry.db import Database
from model_registry.tables import datasets, deletions

REPORT = DatasetReport(
    rows=3,
    columns=[ColumnReport(name="text", type="text", empty=0, distinct=3, example="ä \x00 \U0001f600")],
    findings=[Finding(code="duplicate_row", severity="info", message="m", rows=[2], count=1, fix="f")],
)


@pytest.fixture
def store(database: Database) -> DatasetStore:
    return DatasetStore(database)


@contextmanager
def clock_at(database: Database, seconds: float) -> Iterator[None]:
    before, database._clock = database._clock, lambda: seconds
    try:
        yield
    finally:
        database._clock = before


def create(store: DatasetStore, tenant: str = "default", filename: str = "a.csv") -> DatasetRecord:
    return store.create(tenant, filename=filename, file_format="csv", sha256="0" * 64, size_bytes=5 * 2**30)


def test_create_and_get(store: DatasetStore) -> None:
    record = create(store)
    assert record == store.get("default", record.id)
    assert (record.status, record.bytes, record.report, record.columns) == (
        DatasetStatus.UPLOADED,
        5 * 2**30,
        None,
        None,
    )
    assert record.created_at == record.updated_at and record.deleted_at is None


def test_ids_are_unguessable_and_may_be_drawn_beforehand(store: DatasetStore) -> None:
    chosen = new_dataset_id()
    assert len(chosen) == 25 and chosen.startswith("ds_") and chosen == chosen.lower() and chosen != new_dataset_id()
    record = store.create("t", filename="a", file_format="csv", sha256="", size_bytes=0, dataset_id=chosen)
    assert record.id == chosen


def test_hostile_filenames_are_stored(store: DatasetStore) -> None:
    assert create(store, filename="a\0\ud800\n.csv").filename == "a???.csv"
    assert create(store, filename="x" * 1000 + ".csv").filename == "x" * 251 + ".csv"


def test_other_tenants_see_nothing(store: DatasetStore) -> None:
    record = create(store, tenant="one")
    for act in (store.get, store.delete):
        with pytest.raises(DatasetNotFound):
            act("two", record.id)
    with pytest.raises(DatasetNotFound):
        store.list("two", after=record.id)
    assert store.list("two") == [] and store.get("one", record.id) == record


def test_list_is_paged_newest_first(store: DatasetStore, database: Database) -> None:
    created = []
    for seconds in (1.0, 2.0, 2.0, 3.0):  # two in the same instant
        with clock_at(database, seconds):
            created.append(create(store).id)
    everything = [record.id for record in store.list("default")]
    assert (everything[0], everything[-1], set(everything)) == (created[3], created[0], set(created))
    paged: list[str] = []
    while page := store.list("default", after=paged[-1] if paged else None, limit=1):
        paged += [record.id for record in page]
    assert paged == everything


def test_deleted_datasets_vanish_but_hold_their_place_in_paging(store: DatasetStore, database: Database) -> None:
    ids = []
    for seconds in (1.0, 2.0):
        with clock_at(database, seconds):
            ids.append(create(store).id)
    store.delete("default", ids[1])
    assert [record.id for record in store.list("default", after=ids[1])] == ids[:1]
    assert [record.id for record in store.list("default")] == ids[:1]
    with pytest.raises(DatasetNotFound):
        store.get("default", ids[1])
    store.delete("default", ids[1])
    assert store.unknown([*ids, "ds_none"]) == {ids[1], "ds_none"}
    assert not store.set_validating(ids[1]) and not store.finish(ids[1], REPORT, DatasetStatus.READY)


def test_a_dataset_that_jobs_need_stays_and_the_refusal_names_them(store: DatasetStore) -> None:
    record = create(store)
    with pytest.raises(DatasetInUse, match="ft_1, ft_2"):
        store.delete("default", record.id, needed_by=lambda connection, dataset_id: ["ft_1", "ft_2"])
    assert store.get("default", record.id) == record


def test_what_a_report_says_of_the_data_goes_with_it(store: DatasetStore, database: Database) -> None:
    record = create(store)
    store.finish(record.id, REPORT, DatasetStatus.READY)
    store.delete("default", record.id, actor="ann", reason="asked to")
    with database.read() as connection:
        row = connection.execute(datasets.select()).one()
        told = connection.execute(deletions.select()).one()
    assert (row.report, row.columns, row.filename) == (None, None, "") and row.sha256 == record.sha256
    assert (told.kind, told.name, told.actor, told.reason) == ("dataset", record.id, "ann", "asked to")


def test_a_check_ends_once(store: DatasetStore) -> None:
    record = create(store)
    assert store.set_validating(record.id) and store.set_validating(record.id)
    assert store.get("default", record.id).status is DatasetStatus.VALIDATING
    assert store.finish(record.id, REPORT, DatasetStatus.READY)
    finished = store.get("default", record.id)
    assert (finished.status, finished.report, finished.columns, finished.rows) == ("ready", REPORT, REPORT.columns, 3)
    assert not store.finish(record.id, REPORT, DatasetStatus.INVALID) and not store.set_validating(record.id)
    assert store.get("default", record.id) == finished


def test_stale_lists_checks_that_did_not_end(store: DatasetStore, database: Database) -> None:
    with clock_at(database, 1000.0):
        waiting, validating, done, deleted = (create(store, tenant=str(number)) for number in range(4))
        store.finish(done.id, REPORT, DatasetStatus.READY)
        store.delete("3", deleted.id)
    with clock_at(database, 1050.0):
        store.set_validating(validating.id)
    with clock_at(database, 1100.0):
        assert [record.id for record in store.stale(99)] == [waiting.id]
        assert [record.id for record in store.stale(49)] == [waiting.id, validating.id]
        assert store.stale(100) == []
