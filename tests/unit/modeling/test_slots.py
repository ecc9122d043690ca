"""Slots: every row finds its adapter there, whatever came and went before; memory stays where it was promised."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.adapters import Adapter, LoraGroup, LoraLayout, LoraPair
from modeling.engines.slots import AdapterStacks, SlotTable
from modeling.errors import AdapterMismatch, EngineFailed

LAYOUT = LoraLayout((LoraGroup(6, (("q", 4), ("k", 5))), LoraGroup(4, (("o", 6),))))
KEYS = [f"a{number}" for number in range(7)]


def adapter(seed: int, *, rank: int = 2, layers: tuple[str, ...] = ("q", "k", "o")) -> Adapter:
    draw = np.random.default_rng(seed)
    shapes = {"q": (4, 6), "k": (5, 6), "o": (6, 4)}
    pairs = {}
    for name in layers:
        out, into = shapes[name]
        a, b = draw.normal(size=(rank, into)), draw.normal(size=(out, rank))
        pairs[name] = LoraPair(a.astype(np.float32), b.astype(np.float32))
    return Adapter(rank, pairs)


def delta(stacks: AdapterStacks, slot: int, name: str) -> np.ndarray:
    """What the graph computes for one layer from the stacks: A @ B, float[in, out]."""
    group, linear = {"q": (0, 0), "k": (0, 1), "o": (1, 0)}[name]
    b = stacks.b(group, linear)[slot].astype(np.float32)
    rank = b.shape[0]
    a = stacks.a(group)[slot].astype(np.float32)[:, linear * rank : (linear + 1) * rank]
    return np.asarray(a @ b)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4), max_size=30), st.data())
def test_every_row_finds_its_own_weights_through_any_history(batches: list[list[str]], data: st.DataObject) -> None:
    stacks = AdapterStacks(LAYOUT, capacity=4)
    loaded: dict[str, Adapter] = {}
    for number, batch in enumerate(batches):
        for key in dict.fromkeys(batch):
            if key not in loaded or data.draw(st.booleans()):
                layers = data.draw(st.sampled_from([("q", "k", "o"), ("o",), ("k",)]))
                loaded[key] = adapter(number, rank=data.draw(st.integers(1, 20)), layers=layers)
                stacks.load(key, loaded[key])
        slots = stacks.rows(batch)
        for key, slot in zip(batch, slots, strict=True):
            for name in ("q", "k", "o"):
                pair = loaded[key].pairs.get(name)
                expected = 0 if pair is None else (pair.b @ pair.a).T
                np.testing.assert_allclose(delta(stacks, slot, name), expected, atol=1e-4)
        for name in ("q", "k", "o"):
            assert not delta(stacks, 0, name).any(), "slot 0 is zero"
        if data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(loaded)))
            stacks.unload(gone)
            del loaded[gone]
            with pytest.raises(EngineFailed):
                stacks.rows([gone])


@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=40))
def test_the_least_recently_used_gives_up_its_slot(uses: list[str]) -> None:
    table = SlotTable(3)
    for number, key in enumerate(uses):
        resident = list(dict.fromkeys(reversed(uses[:number])))[:3]
        _, written = table.assign([key])
        assert set(written) == {key} - set(resident)


@given(st.lists(st.sets(st.sampled_from(KEYS), min_size=1, max_size=3), min_size=1, max_size=40))
def test_the_adapters_of_one_batch_never_share_a_slot(batches: list[set[str]]) -> None:
    table = SlotTable(3)
    for batch in batches:
        slots, written = table.assign(sorted(batch))
        assert len(set(slots)) == len(batch) and set(slots) <= {1, 2, 3}
        assert table.assign(sorted(batch)) == (slots, {}), "what was just brought in is still there"
        assert set(written.values()) <= set(slots)


def test_more_adapters_than_slots_in_one_batch_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="4 adapters"):
        SlotTable(3).assign(KEYS[:4])


def test_memory_is_the_adapters_own_and_slots_are_apart() -> None:
    stacks = AdapterStacks(LAYOUT, capacity=4)
    assert stacks.slot_bytes() == 0
    stacks.load("a", adapter(1, rank=8))
    stacks.rows(["a"])
    before = stacks.slot_bytes()
    stacks.load("b", adapter(2, rank=8))
    stacks.rows(["b", "a"])
    assert stacks.slot_bytes() == before
    assert stacks.adapter_bytes("b") == adapter(2, rank=8).size_bytes
    stacks.load("c", adapter(3, rank=9))
    stacks.rows(["c"])
    assert stacks.slot_bytes() > before, "a higher rank needs wider stacks"


def test_half_precision_halves_both() -> None:
    full, half = (AdapterStacks(LAYOUT, capacity=4, dtype=dtype) for dtype in (np.float32, ml_dtypes.bfloat16))
    for stacks in (full, half):
        stacks.load("a", adapter(1))
        stacks.rows(["a"])
    assert 2 * half.slot_bytes() == full.slot_bytes()
    assert 2 * half.adapter_bytes("a") == full.adapter_bytes("a")


def test_an_adapter_that_would_exceed_the_slots_memory_is_refused() -> None:
    stacks = AdapterStacks(LAYOUT, capacity=4, budget_bytes=8000)
    stacks.load("a", adapter(1, rank=8))
    stacks.rows(["a"])
    with pytest.raises(AdapterMismatch, match="rank 64"):
        stacks.load("big", adapter(2, rank=64))
    stacks.rows(["a"])


def test_capacity_grows_with_the_adapters_known_but_not_beyond_the_budget() -> None:
    roomy, tight = AdapterStacks(LAYOUT, capacity=64), AdapterStacks(LAYOUT, capacity=64, budget_bytes=12_000)
    for stacks in (roomy, tight):
        for number in range(30):
            stacks.load(f"a{number}", adapter(number))
        stacks.rows([f"a{number}" for number in range(8)])
    assert len(roomy.a(0)) == 33 and len(tight.a(0)) == 9
    assert tight.slot_bytes() <= 12_000
