from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from service import garbage


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    callbacks = gc.callbacks[:]
    gc.collect()
    yield
    gc.callbacks[:] = callbacks
    gc.unfreeze()


class Ring:
    def __init__(self) -> None:
        self.itself = self


def test_what_survived_a_long_collection_is_looked_at_again_only_on_reconsideration() -> None:
    garbage.keep_collections_short(long_s=0)
    ring = Ring()
    freed = weakref.ref(ring)
    gc.collect()
    frozen = gc.get_freeze_count()
    assert frozen > 10_000
    del ring
    gc.collect()
    assert freed() is not None
    garbage.reconsider()
    assert freed() is None
    assert gc.get_freeze_count() > 10_000


def test_short_and_young_collections_change_nothing() -> None:
    garbage.keep_collections_short(long_s=60)
    gc.collect()
    garbage.keep_collections_short(long_s=0)
    gc.collect(1)
    assert gc.get_freeze_count() == 0
