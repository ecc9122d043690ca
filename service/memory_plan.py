"""How the memory that this process may take is divided, by what its container allows.

A container that grows beyond its limit is killed with all that it serves, so the limit bounds what models and the
check of uploads, which runs in the same container, may take together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
PROCESS_BYTES = 768 * MIB
"""What the interpreter, its libraries, configured backbones of MiniLM's size and requests in flight take."""
LEAST_BUDGET_BYTES, MOST_BUDGET_BYTES = 256 * MIB, 8192 * MIB
LEAST_CHECK_BYTES, MOST_CHECK_BYTES = 640 * MIB, 4096 * MIB
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 for no limit


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    budget_bytes: int
    """For versions, and for backbones that are not configured."""
    check_bytes: int
    """For the checks of uploads, all that run at once together."""

    @property
    def total_bytes(self) -> int:
        return PROCESS_BYTES + self.budget_bytes + self.check_bytes


def plan_memory(budget: int | None, check: int | None, *, limit: int | None, physical: int) -> MemoryPlan:
    """What is given is taken; what is not is derived from the container's `limit`, or from what the machine has.

    Raises `ValueError` if what is given does not fit the limit.
    """
    room = (physical if limit is None else limit) - PROCESS_BYTES
    check_bytes = check or _within(room // 4 if budget is None else room - budget, LEAST_CHECK_BYTES, MOST_CHECK_BYTES)
    budget_bytes = budget or _within(room - check_bytes, LEAST_BUDGET_BYTES, MOST_BUDGET_BYTES)
    plan = MemoryPlan(budget_bytes, check_bytes)
    if limit is not None and plan.total_bytes > limit and not (budget is None and check is None):
        raise ValueError(
            f"memory_budget_bytes ({_mib(budget_bytes)}), dataset_check_memory_bytes ({_mib(check_bytes)}) and the "
            f"process itself ({_mib(PROCESS_BYTES)}) exceed the container's limit of {_mib(limit)}; raise the limit to "
            f"{_mib(plan.total_bytes)}, or leave both settings out: they then follow the limit"
        )
    return plan


def memory_limit(root: Path = Path("/")) -> int | None:
    """The smallest limit of the cgroups that this process is in, of version 2 or 1, in bytes; None: no limit."""
    return min(_limits(root), default=None)


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limits(root: Path) -> Iterator[int]:
    for folder, file in _groups(root):
        # Within a container the path may be the host's, and only the mount's own folder is there.
        for place in (folder, *folder.parents):
            if place == root / "sys" / "fs":
                break
            limit = _number(place / file)
            if limit is not None:
                yield limit


def _groups(root: Path) -> Iterator[tuple[Path, str]]:
    mount = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            yield mount / path.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            yield mount / "memory" / path.lstrip("/"), "memory.limit_in_bytes"


def _number(path: Path) -> int | None:
    try:
        number = int(path.read_text())
    except (OSError, ValueError):  # `max`
        return None
    return number if 0 < number < _UNLIMITED else None


def _within(value: int, least: int, most: int) -> int:
    return max(least, min(most, value))


def _mib(bytes_: int) -> str:
    return f"{bytes_ / MIB:.0f} MiB"
