"""What of a container's memory goes to what: within its limit, or refused with the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.memory_plan import (
    LEAST_BUDGET_BYTES,
    LEAST_CHECK_BYTES,
    MIB,
    PROCESS_BYTES,
    memory_limit,
    plan_memory,
)

GIB = 1024 * MIB
LEAST = PROCESS_BYTES + LEAST_BUDGET_BYTES + LEAST_CHECK_BYTES


@given(limit=st.integers(LEAST, 1 << 42))
def test_what_is_derived_fits_the_limit(limit: int) -> None:
    plan = plan_memory(None, None, limit=limit, physical=1 << 50)
    assert plan.total_bytes <= limit
    assert plan.budget_bytes >= LEAST_BUDGET_BYTES and plan.check_bytes >= LEAST_CHECK_BYTES


@given(limit=st.none() | st.integers(MIB, 1 << 42), budget=st.integers(MIB, 1 << 42), check=st.integers(GIB, 1 << 42))
def test_what_is_set_is_taken_or_refused(limit: int | None, budget: int, check: int) -> None:
    fits = limit is None or PROCESS_BYTES + budget + check <= limit
    if fits:
        plan = plan_memory(budget, check, limit=limit, physical=GIB)
        assert (plan.budget_bytes, plan.check_bytes) == (budget, check)
    else:
        with pytest.raises(ValueError, match=r"memory_budget_bytes.*dataset_check_memory_bytes.*raise the limit"):
            plan_memory(budget, check, limit=limit, physical=1 << 50)


@given(limit=st.integers(LEAST, 1 << 42), share=st.floats(0, 1))
def test_a_check_is_bounded_by_what_a_budget_leaves(limit: int, share: float) -> None:
    room = limit - PROCESS_BYTES - LEAST_CHECK_BYTES
    budget = MIB + int(share * (room - MIB))
    assert plan_memory(budget, None, limit=limit, physical=1 << 50).total_bytes <= limit


def test_without_a_container_the_machine_is_the_measure_and_a_large_one_gives_the_most() -> None:
    assert plan_memory(None, None, limit=None, physical=64 * GIB).budget_bytes == 8 * GIB
    assert plan_memory(None, None, limit=None, physical=64 * GIB).check_bytes == 4 * GIB
    assert plan_memory(None, None, limit=None, physical=4 * GIB).total_bytes <= 4 * GIB


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_limit_of_version_2_is_the_least_on_the_way_up(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/kubepods/pod1/box\n")
    write(tmp_path / "sys/fs/cgroup/kubepods/pod1/box/memory.max", "max\n")
    assert memory_limit(tmp_path) is None
    write(tmp_path / "sys/fs/cgroup/kubepods/pod1/memory.max", "4294967296\n")
    write(tmp_path / "sys/fs/cgroup/kubepods/memory.max", "8589934592\n")
    assert memory_limit(tmp_path) == 4 * GIB


@pytest.mark.parametrize("path", ["/", "/docker/abc"])
def test_within_a_container_the_mounts_own_folder_counts(tmp_path: Path, path: str) -> None:
    write(tmp_path / "proc/self/cgroup", f"0::{path}\n")
    write(tmp_path / "sys/fs/cgroup/memory.max", "2147483648\n")
    assert memory_limit(tmp_path) == 2 * GIB


def test_version_1_is_read_too_and_its_number_for_none_is_none(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/box\n4:memory:/docker/abc\n0::/\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory_limit(tmp_path) is None
    write(tmp_path / "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "3221225472\n")
    assert memory_limit(tmp_path) == 3 * GIB


def test_a_host_without_cgroups_has_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
